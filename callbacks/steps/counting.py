"""What a batch holds: rows, and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_llm.loss import IGNORE_INDEX


def num_samples(batch: Any) -> int:
    """Rows of a batch: the first dimension of the first tensor in it; of windows with ``document_ids``, documents.

    Raises:
        TypeError: If there is no tensor in it.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, Mapping) and isinstance(batch.get("document_ids"), Tensor):
        of_documents = (batch.get(name) for name in ("labels", "row_ids"))
        return next((len(value) for value in of_documents if isinstance(value, Tensor)), len(batch["document_ids"]))
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for value in values:
        try:
            return num_samples(value)
        except TypeError:
            continue
    raise TypeError(f"Cannot count the rows of a {type(batch).__name__} without a tensor. Pass a function that does.")


def num_targets(module: Any, batch: Any, token_fn: Callable[[Any], Any] | None = None) -> Any:
    """Targets of a batch, a number or a tensor of shape ().

    Args:
        module: The LightningModule; it counts if it has ``num_targets(batch)``, as ``LLMModule`` has for each task.
        batch: What ``training_step`` takes.
        token_fn: Counts in place of it. Without either, :func:`num_label_tokens` does.
    """
    return (token_fn or getattr(module, "num_targets", None) or num_label_tokens)(batch)


def num_label_tokens(batch: Any) -> Tensor:
    """Label tokens of a Hugging Face batch for a causal language model, whose rows' first tokens are no targets.

    Args:
        batch: A mapping with unshifted ``labels`` (batch, seq), -100 where there is no target.

    Returns:
        Tensor of shape (), on the batch's device.

    Raises:
        TypeError: If the batch is of another kind.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        kind = type(batch).__name__ if labels is None else f"labels of shape {tuple(getattr(labels, 'shape', ()))}"
        raise TypeError(
            f"Label tokens are counted in mappings with a tensor `labels` (batch, seq), but got {kind}. Pass "
            f"token_fn=lambda batch: ..., or count sequences instead."
        )
    return (labels[..., 1:] != IGNORE_INDEX).sum()
