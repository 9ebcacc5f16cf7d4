"""One trial: a run of ``fit`` in this process, judged at each validation, with its memory given back."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import lightning as L
import torch

from lightning_llm.loss import NonFiniteLossError
from lightning_llm.out_of_memory import is_out_of_memory
from lightning_llm.search.reporting import Judge, TrialReport, share_of_run


class Fit(Protocol):
    """All that ``lightning-llm fit`` would run with, made and not started.

    Attributes:
        trainer: With its callbacks.
        model: To be trained.
        datamodule: Its data.
        fit_arguments: Of ``trainer.fit``.
        settings: All arguments with their values, nested, as in YAML.
    """

    trainer: L.Trainer
    model: L.LightningModule
    datamodule: L.LightningDataModule
    fit_arguments: dict[str, Any]
    settings: dict[str, Any]


OpenFit = Callable[[list[str]], Fit]  # from the command line's arguments


class Outcome(NamedTuple):
    """What became of a trial.

    Attributes:
        state: ``complete``, ``pruned``, or ``failed``.
        values: Of the metric, at each validation.
        facts: ``share`` of the run, optimizer ``steps``, ``tokens``.
        reason: Why it failed.
    """

    state: Literal["complete", "pruned", "failed"]
    values: list[float]
    facts: dict[str, float]
    reason: str = ""


def run_trial(
    open_fit: OpenFit, config: Path, metric: str, judge: Judge, tell: Callable[[float], Any] = lambda value: None
) -> Outcome:
    """Train as a configuration says; what the run prints goes to ``output.txt`` beside it.

    Args:
        open_fit: Makes the run.
        config: YAML of ``lightning-llm fit``, in the trial's folder.
        metric: As it is logged in validation.
        judge: Hears the metric at each validation, and may end the run.
        tell: Is called with each value of the metric.

    Returns:
        The outcome; the weights are gone. A run that ends between two validations is validated once more.

    Raises:
        Exception: What is no failure of the values that were drawn; see :func:`failure`.
    """
    outcome = _run(open_fit, config, metric, judge, tell)
    release_memory()  # now that the frames that held the model are gone
    return outcome


def failure(error: BaseException) -> str | None:
    """Why a trial failed, if that lies in the values that were drawn: memory, a loss that is not finite; else None.

    Example:
        >>> failure(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        'out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.'
        >>> failure(ValueError("no such column")) is None
        True
    """
    behind: BaseException | None = error
    while behind is not None:
        line = (str(behind).strip().splitlines() or [type(behind).__name__])[0]
        if isinstance(behind, NonFiniteLossError):
            return f"not finite: {line}"
        if is_out_of_memory(behind):
            return f"out of memory: {line}"
        behind = behind.__cause__ or behind.__context__
    return None


def check_one_process(trainer: L.Trainer) -> None:
    """Refuse several devices.

    Raises:
        ValueError: Saying what to set.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"Trials run in one process on one device, but the Trainer has {trainer.world_size}. Add --trainer.devices "
            f"1 (and --trainer.strategy auto); the best configuration runs on as many as you like."
        )


def release_memory() -> None:
    """Collect reference cycles, and give back what the device's allocator holds unused."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextlib.contextmanager
def quiet(output: Any) -> Iterator[None]:
    """Send what is printed to a file, and keep Lightning's information of each run from the screen.

    Args:
        output: An open file.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _train(fit: Fit, report: TrialReport, facts: dict[str, float]) -> None:
    trainer, model = fit.trainer, fit.model
    check_one_process(trainer)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, report)
    try:
        trainer.fit(**fit.fit_arguments)
        if not report.is_pruned and not report.has_validated(trainer):
            trainer.validate(model, datamodule=fit.datamodule, verbose=False)
    finally:
        share = report.history[-1][0] if report.is_pruned else share_of_run(trainer, model)
        facts |= {"share": share, "steps": trainer.global_step, "tokens": getattr(model, "tokens_seen", 0)}
    if not report.history:
        raise ValueError(
            f"The run ended without a validation, so there is no {report.metric}: it needs validation data."
        )


def _run(open_fit: OpenFit, config: Path, metric: str, judge: Judge, tell: Callable[[float], Any]) -> Outcome:
    facts: dict[str, float] = {}
    values: list[float] = []

    def note(value: float) -> None:
        values.append(value)
        tell(value)

    try:
        with (config.parent / "output.txt").open("w") as output, quiet(output):
            report = TrialReport(metric, judge, note)
            _train(open_fit(["fit", "--config", str(config)]), report, facts)
        outcome = Outcome("pruned" if report.is_pruned else "complete", values, facts)
    except Exception as error:
        reason = failure(error)
        if reason is None:
            raise
        outcome = Outcome("failed", values, facts, reason)
    return outcome
