"""Folders that `from_pretrained` loads, written while training."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from lightning_llm.callbacks.merged_adapters import has_adapter, merged_copy, reason_against_merging

# What a data module may have; a processor holds the others.
_PROCESSORS = ("processor", "tokenizer", "image_processor", "feature_extractor")


def improves(value: float, best: float | None, mode: Literal["min", "max"]) -> bool:
    """Whether a score is better than the best so far; NaN never is."""
    if math.isnan(value):
        return False
    return best is None or (value < best if mode == "min" else value > best)


class HuggingFaceCheckpoint(L.Callback):
    """Write the model as Hugging Face folders: weights (safetensors), configuration, generation settings, tokenizer.

    ``<dirpath>/last`` and ``<dirpath>/best`` are links to ``<dirpath>/step-<optimizer step>``. A folder is written
    beside its place, renamed when it is whole, and only then linked, so a reader or a crash never meets half of one;
    folders that neither link names are removed. Sharded (FSDP2) parameters are gathered on rank 0. A module's method
    ``write_beside(folder)`` may add files of its own, and a module of several tasks has a folder for each of them.

    Args:
        dirpath: Where; ``huggingface`` in the logger's folder if None.
        monitor: The metric that chooses ``best``; None writes ``last`` only.
        mode: ``min`` or ``max`` of the metric is best.
        every_n_steps: Write ``last`` each n optimizer steps too, not only after each validation and at the end.
        tokenizer: Written into each folder, so that ``pipeline`` finds it; of images or sounds their processor. The
            data module's ``processor``, ``tokenizer``, ``image_processor`` or ``feature_extractor`` if None.
        adapter: What is written of a model with an adapter (package peft): ``alone``, the adapter and the name of its
            base, for ``AutoPeftModel``; or ``merged``, a copy of the base with the adapter in its weights, which needs
            no peft to load. The copy is made in host memory; what trains is not touched. Prompts, quantised and sharded
            weights cannot be merged: their adapter is written alone, with a warning.

    Raises:
        ValueError: If the metric is not logged, or the strategy keeps parameters where they cannot be gathered.
        TypeError: If the LightningModule's ``model`` has no ``save_pretrained``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        every_n_steps: int | None = None,
        tokenizer: Any = None,
        adapter: Literal["alone", "merged"] = "alone",
    ) -> None:
        if adapter not in ("alone", "merged"):
            raise ValueError(f"`adapter` must be 'alone' or 'merged', but got {adapter!r}.")
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max', but got {mode!r}.")
        self.dirpath = Path(dirpath).expanduser() if dirpath else None
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.best_score: float | None = None
        self._saved_step = -1

    @property
    def state_key(self) -> str:
        """Several of these may watch several metrics."""
        adapter = {} if self.adapter == "alone" else {"adapter": self.adapter}
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, **adapter)

    def written_paths(self) -> dict[str, str]:
        """What has been written: ``last`` and ``best`` folders."""
        if self.dirpath is None:
            return {}
        links = {f"Hugging Face {name}": self.dirpath / name for name in ("last", "best")}
        return {name: str(path) for name, path in links.items() if path.exists()}

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be written; find the folder."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"HuggingFaceCheckpoint cannot gather the parameters that {type(trainer.strategy).__name__} keeps. "
                f"Use DDPStrategy, or ModelParallelStrategy for sharded parameters."
            )
        if self.dirpath is None:
            log_dir = trainer.log_dir or trainer.default_root_dir
            self.dirpath = Path(log_dir) / "huggingface"
        others = [c for c in trainer.callbacks if isinstance(c, HuggingFaceCheckpoint) and c is not self]  # type: ignore[attr-defined]
        if any(other.dirpath == self.dirpath for other in others):
            raise ValueError(
                f"Two HuggingFaceCheckpoint callbacks write to {self.dirpath}. Give each a `dirpath` of its own."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what of an adapter's model the folders will not hold."""
        model: Any = getattr(pl_module, "model", None)
        if not has_adapter(model):
            return
        reason = reason_against_merging(model)
        if self.adapter == "merged" and reason is not None:
            rank_zero_warn(f"HuggingFaceCheckpoint(adapter='merged') writes the adapter alone: {reason}.")
        elif self.adapter == "alone" and not getattr(model.get_base_model(), "name_or_path", ""):
            rank_zero_warn(
                "HuggingFaceCheckpoint writes the adapter, but its base comes from no folder, and is not written: "
                "nothing could load the two together. Use adapter='merged'."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last`` at every n-th optimizer step."""
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save(trainer, pl_module, ["last"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``last``, and ``best`` if the metric improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        links = ["last"]
        if self.monitor is not None and self._improved(trainer, self.monitor):
            links.append("best")
        self._save(trainer, pl_module, links)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``last``, unless the last step has been written already."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, ["last"])

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_score": self.best_score, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best score."""
        self.best_score = state_dict["best_score"]

    # ---- details -------------------------------------------------------------------------------------------------

    def _improved(self, trainer: L.Trainer, monitor: str) -> bool:
        if monitor not in trainer.callback_metrics:
            raise ValueError(
                f"HuggingFaceCheckpoint(monitor={monitor!r}): no such metric is logged; there are "
                f"{sorted(trainer.callback_metrics)}. Choose one of them, or monitor=None."
            )
        assert self.dirpath is not None
        seen = (float(trainer.callback_metrics[monitor]), (self.dirpath / "best").exists())
        value, has_best = trainer.strategy.broadcast(seen)  # one opinion for all ranks
        if not improves(value, self.best_score if has_best else None, self.mode):
            return False
        self.best_score = value
        return True

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, links: list[str]) -> None:
        model = getattr(pl_module, "model", None)
        if not hasattr(model, "save_pretrained"):
            raise TypeError(
                f"HuggingFaceCheckpoint writes `pl_module.model`, which should have `save_pretrained`, but "
                f"{type(pl_module).__name__}.model is {type(model).__name__}."
            )
        assert self.dirpath is not None
        weights = _gathered_weights(model)
        if trainer.is_global_zero:
            datamodule = getattr(trainer, "datamodule", None)
            found = (getattr(datamodule, name, None) for name in _PROCESSORS)
            tokenizer = self.tokenizer or next((processor for processor in found if processor is not None), None)
            if self.adapter == "merged" and has_adapter(model) and reason_against_merging(model) is None:
                model = merged_copy(model)
            beside = getattr(pl_module, "write_beside", None)
            write_folder(model, weights, tokenizer, self.dirpath, trainer.global_step, links, beside)
        self._saved_step = trainer.global_step
        trainer.strategy.barrier("HuggingFaceCheckpoint")


def _gathered_weights(model: Any) -> dict[str, torch.Tensor] | None:
    """The whole state dict on rank 0 if parameters are sharded (all ranks take part); None if they are whole."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    # Of a model with an adapter only that is written.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapter(model))
    weights: Any = get_model_state_dict(model, options=options)
    return dict(weights)


@rank_zero_only
def write_folder(
    model: Any,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: Any,
    dirpath: Path,
    step: int,
    links: list[str],
    write_beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``dirpath/step-<step>``, let the links point to it, remove folders that no link names.

    Args:
        model: With ``save_pretrained``.
        weights: State dict to write; the model's own if None.
        tokenizer: With ``save_pretrained``, or None.
        dirpath: Parent folder.
        step: Optimizer step, for the name.
        links: Names that shall point to the new folder.
        write_beside: Writes further files into the folder.
    """
    dirpath.mkdir(parents=True, exist_ok=True)
    name = f"step-{step:08d}"
    folder = dirpath / name
    repeat = 1
    while folder.exists():  # an earlier run came to the same step; its folder may be in use until the links move
        repeat += 1
        folder = dirpath / f"{name}-{repeat}"
    unfinished = dirpath / f".unfinished-{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished), **({} if weights is None else {"state_dict": weights}))
    if tokenizer is not None:
        for part in getattr(model, "subfolders", ["."]):  # a model of several tasks writes a folder for each
            tokenizer.save_pretrained(str(unfinished / part))
    if write_beside is not None:
        write_beside(unfinished)
    unfinished.rename(folder)
    for link in links:
        _point(dirpath / link, folder.name)
    named = {(dirpath / link).resolve() for link in ("last", "best") if (dirpath / link).is_symlink()}
    for old in dirpath.glob("step-*"):
        if _is_ours(old) and old.resolve() not in named:
            shutil.rmtree(old)
    return folder


def _is_ours(folder: Path) -> bool:
    """A folder that this callback wrote, and no other step-something that lies there."""
    names = ("config.json", "adapter_config.json")
    holds_model = any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in names)
    return holds_model and re.fullmatch(r"step-\d{8}(-\d+)?", folder.name) is not None


def _point(link: Path, target: str) -> None:
    """Make ``link`` name ``target`` in one step: a reader finds the old folder or the new one."""
    if link.exists() and not link.is_symlink():
        raise FileExistsError(
            f"{link} is in the way: HuggingFaceCheckpoint keeps a link there. Move it, or set dirpath."
        )
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target, target_is_directory=True)
    fresh.replace(link)
