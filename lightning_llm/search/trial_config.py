"""The configuration of a trial: that of ``fit`` with the drawn values, in a folder of its own, and quiet."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_llm.search.keys import find, put

_BATCH = {
    *("micro_batch_size", "micro_batch_tokens", "global_batch_size", "global_batch_tokens"),
    *("accumulate_grad_batches", "max_length"),
}


def with_values(base: Mapping[str, Any], values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A configuration of ``fit`` with other values.

    Args:
        base: A whole configuration; it is left as it is.
        values: For dotted keys.
        seed: For ``seed_everything``, where the configuration leaves it to chance.
    """
    config: dict[str, Any] = copy.deepcopy(dict(base))
    if isinstance(config.get("seed_everything"), bool) or config.get("seed_everything") is None:
        config["seed_everything"] = seed
    for key, value in values.items():
        put(config, find(config, key), copy.deepcopy(value))
    return config


def of_trial(config: dict[str, Any], folder: Path, keep_checkpoints: bool) -> dict[str, Any]:
    """The same for a trial: its folder, and neither progress bars nor, unless they are to be kept, checkpoints.

    Loggers that have a ``save_dir`` and a ``name`` write below the trial's folder, or call the run by its name.

    Args:
        config: Of this trial; it is changed.
        folder: Of this trial.
        keep_checkpoints: Whether callbacks that write weights stay.
    """
    trainer = config["trainer"]
    trainer["default_root_dir"] = str(folder)
    loggers = trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        options = logger.get("init_args") or {} if isinstance(logger, dict) else {}
        for name, value in (("save_dir", str(folder.parent)), ("name", folder.name)):
            if name in options:
                options[name] = value
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    if not keep_checkpoints:
        trainer["enable_checkpointing"] = False
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer["callbacks"] = [each for each in callbacks if not _is_left_out(each["class_path"], keep_checkpoints)]
    return config


def check_length(base: Mapping[str, Any]) -> None:
    """Refuse runs without an end, and those that would take their hyper-parameters from a checkpoint.

    Raises:
        ValueError: Saying what to set.
    """
    trainer = base["trainer"]
    ends = [trainer.get(name) for name in ("max_epochs", "max_steps")]
    if not any(end is not None and end > 0 for end in ends):
        raise ValueError(
            "A trial needs an end that is known: set trainer.max_epochs (with trainer.limit_train_batches for a part "
            "of an epoch) or trainer.max_steps."
        )
    if base.get("ckpt_path"):
        raise ValueError(
            f"The configuration resumes from ckpt_path={base['ckpt_path']!r}, whose hyper-parameters would take the "
            f"place of those that are drawn. Leave ckpt_path out, and start from weights: model.model FOLDER."
        )


def unequal_tokens(base: Mapping[str, Any], keys: list[str]) -> str | None:
    """What to say of a search over batches whose trials run for equal steps, and so for unequal tokens; else None.

    Example:
        >>> base = {"trainer": {"max_steps": 100, "max_epochs": None}}
        >>> unequal_tokens(base, ["model.learning_rate"]) is None
        True
        >>> unequal_tokens(base, ["data.global_batch_size"]).partition(",")[0]
        'The search varies `data.global_batch_size`'
    """
    batch = [key for key in keys if key.rpartition(".")[2] in _BATCH]
    max_steps = base["trainer"].get("max_steps")
    if not batch or max_steps is None or max_steps <= 0:
        return None
    return (
        f"The search varies `{'`, `'.join(batch)}`, but trials end after trainer.max_steps={max_steps}: a larger batch "
        f"trains on more tokens. For equal tokens set trainer.max_epochs and trainer.limit_train_batches, and "
        f"trainer.max_steps to -1."
    )


def _is_left_out(class_path: str, keep_checkpoints: bool) -> bool:
    from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar

    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if issubclass(kind, (ProgressBar, ModelSummary)):
        return True
    return not keep_checkpoints and (issubclass(kind, Checkpoint) or name.endswith("Checkpoint"))
