"""Saved tensors in host memory: bitwise the same gradient, and only what is not needed elsewhere is moved."""

import gc

import pytest
import torch
from support import TINY_GPT2
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from windowed_models import batch_of, build, gradients

from lightning_llm import ActivationOffload, LLMModule
from lightning_llm.loss import token_cross_entropy


def step(model, offload=None):
    """Gradients of one step."""
    ids, labels = batch_of()
    model.zero_grad()
    with offload or torch.enable_grad():
        loss = token_cross_entropy(model(input_ids=ids, use_cache=False).logits, labels).mean
    loss.backward()
    return gradients(model)


def same(found, truth):
    return all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2"])
def test_offloaded_activations_give_bitwise_the_same_gradient(family, checkpointed):
    model = build(family)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    truth = step(model)
    sizes = []
    for min_bytes in (0, 4096, 2**20):
        offload = ActivationOffload(model, min_bytes=min_bytes)
        assert same(step(model, offload), truth)
        assert same(step(model, offload), truth)  # it can be entered again
        sizes.append(offload.num_bytes)
    assert sizes[0] > sizes[1] > sizes[2] == 0


def test_with_autocast_and_a_second_derivative_it_is_the_same():
    model = build("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        truth = step(model)
        assert same(step(model, ActivationOffload(model, min_bytes=0)), truth)
    layer = nn.Linear(4, 4).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def second():
        (grad,) = torch.autograd.grad(layer(x).tanh().pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    expected = second()
    with ActivationOffload(layer, min_bytes=0):
        assert torch.equal(second(), expected)


def alive(storages):
    return sum(size for storage, size in storages if not storage.expired())


def test_no_saved_activation_stays_on_the_device():
    """Counted by bytes of each activation's storage that still exists when the forward is over."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))
    kept = {}
    for offloaded in (False, True):
        storages = []
        for layer in layers.modules():
            layer._forward_hooks.clear()
            layer.register_forward_hook(
                lambda _, __, out, into=storages: into.append(
                    (StorageWeakRef(out.untyped_storage()), out.untyped_storage().nbytes())
                )
            )
        offload = ActivationOffload(layers, min_bytes=0) if offloaded else torch.enable_grad()
        x = torch.randn(64, 32)
        with offload:
            loss = layers(x).sum()
        kept[offloaded] = alive(storages)
        if offloaded:
            assert offload.num_bytes == 12 * 64 * 32 * 4  # inputs of each of 12 functions, once
        loss.backward()
    assert kept[False] >= 11 * 64 * 32 * 4
    assert kept[True] == 0


def test_a_storage_that_is_saved_by_many_is_copied_once():
    layer = nn.Linear(16, 16)
    x = torch.randn(8, 16)
    with ActivationOffload(layer, min_bytes=0) as offload:
        out = layer(x).sum() + layer(x[2:]).sum() + layer(x.t().contiguous().t()[:, :]).sum() + (layer(x) * x[0]).sum()
    assert offload.num_bytes == 2 * x.nbytes  # itself, and a copy that was made
    out.backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    (layer(x).sum() + layer(x[2:]).sum() + layer(x).sum() + (layer(x) * x[0]).sum()).backward()
    torch.testing.assert_close(found, layer.weight.grad)


def test_views_with_any_strides_come_back_as_they_were():
    layer = nn.Linear(4, 4)
    base = torch.randn(6, 4, 2, requires_grad=True) * 1
    views = [base[1:, :, 1], base.transpose(0, 2)[1, :3], base[:1].expand(5, 4, 2), base[..., 0].diagonal()]
    seen = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(ctx.saved_tensors[0])
            return grad

    with ActivationOffload(layer, min_bytes=0) as offload:
        outs = [Save.apply(view) for view in views]
    assert offload.num_bytes == base.nbytes
    for out, view in zip(outs, views, strict=True):
        out.sum().backward(retain_graph=True)
        assert torch.equal(seen[-1], view)
        assert seen[-1].stride() == view.stride()


def test_parameters_buffers_their_views_and_casts_stay():
    model = nn.Linear(8, 8, bias=False)
    model.register_buffer("scale", torch.ones(8, 8))
    x = torch.randn(2, 8, requires_grad=True)
    with ActivationOffload(model, min_bytes=0) as offload:
        (x @ model.weight.t()).sum().backward()
        (x * model.scale[:2]).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            (torch.ones(2, 8, dtype=torch.bfloat16) @ model.weight).sum().backward()
    assert offload.num_bytes == 2 * 8 * 2  # the ones of the last product


@pytest.mark.parametrize("min_bytes", [0, 2**20], ids=["moved", "stays"])
def test_a_tensor_changed_in_place_never_gives_a_wrong_gradient(min_bytes):
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with ActivationOffload(layer, min_bytes=min_bytes):
        loss = layer(x).sum()
        expected = x.sum(0).expand(4, 4).clone()
        x.mul_(2)
        loss = loss + layer(x).sum()  # saved again, as it is now
        x.zero_()
    if min_bytes:
        with pytest.raises(RuntimeError, match="saved for the backward at version 1, has since been changed in place"):
            loss.backward()
    else:
        loss.backward()
        torch.testing.assert_close(layer.weight.grad, 3 * expected)


def test_checkpointed_layers_have_their_inputs_offloaded_and_nothing_more():
    layer = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    x = torch.randn(8, 16, requires_grad=True) * 1
    with ActivationOffload(layer, min_bytes=0) as offload:
        out = checkpoint(layer, x, use_reentrant=False)
    assert offload.num_bytes == x.nbytes
    source = StorageWeakRef(x.untyped_storage())
    del x
    assert source.expired()
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_graph_that_is_dropped_leaves_nothing_behind():
    model = build("llama")
    offload = ActivationOffload(model, min_bytes=0)
    ids, _ = batch_of()
    with offload:
        out = model(input_ids=ids, use_cache=False).logits.sum()
    assert len(offload._copies) > 5
    del out
    gc.collect()
    assert len(offload._copies) == 0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="has no parameters"):
        ActivationOffload(nn.GELU())
    with pytest.raises(ValueError, match="`min_bytes` must be a number of bytes, at least 0, but got -1"):
        ActivationOffload(nn.Linear(1, 1), min_bytes=-1)
    with pytest.raises(ValueError, match="`offload` must be True or False, but got 'cpu'"):
        LLMModule(TINY_GPT2, offload="cpu")


@pytest.mark.parametrize("sequence_window", [None, 5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_of_the_module_is_the_same_with_offload(quiet_trainer, sequence_window, checkpointed, monkeypatch):
    ids, labels = batch_of(length=16)
    loader = torch.utils.data.DataLoader([{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)])
    entered, windows = [], []
    enter = ActivationOffload.__enter__
    monkeypatch.setattr(ActivationOffload, "__enter__", lambda self: entered.append(self) or enter(self))
    monkeypatch.setattr(ActivationOffload.__init__, "__kwdefaults__", {"min_bytes": 0})

    def train(**options):
        torch.manual_seed(0)
        settings = {"sequence_window": sequence_window, "gradient_checkpointing": checkpointed, "warmup": 0}
        module = LLMModule(TINY_GPT2, **settings, **options)
        windows.append(module)
        quiet_trainer(precision="64-true", max_steps=2).fit(module, loader)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    plain = train()
    assert not entered
    with pytest.warns(UserWarning, match="`offload=True` has no use on a CPU"):
        moved = train(offload=True)
    if sequence_window is None:
        assert torch.equal(moved, plain)
        assert all(offload.num_bytes > 0 for offload in entered)
        assert len(entered) == 2
    else:
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-6)
        assert windows[-1].task.offload
        assert not entered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_gradient_is_bitwise_the_same_and_activations_leave_it():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(16))).cuda()
    x = torch.randn(4096, 1024, device="cuda")
    grads, after_forward = {}, {}
    for offloaded in (False, True):
        layers.zero_grad()
        before = torch.cuda.memory_allocated()
        with ActivationOffload(layers) if offloaded else torch.enable_grad():
            loss = layers(x).square().sum()
        after_forward[offloaded] = torch.cuda.memory_allocated() - before
        loss.backward()
        grads[offloaded] = gradients(layers)
        del loss
    assert same(grads[True], grads[False])
    assert after_forward[True] < 0.1 * after_forward[False]
