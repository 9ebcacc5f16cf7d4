"""One vector for each row: how tokens are pooled, and what sentence-transformers' folders say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from lightning_llm.loss import accumulation_dtype

Pooling = Literal["mean", "cls", "max", "last"]

_MODES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}  # sentence-transformers' names
_KEYS = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last": "lasttoken"}
_PACKAGE = "sentence_transformers.models"


class Pooled(NamedTuple):
    """How a model's folder makes embeddings: pooling, and whether they have length 1."""

    pooling: Pooling
    normalize: bool


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """A vector for each row.

    Args:
        hidden: (rows, seq, dim); half types are summed in float32.
        mask: (rows, seq), 1 for tokens and 0 for padding at either end; None for no padding.
        pooling: Of all tokens the ``mean`` or the ``max``imum of each component; the first token (``cls``) or the
            ``last``.

    Returns:
        (rows, dim).

    Example:
        >>> hidden, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
        >>> [pool(hidden, mask, pooling).item() for pooling in ("mean", "cls", "max", "last")]
        [2.0, 1.0, 3.0, 3.0]
    """
    hidden = accumulation_dtype(hidden)
    is_token = torch.ones_like(hidden[..., 0], dtype=torch.bool) if mask is None else mask != 0
    if pooling == "mean":
        weights = is_token.to(hidden)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if pooling == "max":
        return hidden.masked_fill(~is_token[..., None], -torch.inf).amax(1)
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) * is_token
    place = is_token.int().argmax(1) if pooling == "cls" else places.argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def read_pooling(model: str) -> Pooled | None:
    """What a sentence-transformers folder, or such a repository of the hub, says; None if it is none.

    Args:
        model: Folder or hub id.

    Raises:
        ValueError: For what is not computed here: several poolings at once, weighted ones, layers behind the pooling.
    """
    modules = _read_json(model, "modules.json")
    if not isinstance(modules, list):
        return None
    types = [str(module["type"]).rpartition(".")[2] for module in modules]
    if unknown := [name for name in types if name not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(
            f"{model} makes embeddings with {', '.join(unknown)} behind the model, which is not trained here. Pass "
            f"task_options={{'pooling': ...}} to train the model without it."
        )
    path = next((module["path"] for module, name in zip(modules, types, strict=True) if name == "Pooling"), None)
    settings = _read_json(model, f"{path}/config.json") if path else {}
    mode = settings.get("pooling_mode") if isinstance(settings, dict) else None
    if mode is None and isinstance(settings, dict):
        own = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
        chosen = [k.removeprefix("pooling_mode_") for k, on in settings.items() if k.startswith("pooling_mode_") and on]
        mode = own.get(chosen[0], chosen[0]) if len(chosen) == 1 else chosen or "mean"
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(
            f"{model} pools by {mode!r}, which is not computed here. Pass task_options={{'pooling': ...}}, one of "
            f"{', '.join(get_args(Pooling))}."
        )
    known: Any = _MODES[mode]
    return Pooled(known, "Normalize" in types)


def write_pooling(folder: Path, pooled: Pooled, dim: int) -> None:
    """Write beside a model what lets ``SentenceTransformer(folder)`` make the same embeddings.

    Args:
        folder: Of ``save_pretrained``.
        pooled: As they are made.
        dim: Of an embedding.
    """
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 2 + pooled.normalize]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_PACKAGE}.{kind}"}
        for number, (path, kind) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    for path, _ in steps[1:]:
        (folder / path).mkdir()
    settings = {f"pooling_mode_{key}": mode == pooled.pooling for mode, key in _KEYS.items()}
    settings_path = folder / "1_Pooling" / "config.json"
    settings_path.write_text(json.dumps({"word_embedding_dimension": dim, **settings}, indent=2))


def _read_json(model: str, name: str) -> Any:
    folder = Path(model).expanduser()
    path: Any = folder / name
    if not folder.is_dir():
        quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries")}
        path = cached_file(model, name, _raise_exceptions_for_connection_errors=False, **quiet)
    return json.loads(Path(path).read_text()) if path is not None and Path(path).is_file() else None
