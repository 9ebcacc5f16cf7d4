"""The bare loop that prunes by magnitude, which MagnitudePruning is held against; nothing of it is the callback's."""

import torch
from support import pad_rows
from token_training import Module, rows, weights
from torch import nn

GLOBAL_BATCH, EPOCHS = 16, 4  # 44 rows: 3 optimizer steps an epoch
FINAL, BEGIN, END, EVERY = 0.6, 2, 9, 2
PRUNING = {"sparsity": FINAL, "begin": f"{BEGIN} steps", "end": f"{END} steps", "every_n_steps": EVERY}


def matrices(module):
    """Of GPT-2's blocks: neither the embeddings nor the head that is tied to them."""
    named = module.named_parameters()
    return {name: p for name, p in named if p.ndim == 2 and "wte" not in name and "wpe" not in name}


def prune_by_sorting(tensors, pruned, share, scope="layer"):
    """Sort all magnitudes, take the first ones; those that are out already come before all others."""
    groups = [list(tensors)] if scope == "global" else [[name] for name in tensors]
    for group in groups:
        magnitude = torch.cat([tensors[n].detach().abs().masked_fill(pruned[n], -1.0).flatten() for n in group])
        mask = torch.zeros_like(magnitude, dtype=torch.bool)
        mask[magnitude.argsort(stable=True)[: round(share * len(mask))]] = True
        for name, part in zip(group, mask.split([tensors[n].numel() for n in group]), strict=True):
            pruned[name] = part.view_as(tensors[name])


def bare_loop(config, optimizer="adamw", clip=None, clip_value=None, scope="layer", epochs=EPOCHS, **broken):
    """Whole batches; returns the weights, and which are pruned. ``broken`` leaves a part out, for controls."""
    module, data = Module(config, optimizer), rows()
    stepper, tensors = module.configure_optimizers(), matrices(module)
    pruned = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in tensors.items()}
    wanted, step = 0.0, 0
    for _ in range(epochs):
        for begin in range(0, len(data), GLOBAL_BATCH):
            stepper.zero_grad()
            module.training_step(pad_rows(data[begin : begin + GLOBAL_BATCH]), 0)["loss"].backward()
            for name, p in tensors.items() if not broken.get("dense_gradients") else ():
                p.grad[pruned[name]] = 0.0
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            if clip_value:
                nn.utils.clip_grad_value_(module.parameters(), clip_value)
            stepper.step()
            step += 1
            done = min(max((step - BEGIN) / (END - BEGIN), 0.0), 1.0)
            share = FINAL - FINAL * (1 - done) ** 3
            if (step % EVERY == 0 or step == END) and share > wanted:
                wanted = share
                prune_by_sorting(tensors, pruned, share, scope)
            for name, p in tensors.items() if not broken.get("revive") else ():
                p.data[pruned[name]] = 0.0
    return weights(module), pruned
