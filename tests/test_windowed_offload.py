"""Keys, values and their gradients in host memory: the same gradient, with the past of two layers on the device."""

import gc

import peft
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from windowed_models import batch_of, build, full_float64, to_dtype, total_error, uncut, windowed, worst_error

from lightning_llm.loss import token_nll
from lightning_llm.sequence_windows import attention, cache, offload
from lightning_llm.windowed import windowed_loss, windowed_nll

EXACT = 1e-12


@pytest.fixture
def float64_throughout(monkeypatch):
    full_float64(monkeypatch)


def packed(lengths=((17, 4, 16), (5, 30, 2))):
    ids, labels = batch_of()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return ids, labels.masked_fill(positions == 0, -100), positions


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "llama_mqa", "gpt2", "mistral", "gemma2", "gemma3"])
def test_offloaded_windows_have_the_same_gradient(family, checkpointed, float64_throughout):
    model = build(family)
    ids, labels = batch_of()
    truth_loss, truth = uncut(model, ids, labels)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for window, keep, when in ((16, 1, "forward"), (7, 0, "backward"), (11, 2, "forward"), (3, 1, "backward")):
        loss, grads = windowed(model, ids, labels, window=window, keep=keep, when=when, offload=True)
        assert loss == pytest.approx(truth_loss, rel=EXACT)
        assert worst_error(grads, truth) < EXACT, (window, keep, when)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_go_to_host_memory_in_chunks_of_any_size(family, float64_throughout, monkeypatch):
    model = build(family)
    ids, labels = batch_of()
    _, truth = uncut(model, ids, labels)
    for chunk_bytes in (1, 2 * 2 * 8 * 8 * 3, 2**20):  # one position, three, all
        monkeypatch.setattr(offload, "_CHUNK_BYTES", chunk_bytes)
        for window in (5, 8):
            assert worst_error(windowed(model, ids, labels, window=window, offload=True)[1], truth) < EXACT


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_have_the_same_gradient(family, offloaded, float64_throughout):
    model = build(family)
    ids, labels, positions = packed()
    model.config._attn_implementation = "eager"
    truth = uncut(model, ids, labels, position_ids=positions)[1]
    for window, keep in ((16, 1), (5, 0), (3, 2)):
        options = {"window": window, "keep": keep, "offload": offloaded, "position_ids": positions}
        assert worst_error(windowed(model, ids, labels, **options)[1], truth) < EXACT


def test_of_packed_rows_and_sliding_layers_only_what_is_seen_is_fetched(monkeypatch):
    fetched = set()
    expect = offload.DeviceCopies.expect

    def record(self, store, span):
        fetched.add(tuple(span))
        expect(self, store, span)

    monkeypatch.setattr(offload.DeviceCopies, "expect", record)
    ids, labels, positions = packed(((20, 17), (24, 13)))
    windowed(build("llama", torch.float32), ids, labels, window=8, offload=True, position_ids=positions)
    # In the window from 32 on, the earliest document in sight began at 20.
    assert fetched == {(0, 0, 8), (0, 8, 16), (0, 16, 24), (20, 24, 32), (20, 32, 37)}
    fetched.clear()
    windowed(build("mistral", torch.float32), ids, labels, window=8, offload=True)
    assert fetched == {(0, 0, 8), (0, 8, 16), (8, 16, 24), (16, 24, 32), (24, 32, 37)}


def test_losses_per_token_adapters_and_evaluation_are_the_same(float64_throughout):
    model = build("llama")
    ids, labels = batch_of()
    nll = token_nll(model(input_ids=ids, use_cache=False).logits, labels)
    torch.testing.assert_close(windowed_nll(model, ids, labels, window=8, offload=True), nll, rtol=EXACT, atol=EXACT)
    with torch.no_grad():
        torch.testing.assert_close(windowed_nll(model, ids, labels, window=8, offload=True), nll, rtol=1e-9, atol=EXACT)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = to_dtype(peft.get_peft_model(model, config), torch.float64)
    _, truth = uncut(adapted, ids, labels)
    assert worst_error(windowed(adapted, ids, labels, window=8, offload=True)[1], truth) < EXACT


def test_dropout_and_autocast_are_those_without_offload():
    ids, labels = batch_of()
    for changes in ({"attention_dropout": 0.3}, {}):
        model = build("llama", torch.float32, **changes)
        results = []
        for offloaded in (False, True):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=not changes):
                results.append(windowed(model, ids, labels, window=8, offload=offloaded)[1])
        assert total_error(*results) < 1e-6


def test_a_hybrid_model_offloads_its_attention_layers():
    model = build("lfm2", torch.float32)
    ids, labels = batch_of()
    plain, moved = (windowed(model, ids, labels, window=8, offload=offloaded)[1] for offloaded in (False, True))
    assert total_error(moved, plain) < 1e-6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_past_is_fetched_once_in_the_first_pass_and_twice_in_the_second(checkpointed, monkeypatch):
    """But for the last layer, whose backward comes right after its forward and finds it there."""
    fetched = []
    on_device = offload._on_device

    def allocate(transfers, shape, dtype):
        fetched.append(shape[0] - 8)
        return on_device(transfers, shape, dtype)

    monkeypatch.setattr(offload, "_on_device", allocate)
    model = build("llama", torch.float32, num_hidden_layers=4)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    windowed(model, *batch_of(length=40), window=8, keep=0, offload=True)
    past = 8 + 16 + 24 + 32
    assert sum(fetched) == 2 * (4 + 4 + 3) * past  # keys and values


class KeepsWhatItSaw(torch.autograd.Function):
    """The past as an input of the attention, which its graph then holds."""

    @staticmethod
    def forward(ctx, key, value, past):
        ctx.past = past
        return tuple(past.see(key, value))

    @staticmethod
    def backward(ctx, *grads):
        return *ctx.past.hand_over(list(grads), ctx.past.later()), None


class Naive:
    @staticmethod
    def apply(query, key, value, past, is_writing, scores, parts):
        if is_writing:
            past.write(key.detach(), value.detach())
        return attention._Attention.apply(query, *KeepsWhatItSaw.apply(key, value, past), scores, parts)


@pytest.fixture
def most_copies(monkeypatch):
    """The largest number of layers whose past was on the device at once, in the first pass and in the second."""
    most, present = {1: 0, -1: 0}, {"step": 1}
    seek = cache.WindowCache.seek
    storages = []
    on_device = offload._on_device

    def allocate(transfers, shape, dtype):
        tensor = on_device(transfers, shape, dtype)
        storages.append(StorageWeakRef(tensor.untyped_storage()))
        storages[:] = [storage for storage in storages if not storage.expired()]
        most[present["step"]] = max(most[present["step"]], len(storages) / 2)
        return tensor

    def stand(self, window, *, is_writing):
        seek(self, window, is_writing=is_writing)
        present["step"] = 1 if is_writing else -1

    monkeypatch.setattr(offload, "_on_device", allocate)
    monkeypatch.setattr(cache.WindowCache, "seek", stand)
    return most, storages


@pytest.mark.parametrize("naive", [False, True], ids=["fetched again", "kept in the graph"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_past_of_two_layers_at_most_is_on_the_device(most_copies, naive, checkpointed, monkeypatch):
    most, storages = most_copies
    model = build("llama", torch.float32, num_hidden_layers=6)
    ids, labels = batch_of()
    expected = windowed(model, ids, labels, window=8)[1]
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if naive:
        monkeypatch.setattr(attention, "_OffloadedAttention", Naive)
    for keep in (0, 2):
        assert total_error(windowed(model, ids, labels, window=8, keep=keep, offload=True)[1], expected) < 1e-6
    assert most[1] >= 1
    assert most[-1] >= 1
    if naive and not checkpointed:
        assert most[-1] > 5
    elif not naive:
        assert max(most.values()) <= 2
        assert not [storage for storage in storages if not storage.expired()]


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_sliding_layers_keep_gradients_for_their_span_only(family, offloaded, monkeypatch):
    sizes = {"sliding": set(), "full": set()}
    seek = cache.WindowCache.seek

    def measure(self, window, *, is_writing):
        for layer in self.windowed:
            if offloaded:
                gradients = [x.shape[0] for x in layer.store.gradients]
            else:
                stores = (layer.key_store, layer.value_store)
                gradients = [store.gradient.shape[2] for store in stores if store.gradient is not None]
            sizes["sliding" if layer.is_sliding else "full"].update(gradients)
        seek(self, window, is_writing=is_writing)

    monkeypatch.setattr(cache.WindowCache, "seek", measure)
    windowed(build(family, torch.float32), *batch_of(), window=4, keep=0, offload=offloaded)
    assert sizes["sliding"] == {8}  # the sliding window of 9 tokens, less the present one
    assert sizes["full"] == (set() if family == "mistral" else {36})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_gradient_is_the_same_and_memory_no_longer_grows_with_the_row():
    model = build("llama", torch.bfloat16, num_hidden_layers=8, num_key_value_heads=4, max_position_embeddings=65536)
    model.to("cuda")

    def peak(length, offloaded):
        ids, labels = (x.cuda() for x in batch_of(rows=1, length=length))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = windowed(model, ids, labels, window=512, keep=0, offload=offloaded)[1]
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, grads

    growth = {}
    for offloaded in (False, True):
        short, _ = peak(8192, offloaded)
        long, _ = peak(32768, offloaded)
        growth[offloaded] = long - short
    assert growth[True] < 0.6 * growth[False]  # two layers of eight, and gradients of two
    plain, moved = (peak(8192, offloaded)[1] for offloaded in (False, True))
    assert total_error(moved, plain) < 1e-2


@pytest.mark.slow
def test_ranks_with_offload_have_the_mean_of_the_uncut_gradients(run_ranks):
    for result in run_ranks("windowed_offload_ranks", 2):
        assert set(result) == {"ddp forward", "ddp backward", "fsdp"}
        assert all(error < EXACT for error in result.values()), result


@pytest.mark.parametrize("offloaded", [False, True])
def test_keys_and_values_go_with_the_call_and_not_with_the_next_garbage_collection(offloaded, monkeypatch):
    model = build("llama", torch.float32)
    ids, labels = batch_of()
    stored = []
    end = cache.WindowCache.check_used

    def note(self):
        for layer in self.windowed:
            states = layer.store.states if offloaded else [layer.key_store.states, layer.value_store.states]
            stored.extend(StorageWeakRef(x.untyped_storage()) for x in states)
        end(self)

    monkeypatch.setattr(cache.WindowCache, "check_used", note)
    gc.collect()
    gc.disable()
    try:
        for when in ("forward", "backward"):
            windowed(model, ids, labels, window=8, when=when, offload=offloaded)
        with torch.no_grad():
            windowed_loss(model, ids, labels, window=8, offload=offloaded)
        assert stored
        assert all(storage.expired() for storage in stored)
    finally:
        gc.enable()


def test_without_gradients_nothing_is_kept_for_a_backward():
    model = build("llama", torch.float32)
    ids, labels = batch_of()
    with torch.no_grad():
        assert not windowed_loss(model, ids, labels, window=8, offload=True).total.requires_grad
