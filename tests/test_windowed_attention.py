"""Attention by parts equals attention at once, by every kernel; the parts of a window are what its tokens may see."""

import pytest
import torch

from lightning_llm.sequence_windows import attention, kernels
from lightning_llm.sequence_windows.attention import attention_parts
from lightning_llm.sequence_windows.kernels import ALL, CAUSAL, Scores, Visible
from lightning_llm.sequence_windows.layout import document_starts, even_edges, make_windows, window_edges

CASES = {
    "all": (ALL, 20, None),
    "causal": (CAUSAL, 7, None),
    "band": (Visible(13, 5), 20, None),
    "band wider than the past": (Visible(13, 18), 20, None),
    "soft-capped": (CAUSAL, 7, 2.0),
    "soft-capped band": (Visible(13, 5), 20, 2.0),
}


def states(num_keys, dtype=torch.float64, device="cpu", queries=7, dim=8, value_dim=None):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, seq, size):
        wide = 3 * torch.randn(2, heads, seq + 3, size, generator=generator, dtype=torch.float64)
        return wide.to(device, dtype)[:, :, 2:-1]  # a view, as of a store

    return draw(4, queries, dim), draw(2, num_keys, dim), draw(2, num_keys, value_dim or dim)


def at_once(query, key, value, scores, visible):
    """The truth: all scores, in float64, keys repeated for their group."""
    query, key, value = (x.detach().double().requires_grad_() for x in (query, key, value))
    values = query @ key.repeat_interleave(2, 1).mT * scores.scale
    if scores.softcap:
        values = scores.softcap * torch.tanh(values / scores.softcap)
    mask = visible.mask(query.shape[2], range(key.shape[2]), query.device)
    values = values if mask is None else values.masked_fill(~mask, -torch.inf)
    out = values.softmax(-1) @ value.repeat_interleave(2, 1)
    out.square().sum().backward()
    return out.detach(), values.logsumexp(-1), query.grad, key.grad, value.grad


def by_kernel(query, key, value, scores, visible):
    out, log_sum = kernels.forward(query, key, value, scores, visible)
    return out, log_sum, *kernels.backward(2 * out, query, key, value, out, log_sum, scores, visible)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_attention_with_all_scores(case, blockwise, monkeypatch):
    visible, num_keys, softcap = CASES[case]
    if blockwise:
        monkeypatch.setattr(kernels, "_fused_kind", lambda *_: None)
        monkeypatch.setattr(kernels, "_BLOCK", 6)
    scores = Scores(0.4, softcap)
    query, key, value = states(num_keys)
    for ours, truth in zip(
        by_kernel(query, key, value, scores, visible), at_once(query, key, value, scores, visible), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_values_may_have_another_size_than_keys():
    query, key, value = states(7, value_dim=5)
    scores = Scores(0.4)
    for ours, truth in zip(
        by_kernel(query, key, value, scores, CAUSAL), at_once(query, key, value, scores, CAUSAL), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_two_parts_are_joined_to_what_both_give_at_once():
    query, key, value = states(20)
    scores = Scores(0.4)
    past = kernels.forward(query, key[:, :, :13], value[:, :, :13], scores, ALL)
    own = kernels.forward(query, key[:, :, 13:], value[:, :, 13:], scores, CAUSAL)
    out, log_sum = kernels.join(*past, *own)
    truth = at_once(query, key, value, scores, Visible(13))
    torch.testing.assert_close(out, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_sum, truth[1], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("visible", [ALL, CAUSAL, Visible(64, 50)], ids=["all", "causal", "band"])
def test_on_a_gpu_kernels_are_as_good_as_bfloat16_allows(visible):
    num_keys = 64 if visible.is_causal_square else 128
    query, key, value = states(num_keys, torch.bfloat16, "cuda", queries=64, dim=64)
    scores = Scores(0.05)
    for ours, truth in zip(
        by_kernel(query, key, value, scores, visible), at_once(query, key, value, scores, visible), strict=True
    ):
        assert (ours.double() - truth).norm() / truth.norm() < 0.01


def seen(parts, length, num_queries, rows):
    mask = torch.zeros(rows, num_queries, length, dtype=torch.bool)
    for part in parts:
        block = mask[part.rows, part.queries, part.keys]
        visible = part.visible.mask(block.shape[1], range(block.shape[2]), mask.device)
        assert not block.any()  # no pair twice
        mask[part.rows, part.queries, part.keys] = True if visible is None else visible
    return mask


@pytest.mark.parametrize("sliding", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("rows", [((20,), (20,)), ((7, 1, 12), (3, 17)), ((1,) * 20, (10, 10))])
def test_parts_of_a_window_are_the_pairs_of_causal_attention_within_documents(rows, sliding):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    place = torch.arange(20)
    truth = (place[:, None] >= place) & (documents[:, :, None] == documents[:, None])
    if sliding is not None:
        truth &= place[:, None] - place < sliding
    for edges in (window_edges(20, 6), even_edges(20, 3), [0, 20]):
        for window in make_windows(edges, document_starts(positions.shape, None, positions)):
            first = 0 if sliding is None else max(0, window.begin - sliding + 1)
            parts = attention_parts(window, first, sliding)
            mask = seen(parts, window.end - first, window.end - window.begin, 2)
            assert torch.equal(mask, truth[:, window.begin : window.end, first : window.end])


@pytest.mark.parametrize("starts", [None, [[0, 7], [0]]], ids=["one document", "packed"])
def test_a_long_past_that_goes_backward_in_blocks_has_the_same_gradient(monkeypatch, starts):
    torch.manual_seed(0)
    window = make_windows([0, 20, 24], starts)[1]
    parts, scores = attention.attention_parts(window, 0, None), Scores(0.3)
    query, grad_out = (torch.randn(2, 4, 4, 8, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(2, 2, 24, 8, dtype=torch.float64) for _ in range(2))
    out, log_sum = attention.attend(query, key, value, scores, parts)
    whole = attention.attend_backward(grad_out, query, key, value, out, log_sum, scores, parts)
    sizes, backward = [], kernels.backward

    def watched(grad, query, key, *rest):
        sizes.append(key.shape[2])
        return backward(grad, query, key, *rest)

    monkeypatch.setattr(kernels, "backward", watched)
    monkeypatch.setattr(attention, "_BACKWARD_KEYS", 3)
    in_blocks = attention.attend_backward(grad_out, query, key, value, out, log_sum, scores, parts)
    assert max(sizes) <= 4  # the window's own keys are not cut
    assert sum(sizes) == sum(part.keys.stop - part.keys.start for part in parts)
    for found, expected in zip(in_blocks, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
