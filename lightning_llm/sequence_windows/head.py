"""The loss at a model's head: from hidden states without logits in memory, from logits, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_llm.chunked_loss import chunked_cross_entropy, chunked_token_nll
from lightning_llm.head_loss import call_head, known_logit_map
from lightning_llm.logit_tiles import LogitMap
from lightning_llm.loss import IGNORE_INDEX
from lightning_llm.sequence_windows.random_states import RandomState


class HeadLoss(Protocol):
    """A loss of hidden states, in place of cross-entropy."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, logits: LogitMap
    ) -> Tensor:
        """Compute a window's loss, differentiable in ``hidden``, ``weight`` and ``bias``.

        Args:
            hidden: (batch, window, dim).
            weight: (vocab, dim).
            targets: (batch, window) int64: what each position predicts, -100 for nothing. Already shifted.
            bias: (vocab,) or None.
            logits: What the model does to the head's output.

        Returns:
            Nats: summed over the targets, shape (), for :func:`~lightning_llm.windowed.windowed_loss`; for each
            position, shape (batch, window), for :func:`~lightning_llm.windowed.windowed_nll`.
        """


WindowLoss = Literal["chunked", "plain"] | HeadLoss


class Head:
    """Runs a model on a window and computes the loss.

    Args:
        model: With ``get_output_embeddings``.
        kernel: ``chunked``, without logits in memory where the model allows; ``plain``, from logits; or a loss.
        per_token: Whether a window's loss is (batch, window) or its sum.

    Raises:
        ValueError: For an unknown kernel.
    """

    def __init__(self, model: nn.Module, kernel: WindowLoss, *, per_token: bool) -> None:
        if not callable(kernel) and kernel not in ("chunked", "plain"):
            raise ValueError(f"`loss_kernel` must be 'chunked', 'plain' or a function, but got {kernel!r}.")
        self._kernel = kernel
        self._per_token = per_token
        find: Any = model.get_output_embeddings
        self._module: Any = find()

    def measure(self, model: nn.Module, input_ids: Tensor) -> None:
        """Find out once, with a few tokens and the model's own attention, what it does to its head's output."""
        if self._kernel == "plain" or known_logit_map(self._module) is not None:
            return
        with torch.no_grad(), RandomState(input_ids.device).replayed():
            inputs = {"input_ids": input_ids[:1, :8], "use_cache": False}
            is_possible = call_head(model, inputs, lambda hidden, *_: hidden[..., :1]) is not None
        if not is_possible and callable(self._kernel):
            raise ValueError("`loss_kernel` is a function of hidden states, which this model's head does not allow.")

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        """Run the model on a window, and return the loss of its targets (batch, window)."""
        loss = None if self._kernel == "plain" else call_head(model, inputs, self._of_head(targets))
        if loss is None:
            return _logits_nll(model(**inputs).logits, targets, "none" if self._per_token else "sum")
        shape = targets.shape if self._per_token else torch.Size()
        if loss.shape != shape:
            raise ValueError(f"`loss_kernel` must return shape {tuple(shape)} here, but got {tuple(loss.shape)}.")
        return loss

    def skip(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Run the model on a window without its head."""
        self._module.forward = lambda hidden: hidden[..., :1]
        try:
            model(**inputs)
        finally:
            del self._module.forward

    def _of_head(self, targets: Tensor) -> Any:
        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: LogitMap) -> Tensor:
            if callable(self._kernel):
                return self._kernel(hidden, weight, targets, bias=bias, logits=logits)
            # One more token at the end, and labels one place later, which the loss moves back.
            hidden, labels = F.pad(hidden, (0, 0, 0, 1)), F.pad(targets, (1, 0), value=IGNORE_INDEX)
            options: Any = {"bias": bias, "softcap": logits.softcap, "logit_scale": logits.scale}
            if self._per_token:
                return chunked_token_nll(hidden, weight, labels, **options)[:, :-1]
            return chunked_cross_entropy(hidden, weight, labels, **options).total

        return loss


class Aliased(nn.Module):
    """A model that runs with other tensors in its parameters' place.

    Args:
        model: Stays as it is.
        parameters: By name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        taken_by = {parameter: parameters[name] for name, parameter in model.named_parameters() if name in parameters}
        # Each place once, under one name: of a module with two names (peft's trained tokens, where embedding and head
        # are tied) functional_call would put back what it had put in itself.
        places = {
            f"{prefix}.{name}" if prefix else name: taken_by[parameter]
            for prefix, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter in taken_by
        }
        self._call = (model, places)  # in a tuple: no submodule

    def get_base_model(self) -> Any:
        """The transformers model itself."""
        return base_model(self._call[0])

    def forward(self, **inputs: Any) -> Any:
        """Call the model."""
        return functional_call(*self._call, (), inputs, tie_weights=False)


def base_model(model: nn.Module) -> Any:
    """The transformers model itself, where peft has wrapped it."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _logits_nll(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Negative log-likelihood of shifted targets, 0 where there is none; float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses
