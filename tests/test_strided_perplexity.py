"""Evaluation over windows: each token is scored once, with the context asked for, as if documents had not been cut."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TINY_GPT2
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.datamodules.rows import RowDataset, make_rows
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.loss import token_nll
from lightning_llm.metrics import LanguageModelingMetrics
from lightning_llm.tasks import CausalLM

LENGTHS = [1, 2, 7, 64, 65, 129, 200]
MAX_LENGTH = 64


def rows_of(lengths, max_length, context, windowing="windows", layout=None, vocab_size=None):
    """Rows that give each token so much context; token i of the store is i + 1, or random with a vocab_size."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1)
    if vocab_size:
        tokens = np.random.default_rng(0).integers(0, vocab_size, offsets[-1])
    token_bytes = 1.0 + np.arange(max(tokens) + 1) % 5
    num_bytes = np.add.reduceat(token_bytes[tokens], offsets[:-1]).astype(np.int64)
    store = TokenStore(tokens.astype(np.uint16), offsets, num_bytes, token_bytes)
    table = make_rows(offsets, np.arange(len(lengths)), max_length, windowing, max_length - context)
    return RowDataset(store, table, 0, token_bytes, layout=layout)


def documents_of(dataset):
    edges = dataset.store.offsets
    return [torch.tensor(dataset.store.tokens[a:b].astype(np.int64)) for a, b in zip(edges, edges[1:], strict=False)]


def batches_of(dataset, size=3):
    rows = list(range(len(dataset)))
    return [dataset[rows[i : i + size]] for i in range(0, len(rows), size)]


def scored_in(batch):
    """(row, column, tokens of context that the row holds) of each target."""
    columns = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    context = batch.get("position_ids", columns)
    return [(row, column, int(context[row, column])) for row, column in (batch["labels"] != -100).nonzero().tolist()]


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY_GPT2, "vocab_size": 512, "n_positions": 256, "initializer_range": 0.4})
    return AutoModelForCausalLM.from_config(config).double().eval()


@torch.no_grad()
def document_nll(model, document):
    """(L - 1,) float64: each token of a whole document but its first."""
    log_p = model(input_ids=document[None], use_cache=False).logits[0].log_softmax(-1)
    return -log_p[torch.arange(len(document) - 1), document[1:]]


@torch.no_grad()
def evaluated(model, batches):
    metrics, task = LanguageModelingMetrics(), CausalLM()
    for batch in batches:
        metrics.update(task.loss(model, batch), num_bytes=batch["num_bytes"])
    return metrics


@torch.no_grad()
def window_nll(model, dataset):
    """{token: (tokens of context, nats)} for rows whose tokens are all distinct; a token scored twice is an error."""
    scored = {}
    for batch in batches_of(dataset):
        nll = token_nll(CausalLM().outputs(model, batch), batch["labels"])
        for row, column, context in scored_in(batch):
            token = int(batch["labels"][row, column])
            assert token not in scored
            scored[token] = (context, nll[row, column - 1].item())  # at the position of the prediction
    return scored


@torch.no_grad()
def guide_loop(model, document, max_length, stride):
    """The strided loop of transformers' guide "Perplexity of fixed-length models".

    Each window scores what the one before it did not hold, by masking the other labels; the model's mean loss is
    multiplied with the number of labels less one, because labels are shifted inside the model.

    Returns:
        The sum of those products, the sum of those numbers, and {token: (tokens of context, nats)} of all that the
        means were taken over.
    """
    total, count, end_before, scored = 0.0, 0, 0, {}
    for begin in range(0, len(document), stride):
        end = min(begin + max_length, len(document))
        window = document[begin:end]
        labels = window.clone()
        labels[: -(end - end_before)] = -100
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        nll = F.cross_entropy(logits[:-1], labels[1:], reduction="none")  # in float64; the model's own is in float32
        is_target = labels[1:] != -100
        counted = int((labels != -100).sum()) - 1
        if counted:  # else the guide multiplies a mean of nothing, or of one label, with nothing
            total, count = total + nll[is_target].mean().item() * counted, count + counted
        for at in is_target.nonzero().flatten().tolist():
            scored[int(labels[at + 1])] = (at + 1, nll[at].item())
        end_before = end
        if end == len(document):
            break
    return total, count, scored


# ---- each target once, with its context ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    max_length=st.integers(2, 24),
    context=st.integers(1, 23),
    windowing=st.sampled_from(["windows", "packed"]),
    layout=st.sampled_from([None, "padding_free"]),
)
def test_each_token_is_scored_once_with_the_context_asked_for(lengths, max_length, context, windowing, layout):
    context = min(context, max_length - 1)
    dataset = rows_of(lengths, max_length, context, windowing, layout)
    begins = np.repeat(dataset.store.offsets[:-1], lengths)
    seen = []
    for batch in batches_of(dataset):
        for row, column, held in scored_in(batch):
            token = int(batch["labels"][row, column])
            position = token - 1 - begins[token - 1]  # in its document
            assert min(position, context) <= held <= position
            before = batch["input_ids"][row, column - held : column + 1].tolist()
            assert before == list(range(token - held, token + 1))  # its own document's tokens, up to itself
            seen.append(token)
    firsts = dataset.store.offsets[:-1] + 1
    assert sorted(seen) == sorted(set(range(1, sum(lengths) + 1)) - set(firsts.tolist()))
    assert len(seen) == dataset.table.num_label_tokens == sum(length - 1 for length in lengths)


@pytest.mark.parametrize("windowing", ["windows", "packed"])
def test_more_context_scores_the_same_tokens_and_no_token_twice(gpt2, windowing):
    scored = {context: window_nll(gpt2, rows_of(LENGTHS, 64, context, windowing)) for context in (1, 16, 48, 63)}
    for context, tokens in scored.items():
        assert set(tokens) == set(scored[1])
        assert len(tokens) == sum(length - 1 for length in LENGTHS)
        late = [held for token, (held, _) in tokens.items() if token > sum(LENGTHS[:-1]) + 64]  # of the last document
        assert min(late) == context


def test_windows_that_do_not_overlap_lose_targets():
    """The control: a window's first token has nothing to be predicted from."""
    dataset = rows_of([129], MAX_LENGTH, context=0)
    assert sum(len(scored_in(batch)) for batch in batches_of(dataset)) < 128


# ---- the same numbers as without cutting ---------------------------------------------------------------------------


@pytest.mark.parametrize(("windowing", "layout"), [("windows", None), ("windows", "padding_free"), ("packed", None)])
def test_windows_that_hold_whole_documents_give_their_likelihood(gpt2, windowing, layout):
    dataset = rows_of(LENGTHS, max(LENGTHS), 100, windowing, layout)
    truth = torch.cat([document_nll(gpt2, document) for document in documents_of(dataset)])
    metrics = evaluated(gpt2, batches_of(dataset))
    values = metrics.compute()
    assert metrics.num_tokens.item() == len(truth) == sum(length - 1 for length in LENGTHS)
    assert metrics.total_nats.item() == pytest.approx(truth.sum().item(), rel=1e-12)
    assert values["perplexity"].item() == pytest.approx(truth.mean().exp().item(), rel=1e-12)
    targets = np.concatenate([document[1:].numpy() for document in documents_of(dataset)])
    num_bytes = dataset.store.token_bytes[targets].sum()
    assert values["bits_per_byte"].item() == pytest.approx(truth.sum().item() / math.log(2) / num_bytes, rel=1e-12)


class ShortMemory(nn.Module):
    """Predicts from the last ``memory`` tokens of a document alone, whatever stands before them."""

    def __init__(self, memory, vocab_size=13):
        super().__init__()
        self.config = SimpleNamespace()
        generator = torch.Generator().manual_seed(memory)
        self.tables = torch.randn(memory, vocab_size, vocab_size, generator=generator, dtype=torch.float64)

    def forward(self, input_ids, position_ids=None, **others):
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids) if position_ids is None else position_ids
        logits = torch.zeros(*input_ids.shape, self.tables.shape[-1], dtype=torch.float64)
        for back, table in enumerate(self.tables):
            logits += table[input_ids.roll(back, 1)] * (positions >= back)[..., None]
        return SimpleNamespace(logits=logits)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    max_length=st.integers(2, 24),
    memory=st.integers(1, 12),
    more=st.integers(0, 12),
    windowing=st.sampled_from(["windows", "packed"]),
)
def test_windows_are_exact_for_a_model_that_looks_back_no_further(lengths, max_length, memory, more, windowing):
    memory = min(memory, max_length - 1)
    dataset = rows_of(lengths, max_length, min(memory + more, max_length - 1), windowing, vocab_size=13)
    model = ShortMemory(memory)
    truth = sum(document_nll(model, document).sum().item() for document in documents_of(dataset))
    assert evaluated(model, batches_of(dataset)).total_nats.item() == pytest.approx(truth, rel=1e-12)


def test_windows_with_less_context_than_the_model_looks_back_are_not():
    """The control of the one above."""
    model = ShortMemory(8)
    short, enough = (rows_of([90, 50], 16, context, vocab_size=13) for context in (7, 8))
    truth = sum(document_nll(model, document).sum().item() for document in documents_of(short))
    assert evaluated(model, batches_of(enough)).total_nats.item() == pytest.approx(truth, rel=1e-12)
    assert abs(evaluated(model, batches_of(short)).total_nats.item() - truth) > 0.1


# ---- beside the loop of transformers' guide ------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [16, 32, 63])
def test_tokens_with_the_context_of_the_guides_loop_have_its_likelihood(gpt2, stride):
    """Our last window begins earlier, so that it is full: its tokens alone have other context than there, and more."""
    dataset = rows_of([200], MAX_LENGTH, MAX_LENGTH - stride)
    (document,) = documents_of(dataset)
    _, _, theirs = guide_loop(gpt2, document, MAX_LENGTH, stride)
    ours = window_nll(gpt2, dataset)
    assert set(ours) == set(theirs)
    alike = [token for token in ours if ours[token][0] == theirs[token][0]]
    for token in alike:
        assert ours[token][1] == pytest.approx(theirs[token][1], rel=1e-12)
    rest = sorted(set(ours) - set(alike))
    num_last = (200 - MAX_LENGTH) % stride
    assert rest == list(range(200 - num_last + 1, 201))
    assert all(ours[token][0] > theirs[token][0] for token in rest)


def test_guides_loop_is_as_the_model_computes_it(gpt2):
    """Its means are the model's own losses, but for their float32."""
    document = torch.arange(1, 101)
    total, count, _ = guide_loop(gpt2, document, 100, 50)
    with torch.no_grad():
        loss = gpt2(input_ids=document[None], labels=document[None]).loss.item()
    assert total / count == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("stride", [16, 32])
def test_guides_loop_gives_later_windows_the_weight_of_one_token_less(gpt2, stride):
    """The known difference. With overlap no target falls to the shift but in the first window, so that its numbers
    are too small by one in each later one; where a window's weight is the number of its targets, both are the same.
    """
    num_windows = 5
    length = MAX_LENGTH + (num_windows - 1) * stride  # the last window is full
    dataset = rows_of([length], MAX_LENGTH, MAX_LENGTH - stride)
    total, count, theirs = guide_loop(gpt2, documents_of(dataset)[0], MAX_LENGTH, stride)
    loss = evaluated(gpt2, batches_of(dataset)).compute()["loss"].item()
    assert len(theirs) == length - 1
    assert count == length - 1 - (num_windows - 1)
    assert np.mean([nats for _, nats in theirs.values()]) == pytest.approx(loss, rel=1e-12)
    assert abs(total / count - loss) > 1e-4


def test_guides_loop_without_overlap_skips_the_first_target_of_each_later_window(gpt2):
    document = torch.arange(1, 3 * MAX_LENGTH + 1)
    _, count, theirs = guide_loop(gpt2, document, MAX_LENGTH, MAX_LENGTH)
    assert count == len(theirs) == len(document) - 3
    assert set(document.tolist()) - set(theirs) == {1, MAX_LENGTH + 1, 2 * MAX_LENGTH + 1}
    ours = window_nll(gpt2, rows_of([len(document)], MAX_LENGTH, context=1))
    assert set(document.tolist()) - set(ours) == {1}


def test_mean_of_the_windows_means_is_biased(gpt2):
    """The control: windows hold unequal numbers of targets."""
    dataset = rows_of(LENGTHS, MAX_LENGTH, 32)
    loss = evaluated(gpt2, batches_of(dataset)).compute()["loss"].item()
    each = [evaluated(gpt2, [dataset[[row]]]) for row in range(len(dataset))]
    means = [(metrics.total_nats / metrics.num_tokens).item() for metrics in each if metrics.num_tokens]
    totals = [sum(getattr(metrics, name).item() for metrics in each) for name in ("total_nats", "num_tokens")]
    assert totals[0] / totals[1] == pytest.approx(loss, rel=1e-12)
    assert abs(np.mean(means) - loss) > 0.01
