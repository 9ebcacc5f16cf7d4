"""Two ranks that share one model's shards, with rows of different lengths: as many windows on each."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from windowed_models import batch_of, build, uncut, worst_error

from lightning_llm.loss import token_nll
from lightning_llm.sharding import shard_layers
from lightning_llm.windowed import windowed_loss, windowed_nll

LENGTHS = (37, 3)  # of rank 0 and rank 1: 10 windows of 4 tokens, for which the other's row is too short


def sharded(mesh):
    model = build("llama")
    shard_layers(model, mesh)
    return model


def whole(model):
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def all_errors(rank: int) -> dict[str, dict[str, float]]:
    mesh = init_device_mesh("cpu", (2,))
    ids, labels = batch_of(rows=2, length=LENGTHS[rank], seed=rank)
    labels[:, -1] = ids[:, -1]
    plain = build("llama")
    nll = token_nll(plain(input_ids=ids).logits, labels).detach()
    mine = uncut(plain, ids, labels)[1]
    truth = {}
    for name, grad in mine.items():
        truth[name] = grad.clone()
        dist.all_reduce(truth[name])
        truth[name] /= 2
    reduced = 0
    reduce_scatter = dist.reduce_scatter_single

    def count(*args, **kwargs):
        nonlocal reduced
        reduced += 1
        return reduce_scatter(*args, **kwargs)

    dist.reduce_scatter_single = count
    errors, reductions = {}, {}
    model = sharded(mesh)
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    reductions["plain"] = reduced
    for keep in (0, 1, 3):
        for steps in (1, 2):  # the second accumulates
            model, reduced = sharded(mesh), 0
            for _ in range(steps):
                windowed_loss(model, ids, labels, window=4, keep=keep).mean.backward()
            reductions[f"keep {keep}, {steps} micro-batches"] = reduced / steps
            grads = {name: grad / steps for name, grad in whole(model).items()}
            errors[f"keep {keep}, {steps} micro-batches"] = worst_error(grads, truth)
    model = sharded(mesh)
    ours = windowed_nll(model, ids, labels, window=4)
    errors["nll"] = float((ours - nll).detach().abs().max())
    with torch.no_grad():
        errors["nll without gradients"] = float((windowed_nll(model, ids, labels, window=4) - nll).abs().max())
    return {"errors": errors, "reductions": reductions}
