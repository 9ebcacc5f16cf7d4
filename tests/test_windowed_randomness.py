"""Dropout: the second pass draws what the first one drew, and the generator ends where the first pass left it."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from windowed_models import batch_of, build, full_float64, gradients, windowed, worst_error

from lightning_llm.loss import shift_labels
from lightning_llm.sequence_windows import cache, passes
from lightning_llm.sequence_windows.head import Head
from lightning_llm.sequence_windows.layout import make_windows, window_edges
from lightning_llm.sequence_windows.passes import Passes, Sequence
from lightning_llm.sequence_windows.random_states import RandomState
from lightning_llm.windowed import windowed_loss

EXACT = 1e-12
WINDOW = 8
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "llama": {"attention_dropout": 0.2},
    "gemma2": {"attention_dropout": 0.2},
}


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    full_float64(monkeypatch)


class KeepGraph:
    """In place of the store: past keys and values with their graph, as in one ordinary backward through all windows."""

    @staticmethod
    def apply(new, store, first, begin, is_writing):
        store.parts = [*getattr(store, "parts", []), new]
        return torch.cat(store.parts, 2)[:, :, first:]


def through_one_graph(model, ids, labels, monkeypatch):
    """The truth: the same windows and draws, no second pass."""
    model.zero_grad()
    windows = make_windows(window_edges(ids.shape[1], WINDOW), None)
    sequence = Sequence(ids, shift_labels(labels), torch.arange(ids.shape[1])[None], windows)
    head = Head(model, "chunked", per_token=False)
    run = Passes(model, sequence, head, keep=len(windows), parameters={})
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_SeenStates", KeepGraph)
        run.forward(with_graph=True, with_loss=True)
        loss = sum(run._kept.values()) / (sequence.targets != -100).sum()
        loss.backward()
    return loss.item(), gradients(model), torch.get_rng_state()


@pytest.mark.parametrize("family", DROPOUT)
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_dropout_is_replayed(family, when, monkeypatch):
    model = build(family, **DROPOUT[family])
    ids, labels = batch_of()
    torch.manual_seed(7)
    truth_loss, truth, state = through_one_graph(model, ids, labels, monkeypatch)
    for keep in (0, 1, 5):
        torch.manual_seed(7)
        loss, grads = windowed(model, ids, labels, window=WINDOW, keep=keep, when=when)
        assert loss == pytest.approx(truth_loss, rel=EXACT)
        assert worst_error(grads, truth) < EXACT
        assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(RandomState, "replayed", lambda self: nullcontext())  # a control
    assert worst_error(windowed(model, ids, labels, window=WINDOW, keep=0, when=when)[1], truth) > 0.1


def test_both_passes_have_bitwise_the_same_losses_with_dropout(monkeypatch):
    model = build("gpt2", torch.float32, **DROPOUT["gpt2"])
    ids, labels = batch_of()
    seen = []
    backward = passes.Passes.backward
    monkeypatch.setattr(passes.Passes, "backward", lambda self, grad: seen.append(backward(self, grad)) or seen[-1])
    loss = windowed_loss(model, ids, labels, window=WINDOW, keep=0, when="backward").total
    loss.backward()
    assert torch.equal(torch.stack(seen[0]).sum(), loss.detach())


def test_draws_are_those_of_the_windows_run_one_after_the_other():
    """Outside attention, whose weights are drawn in blocks, as transformers' own cache would have it."""
    model = build("gpt2", resid_pdrop=0.2, embd_pdrop=0.2)
    ids, labels = batch_of()
    targets = shift_labels(labels)
    torch.manual_seed(7)
    past, total = DynamicCache(), 0.0
    for begin in range(0, ids.shape[1], WINDOW):
        place = slice(begin, begin + WINDOW)
        logits = model(input_ids=ids[:, place], past_key_values=past, use_cache=True).logits
        total = total + F.cross_entropy(logits.flatten(0, 1), targets[:, place].flatten(), reduction="sum")
    model.zero_grad()
    (total / (targets != -100).sum()).backward()
    truth, state = gradients(model), torch.get_rng_state()
    torch.manual_seed(7)
    _, grads = windowed(model, ids, labels, window=WINDOW)
    assert worst_error(grads, truth) < EXACT
    assert torch.equal(torch.get_rng_state(), state)
