"""Padding, packed documents, labels and losses per token: as in the uncut sequence."""

import pytest
import torch
import torch.nn.functional as F
from windowed_models import FAMILIES, batch_of, build, full_float64, gradients, uncut, windowed, worst_error

from lightning_llm.isolation import PackingLeakError
from lightning_llm.loss import shift_labels, token_cross_entropy, token_nll
from lightning_llm.windowed import windowed_loss, windowed_nll

EXACT = 1e-12
DOCUMENTS = ((13, 1, 23), (20, 9, 8))  # 37 tokens in each row


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    full_float64(monkeypatch)


def positions_of(rows=DOCUMENTS):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_stay_apart(family):
    model = build(family)
    ids, labels = batch_of()
    positions = positions_of()
    labels[positions == 0] = -100
    model.zero_grad()
    total, count = 0.0, 0
    for row, lengths in enumerate(DOCUMENTS):  # the truth: each document by itself
        edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            loss = token_cross_entropy(model(input_ids=ids[row, None, begin:end]).logits, labels[row, None, begin:end])
            total, count = total + loss.total, count + loss.num_tokens
    (total / count).backward()
    truth = gradients(model)
    for window, keep in ((16, 1), (7, 0), (10, 9)):
        loss, grads = windowed(model, ids, labels, window=window, keep=keep, position_ids=positions)
        assert loss == pytest.approx((total / count).item(), rel=EXACT)
        assert worst_error(grads, truth) < EXACT
    leaking = windowed(model, ids, labels, window=16)[1]  # a control: one document a row
    assert worst_error(leaking, truth) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_seen(family, side):
    model = build(family)
    ids, labels = batch_of()
    mask = torch.ones_like(ids)
    padding = slice(30, None) if side == "right" else slice(0, 12)
    mask[1, padding], labels[1, padding] = 0, -100
    labels[1, padding.stop or 0] = -100  # the first token of a row is no target
    positions = None if side == "right" else (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask} if positions is None else {"attention_mask": mask, "position_ids": positions}
    _, truth = uncut(model, ids, labels, **inputs)
    for window in (16, 5):
        assert worst_error(windowed(model, ids, labels, window=window, **inputs)[1], truth) < EXACT
    if side == "left":  # a control
        assert worst_error(windowed(model, ids, labels, window=16, position_ids=None)[1], truth) > 1e-3


@pytest.mark.parametrize("where", [slice(0, 5), slice(30, 37), slice(0, 0)])
def test_windows_without_a_label_token_count_for_nothing_but_pass_gradients_on(where):
    model = build("llama")
    ids, labels = batch_of()
    kept = labels.new_full(labels.shape, -100)
    kept[:, where] = ids[:, where]
    loss = windowed_loss(model, ids, kept, window=8)
    assert loss.num_tokens == (shift_labels(kept) != -100).sum()
    _, truth = uncut(model, ids, kept)
    _, grads = windowed(model, ids, kept, window=8)
    if where.stop:
        assert worst_error(grads, truth) < EXACT
    else:
        assert all(grad.abs().max() == 0 for grad in grads.values())


def preference_loss(nll, beta=0.1):
    """A loss of whole sequences that is not linear in the tokens' losses, as in direct preference optimisation."""
    log_p = -nll.sum(1)
    return -F.logsigmoid(beta * (log_p[:2] - log_p[2:])).mean() + 0.01 * nll.square().mean()


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_any_loss_can_be_built_on_losses_per_token(keep):
    model = build("llama")
    ids, labels = batch_of(rows=4)
    model.zero_grad()
    nll = token_nll(model(input_ids=ids).logits, labels)
    preference_loss(nll).backward()
    truth = gradients(model)
    model.zero_grad()
    ours = windowed_nll(model, ids, labels, window=8, keep=keep)
    torch.testing.assert_close(ours, nll, rtol=EXACT, atol=EXACT)
    preference_loss(ours).backward()
    assert worst_error(gradients(model), truth) < EXACT


def test_evaluation_without_gradients_gives_the_loss_and_keeps_no_graph():
    model = build("qwen3").eval()
    ids, labels = batch_of()
    with torch.no_grad():
        truth = token_cross_entropy(model(input_ids=ids).logits, labels)
        loss = windowed_loss(model, ids, labels, window=8)
        nll = windowed_nll(model, ids, labels, window=8)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, truth.total, rtol=EXACT, atol=0)
    torch.testing.assert_close(nll.sum(), truth.total, rtol=EXACT, atol=0)


def hidden_loss(hidden, weight, targets, *, bias, logits):
    values = F.linear(hidden, weight, bias) * logits.scale
    values = values if logits.softcap is None else logits.softcap * torch.tanh(values / logits.softcap)
    return F.cross_entropy(values.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("kernel", ["plain", hidden_loss], ids=["plain", "function"])
def test_the_loss_at_the_head_may_be_made_from_logits_or_by_a_function(family, when, kernel):
    model = build(family)
    ids, labels = batch_of()
    truth_loss, truth = uncut(model, ids, labels)
    loss, grads = windowed(model, ids, labels, window=8, when=when, loss_kernel=kernel)
    assert loss == pytest.approx(truth_loss, rel=EXACT)
    assert worst_error(grads, truth) < EXACT
    assert "forward" not in vars(model.get_output_embeddings())  # the head is itself again


def test_by_default_there_are_no_logits(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: seen.append(w.shape) or linear(x, w, b))
    model = build("llama", vocab_size=101)
    ids, labels = batch_of()
    for options in ({"when": "forward"}, {"when": "backward"}, {"loss_kernel": "plain"}):
        seen.clear()
        windowed(model, ids, labels, window=8, **options)
        assert ((101, 32) in seen) is ("loss_kernel" in options)


def test_wrong_inputs_are_refused_with_what_was_expected():
    model = build("llama")
    ids, labels = batch_of()
    with pytest.raises(ValueError, match=r"`labels` must have the shape of `input_ids`, \(2, 37\)"):
        windowed_loss(model, ids, labels[:, 1:], window=8)
    with pytest.raises(ValueError, match="`window` must be a number of tokens, at least 1, but got 0"):
        windowed_loss(model, ids, labels, window=0)
    with pytest.raises(ValueError, match="`when` must be 'forward' or 'backward'"):
        windowed_loss(model, ids, labels, window=8, when="later")
    with pytest.raises(ValueError, match="`keep` must be a number of windows"):
        windowed_loss(model, ids, labels, window=8, keep=-1)
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="padding between the tokens of a row"):
        windowed_loss(model, ids, labels, window=8, attention_mask=mask)
    with pytest.raises(ValueError, match="Masks over pairs of tokens"):
        windowed_loss(model, ids, labels, window=8, attention_mask=torch.ones(2, 1, 37, 37))
    with pytest.raises(PackingLeakError, match="restart within a row"):
        windowed_loss(model, ids, labels, window=8, attention_mask=torch.ones_like(ids), position_ids=positions_of())
    with pytest.raises(ValueError, match="`position_ids` must have shape"):
        windowed_loss(model, ids, labels, window=8, position_ids=positions_of()[:, 1:])
    with pytest.raises(ValueError, match=r"`loss_kernel` must return shape \(\)"):
        windowed_loss(model, ids, labels, window=8, loss_kernel=lambda hidden, weight, targets, **_: hidden.sum(-1))


def test_a_second_backward_is_refused():
    model = build("llama")
    ids, labels = batch_of()
    for when in ("forward", "backward"):
        loss = windowed_loss(model, ids, labels, window=8, when=when).mean
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
