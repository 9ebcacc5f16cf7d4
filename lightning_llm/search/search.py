"""The search itself: the space is checked, trials are drawn and run one after another, the best is written down."""

from __future__ import annotations

import io
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_llm.search.keys import find
from lightning_llm.search.running import OpenFit, Outcome, check_one_process, quiet, release_memory, run_trial
from lightning_llm.search.space import Parameter
from lightning_llm.search.study import SearchStudy
from lightning_llm.search.summary import counts, number_text, short_names, table, token_warning
from lightning_llm.search.trial_config import check_length, of_trial, unequal_tokens, with_values


@dataclass(frozen=True)
class Search:
    """Runs of one configuration with arguments drawn from a space.

    Args:
        open_fit: Makes a run from arguments of ``lightning-llm fit``.
        base: All arguments with their values.
        study: Where trials are kept.
        folder: Where each trial has a folder, and the results are written.
        metric: As it is logged in validation.
        value: Of a trial: that of its ``last`` validation, or of the ``best``.
        keep_checkpoints: Whether trials write weights, as the configuration says.
    """

    open_fit: OpenFit
    base: Mapping[str, Any]
    study: SearchStudy
    folder: Path
    metric: str = "val/loss"
    value: Literal["last", "best"] = "last"
    keep_checkpoints: bool = False

    def run(self, num_trials: int, timeout_s: float = math.inf) -> None:
        """Run trials until so many are finished in the study, those of earlier calls included.

        Args:
            num_trials: Completed, pruned, or failed by themselves.
            timeout_s: Seconds after which no further trial is begun.

        Raises:
            Exception: Whatever ends a trial and is no failure of its values; the trial does not count.
        """
        deadline = time.monotonic() + timeout_s
        if stale := self.study.abandon_stale():
            print(f"{stale} interrupted before its end: its values are drawn once more.")
        while len(self.study.finished()) < num_trials:
            if time.monotonic() > deadline:
                print(f"The time is over: {counts(self.study)} of {num_trials}. The same command goes on.")
                break
            self._run_next()
            self.write_best()

    def write_best(self) -> Path | None:
        """Write ``best.yaml``, for ``lightning-llm fit --config``; None as long as no trial is complete."""
        best = self.study.best()
        if best is None:
            return None
        path = self.folder / "best.yaml"
        head = f"# Trial {best.number} of {counts(self.study)}: {self.metric} {number_text(float(best.value))}\n"
        config = with_values(self.base, self.study.values_of(best), self.study.seed)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(head + yaml.safe_dump(config, sort_keys=False))
        unfinished.replace(path)
        return path

    def report(self) -> str:
        """The table of trials, the best one, and where everything lies; draws the picture."""
        from lightning_llm.search.picture import plot_study

        lines = ["", f"Search: {counts(self.study)}", table(self.study, self.metric)]
        if warning := token_warning(self.study):
            lines.append(warning)
        paths = {"trials": self.folder}
        if self.study.trials():
            plot_study(self.study, self.folder / "study.png", self.metric)
            paths["plot"] = self.folder / "study.png"
        best, path = self.study.best(), self.write_best()
        if best is not None and path is not None:
            lines.append(f"\n  best        trial {best.number}, {self.metric} {number_text(float(best.value))}")
            lines += [f"  {'':<10}  {key}: {number_text(v)}" for key, v in self.study.values_of(best).items()]
            if importances := self.study.importances():
                names = dict(zip(importances, short_names(list(importances)), strict=True))
                shares = ", ".join(f"{names[key]} {share:.0%}" for key, share in importances.items())
                lines.append(f"  {'importance':<10}  {shares}")
            lines.append(f"  {'to train':<10}  lightning-llm fit --config {path}")
        else:
            lines.append("No trial is complete, so there is no best one.")
        return "\n".join([*lines, *(f"  {name:<10}  {path}" for name, path in paths.items())])

    # ---- details -------------------------------------------------------------------------------------------------

    def _run_next(self) -> None:
        trial, values = self.study.next_trial()
        folder = self.folder / f"trial-{trial.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        config = of_trial(with_values(self.base, values, self.study.seed), folder, self.keep_checkpoints)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        drawn = zip(short_names(list(values)), values.values(), strict=True)
        drawn_text = ", ".join(f"{name} {number_text(value)}" for name, value in drawn)
        print(f"trial {trial.number}: {drawn_text}:", end="", flush=True)
        begin, screen = time.monotonic(), sys.stdout  # a trial's own output goes to its folder

        def show(value: float) -> None:
            print(f" {number_text(value)}", end="", file=screen, flush=True)

        try:
            outcome = run_trial(self.open_fit, folder / "config.yaml", self.metric, trial, show)
        except BaseException as error:
            print(f" stopped, {type(error).__name__}", flush=True)
            self.study.abandon(trial, f"{type(error).__name__}: {error}".removesuffix(": "))
            raise
        self._finish(trial, outcome, time.monotonic() - begin)

    def _finish(self, trial: Any, outcome: Outcome, seconds: float) -> None:
        for name, fact in {**outcome.facts, "seconds": round(seconds, 1)}.items():
            trial.set_user_attr(name, fact)
        if outcome.state == "complete":
            best = max(outcome.values) if self.study.is_maximized else min(outcome.values)
            self.study.complete(trial, best if self.value == "best" else outcome.values[-1])
        elif outcome.state == "pruned":
            self.study.prune(trial)
        else:
            self.study.fail(trial, outcome.reason)
        share = f" after {outcome.facts['share']:.0%}" if outcome.state == "pruned" else ""
        print(f" {outcome.state}{share}{': ' * bool(outcome.reason)}{outcome.reason}", flush=True)


def read_base(open_fit: OpenFit, arguments: list[str]) -> dict[str, Any]:
    """All arguments of a run that can be searched, with their values.

    Args:
        open_fit: Makes the run.
        arguments: Of ``lightning-llm fit``.

    Raises:
        ValueError: For runs on several devices, without an end, or from a checkpoint.
    """
    with quiet(io.StringIO()):
        fit = open_fit(["fit", *arguments])
    check_one_process(fit.trainer)
    check_length(fit.settings)
    return fit.settings


def check_space(open_fit: OpenFit, base: Mapping[str, Any], space: Sequence[Parameter], seed: int = 0) -> None:
    """Make a run at the bounds of each range and with every choice, without training, and say what is unwise.

    Raises:
        ValueError: For keys that the configuration does not have, and values that it does not take.
    """
    for parameter in space:
        find(dict(base), parameter.key)
    if warning := unequal_tokens(base, [parameter.key for parameter in space]):
        print(warning)
    examples = {parameter.key: parameter.examples() for parameter in space}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(max(map(len, examples.values()))):
            values = {key: each[number % len(each)] for key, each in examples.items()}
            config = of_trial(with_values(base, values, seed), Path(folder) / "trial", keep_checkpoints=False)
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            try:
                with quiet(io.StringIO()):
                    open_fit(["fit", "--config", str(path)])
            except Exception as error:
                drawn = ", ".join(f"{key}: {number_text(value)}" for key, value in values.items())
                raise ValueError(f"The configuration does not take {drawn}: {error}") from error
    release_memory()
