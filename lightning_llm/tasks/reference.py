"""The model as it was before training, to compare with: a frozen copy, or the model without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_PRIME = 2**61 - 1
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of peft's `init_lora_weights`


class Reference:
    """Keeps the weights that training begins with, out of sight of optimizer, gradients and checkpoints.

    A model of peft is its own reference, with the adapter switched off. Of any other a copy is kept. A checkpoint holds
    a fingerprint of its weights only: a resumed run builds them again, from the folder, the hub or a seed, and one
    that would go on with another reference is refused.
    """

    def __init__(self) -> None:
        self._copy: nn.Module | None = None
        self._fingerprint: int | None = None
        self._problem: str | None = None

    def keep(self, model: nn.Module, copy: Callable[[], nn.Module]) -> None:
        """Keep a model as it is now.

        Args:
            model: That is going to be trained.
            copy: Makes another one like it.

        Raises:
            ValueError: If the model's adapter changes its base too.
        """
        if hasattr(model, "disable_adapter"):
            _check_adapter(model)
        else:
            self._copy = copy().requires_grad_(False).eval()
            self._fingerprint = fingerprint(self._copy)

    @torch.no_grad()
    def run(self, model: nn.Module, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """What ``compute`` makes of the reference, in evaluation mode and without a gradient.

        Args:
            model: That is trained; the copy follows it to its device.
            compute: Is called with the reference.

        Raises:
            ValueError: If the reference is not that with which training began.
            RuntimeError: If nothing was kept.
        """
        if self._problem is not None:
            raise ValueError(self._problem)
        if self._copy is None:
            if not hasattr(model, "disable_adapter"):
                raise RuntimeError("The reference is not kept yet: the Trainer does it, or `configure_model()`.")
            adapted: Any = model
            with _evaluating(model), adapted.disable_adapter():
                return compute(model)
        _follow(self._copy, model)
        values = compute(self._copy)
        if isinstance(self._copy, FSDPModule):
            self._copy.reshard()  # no backward comes that would
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to agree with."""
        return {} if self._fingerprint is None else {"reference": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare; a difference is said when the reference is needed, as one may load weights just to use them."""
        known = state.get("reference")
        if known is not None and self._copy is not None and known != self._fingerprint:
            self._problem = (
                "The reference model is not the one with which training began: its weights, built anew, have another "
                "fingerprint than the checkpoint says. Give LLMModule the same `model` (folder, hub id, or random "
                "weights by the same seed) and the Trainer the same `precision`; a module that load_from_checkpoint "
                "made needs it too: LLMModule.load_from_checkpoint(path, model=...)."
            )


@torch.no_grad()
def fingerprint(model: nn.Module) -> int:
    """A number that depends on every bit of a model's weights, however many ranks share them.

    Args:
        model: Whole, or sharded (all ranks take part).

    Example:
        >>> ones = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(ones.weight)
        >>> fingerprint(ones)  # two float32 of bits 0x3F800000
        2130706432
    """
    total = 0
    for number, parameter in enumerate(model.parameters(), 1):
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
        if type(values) not in (Tensor, nn.Parameter):
            continue  # quantized: its layers say themselves what they hold
        bits = values.contiguous().flatten().view(_BITS[values.dtype.itemsize]).sum(dtype=torch.int64)
        if isinstance(parameter, DTensor):
            for group in parameter.device_mesh.get_all_groups():
                dist.all_reduce(bits, group=group)
        total = (total + number * int(bits)) % _PRIME
    return total


def _follow(copy: nn.Module, model: nn.Module) -> None:
    """Take the copy to the device and the type of the model's parameters; buffers stay as precise as they are."""
    mine, theirs = next(copy.parameters()), next(model.parameters())
    if mine.device != theirs.device:
        copy.to(theirs.device)
    if mine.dtype != theirs.dtype:  # a built model that the Trainer has cast
        for own, other in zip(copy.parameters(), model.parameters(), strict=True):
            own.data = own.data.to(other.dtype)


def _check_adapter(model: Any) -> None:
    """Without an adapter that trains or has replaced weights of its base, a model is not what it was before."""
    with model.disable_adapter():
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [name for name in trained if not name.startswith("prompt_encoder.")]
    starts = [str(getattr(config, "init_lora_weights", "")).lower() for config in model.peft_config.values()]
    moved = [start for start in starts if start.startswith(CHANGES_BASE)]
    if trained or moved:
        reason = (
            f"weights of the base train as well, such as {trained[0]} (bias='none' leaves its biases as they are)"
            if trained
            else f"init_lora_weights={moved[0]!r} takes a part of the base's weights into the adapter"
        )
        raise ValueError(
            f"The reference of a model with an adapter is the model without it, but {reason}. Change that, or pass the "
            f"original model's log-probabilities in the batches: task_options={{'reference': 'batch'}}."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; each part goes back to the mode it was in."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
