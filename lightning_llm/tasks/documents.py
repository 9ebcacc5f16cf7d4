"""One decision for a document of several windows: their vectors are pooled before the classifier's last layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_llm.head_loss import head_as, unwrapped
from lightning_llm.pooling import WindowAttention, pool_windows
from lightning_llm.pretrained import weights_beside

WindowPooling = Literal["mean", "token_mean", "max", "first", "attention"]

ATTENTION = "window_attention"  # its place in the model, and so in checkpoints and exported folders


def check_pooling(how: str | None) -> None:
    """Refuse an unknown way.

    Raises:
        ValueError: Naming those that there are.
    """
    if how is not None and how not in get_args(WindowPooling):
        raise ValueError(f"`pooling` must be one of {', '.join(get_args(WindowPooling))}, but got {how!r}.")


def check_documents(batch: Mapping[str, Any]) -> None:
    """Refuse a batch whose documents are not whole; looked at on the host only.

    Raises:
        ValueError: If its windows do not stand in the order of their documents, or a document has none.
    """
    ids = batch.get("document_ids")
    if not isinstance(ids, Tensor) or ids.device.type != "cpu":
        return
    number = num_documents(batch)
    steps = ids.diff(prepend=ids.new_full((1,), -1))
    is_whole = ids.ndim == 1 and bool(((steps == 0) | (steps == 1)).all()) and int(ids[-1]) + 1 == number
    if not is_whole:
        raise ValueError(
            f"`document_ids` say of each window which of the batch's {number} documents it is of: 0, 0, 1, ..., every "
            f"document with one window at least, in order. Got {ids.flatten().tolist()[:12]}. `collate_documents` "
            f"makes such batches."
        )


def num_documents(batch: Mapping[str, Any]) -> int:
    """Documents of a batch, from what it has for each of them; a device is waited for only if there is nothing."""
    for name in ("labels", "row_ids"):
        if isinstance(batch.get(name), Tensor):
            return len(batch[name])
    return int(batch["document_ids"][-1]) + 1


def attach_attention(model: nn.Module, num_labels: int, source: Any = None) -> None:
    """Give a classifier the weights of its attention over windows: a part of it, so that they are trained and saved.

    Args:
        model: A transformers classifier.
        num_labels: Outputs of its last layer.
        source: The folder that it was loaded from, whose attention it then has; None for a new one.

    Raises:
        ValueError: If it is in an adapter, which would be saved without them.
    """
    if hasattr(model, ATTENTION):
        return
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "pooling='attention' has weights beside the model's, and a saved adapter would not hold them. Use 'mean', "
            "'token_mean' or 'max', or train without an adapter."
        )
    last = last_layer(model, num_labels)
    attention = WindowAttention(last.in_features).to(last.weight.dtype)
    saved = weights_beside(source, f"{ATTENTION}.") if source is not None else {}
    if saved:
        attention.load_state_dict(saved)
    model.add_module(ATTENTION, attention)


def pooled_logits(
    model: nn.Module,
    batch: Mapping[str, Any],
    run: Callable[[nn.Module, Mapping[str, Any]], Any],
    num_labels: int,
    how: WindowPooling,
) -> Tensor:
    """Logits of each document, (num_documents, num_labels).

    The model's last layer is left out, and what would have gone into it, a vector for each window, is pooled and goes
    into it then. So a document of one window has the model's own logits.

    Args:
        model: A transformers classifier, or one in PEFT.
        batch: ``document_ids`` (num_windows,); without them each row is a document. ``new_token_mask`` (num_windows,
            seq) for ``token_mean``.
        run: Calls the model.
        num_labels: Outputs of its last layer.
        how: To pool.

    Raises:
        ValueError: For a model whose logits are not what its last layer returns; or if a column is missing.
    """
    last = last_layer(model, num_labels)
    with head_as(last, _as_it_is):
        vectors: Tensor = run(model, batch).logits
    ids = batch.get("document_ids")
    if ids is None:
        ids = torch.arange(len(vectors), device=vectors.device)
    if vectors.shape != (len(ids), last.in_features):
        raise ValueError(
            f"Pooling needs a vector of {last.in_features} numbers for each of {len(ids)} windows, but "
            f"{type(unwrapped(model)).__name__} without its last layer returns {tuple(vectors.shape)}: its logits are "
            f"not what that layer makes. Use long_texts='cut'."
        )
    number = num_documents(batch) if "document_ids" in batch else len(vectors)
    if how == "attention":
        pooled: Tensor = getattr(unwrapped(model), ATTENTION)(vectors, ids, number)
    else:
        pooled = pool_windows(vectors, ids, number, how, _num_new(batch, vectors) if how == "token_mean" else None)
    logits: Tensor = last(pooled)
    return logits


def last_layer(model: nn.Module, num_labels: int) -> nn.Linear:
    """The linear layer that makes a classifier's logits.

    Raises:
        ValueError: If there is none.
    """
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == num_labels]
    if not found:
        raise ValueError(
            f"Pooling needs a classifier whose last layer is linear with {num_labels} outputs, but "
            f"{type(unwrapped(model)).__name__} has none. Use long_texts='cut'."
        )
    return found[-1]


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def _num_new(batch: Mapping[str, Any], vectors: Tensor) -> Tensor:
    """Tokens of each window that no earlier window of its document holds."""
    mask = batch.get("new_token_mask")
    if isinstance(mask, Tensor):
        return mask.sum(1)
    if "document_ids" not in batch:
        return vectors.new_ones(len(vectors))
    raise ValueError(
        f"pooling='token_mean' counts a document's tokens by `new_token_mask` (num_windows, seq), but got the keys "
        f"{sorted(batch)}. `collate_documents` makes it; 'mean' needs none."
    )
