"""A study in a database: made or gone on with, its next trial, and what became of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from lightning_llm.search.keys import differences
from lightning_llm.search.space import Parameter

Direction = Literal["minimize", "maximize"]


class SearchStudy:
    """Trials of a search space in a database, which may be stopped at any moment and gone on with.

    What is drawn for a trial depends on the seed and on the trials that are finished, on nothing else: a study that
    was killed goes on as if it had not been. A trial that was under way then is a failed one and its values are drawn
    once more. A trial whose training failed (memory, a loss that is not finite) is finished: it would fail again.

    Args:
        storage: An SQLite file, or the URL of a database as SQLAlchemy takes it.
        name: Of the study; one database may hold several.
        direction: Whether the metric is to be small or large.
        space: What is drawn.
        seed: Of the draws.
        pruner: ``median``, ``hyperband`` or ``none``.
        prune_after: Share of a run before which nothing is pruned.
        settings: What makes trials comparable: a study is gone on with under the same only.

    Raises:
        ImportError: Without Optuna.
        ValueError: If the database holds a study of that name with other settings.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        direction: Direction,
        space: Sequence[Parameter],
        seed: int = 0,
        pruner: str = "median",
        prune_after: float = 0.1,
        settings: dict[str, Any] | None = None,
    ) -> None:
        optuna = import_optuna()
        self.space = list(space)
        self.seed = seed
        url = storage if "://" in storage else f"sqlite:///{storage}"
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
        options = {"storage": url, "study_name": name, "direction": direction}
        self.study: Any = optuna.create_study(**options, load_if_exists=True)
        kept = json.loads(
            json.dumps({"direction": direction, "space": {each.key: each.spec() for each in space}, **(settings or {})})
        )
        if keys := [*differences(self.study.user_attrs.get("settings") or {}, kept)]:
            if self.finished():
                raise ValueError(_other_settings(name, keys))
            optuna.delete_study(study_name=name, storage=url)  # nothing is lost: no trial has come to an end
            self.study = optuna.create_study(**options)
            self.study.set_user_attr("settings", kept)
        self.study.pruner = make_pruner(pruner, prune_after)

    def next_trial(self) -> tuple[Any, dict[str, Any]]:
        """An Optuna trial and its values by their keys."""
        from optuna.samplers import TPESampler

        number = len(self.finished())
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.study.sampler = TPESampler(seed=seed)
        trial = self.study.ask()
        return trial, {parameter.key: parameter.draw(trial) for parameter in self.space}

    def complete(self, trial: Any, value: float) -> None:
        """A trial that came to its end."""
        self._tell(trial, "COMPLETE", value)

    def prune(self, trial: Any) -> None:
        """A trial that was stopped early."""
        self._tell(trial, "PRUNED")

    def fail(self, trial: Any, reason: str) -> None:
        """A trial whose training failed, and would fail again."""
        trial.set_user_attr("reason", reason)
        self._tell(trial, "FAIL")

    def abandon(self, trial: Any, error: str) -> None:
        """A trial that was stopped from outside, or by an error that has to be mended: it does not count."""
        trial.set_user_attr("error", error)
        self._tell(trial, "FAIL")

    def abandon_stale(self) -> int:
        """Give up the trials that were under way when a process died; only one process works on a study.

        Returns:
            How many.
        """
        stale = [trial for trial in self.trials() if trial.state.name == "RUNNING"]
        for trial in stale:
            self._tell(trial, "FAIL")
        return len(stale)

    def trials(self) -> list[Any]:
        """All trials as Optuna keeps them."""
        trials: list[Any] = self.study.get_trials(deepcopy=False)
        return trials

    def finished(self) -> list[Any]:
        """Those that count: completed, pruned, or failed by themselves."""
        return [t for t in self.trials() if t.state.name in ("COMPLETE", "PRUNED") or "reason" in t.user_attrs]

    def completed(self) -> list[Any]:
        """Those that came to their end."""
        return [trial for trial in self.trials() if trial.state.name == "COMPLETE"]

    def best(self) -> Any | None:
        """The best of the completed trials; None if there is none."""
        return self.study.best_trial if self.completed() else None

    def values_of(self, trial: Any) -> dict[str, Any]:
        """What was drawn for a trial, by its keys: the very values, of choices too."""
        return {parameter.key: parameter.value_of(trial.params[parameter.key]) for parameter in self.space}

    @property
    def is_maximized(self) -> bool:
        """Whether the metric is to be large."""
        return bool(self.study.direction.name == "MAXIMIZE")

    def importances(self, least: int = 8) -> dict[str, float]:
        """The share of each parameter in what makes trials good, by PED-ANOVA; empty for few trials or parameters.

        References:
            Watanabe, Bansal, Hutter, PED-ANOVA: efficiently quantifying hyperparameter importance in arbitrary
            subspaces, 2023.
        """
        if len(self.completed()) < least or len(self.space) < 2:
            return {}
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        try:
            return dict(get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator()))
        except (RuntimeError, ValueError):  # all values equal, say
            return {}

    # ---- details -------------------------------------------------------------------------------------------------

    def _tell(self, trial: Any, state: str, value: float | None = None) -> None:
        from optuna.trial import TrialState

        self.study.tell(trial.number, value, state=TrialState[state])


def _other_settings(name: str, keys: list[str]) -> str:
    named = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
    return (
        f"The study '{name}' was made with other settings, whose trials cannot be compared with these; they differ in "
        f"{named}. Give --study another name for a new one, or go back to the old settings to go on."
    )


def import_optuna() -> Any:
    """Optuna, with its log kept to warnings.

    Raises:
        ImportError: Saying how to install it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("It needs Optuna: pip install 'lightning-llm[search]', or pip install optuna.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def make_pruner(name: str, prune_after: float) -> Any:
    """What decides whether a run is worth its end, by its values at whole percents of it.

    Args:
        name: ``median``: stops what is worse than the median of the others at the same share of their runs, once five
            have come to their end. ``hyperband``: lets a third go on at each third of what is left. ``none``: nothing.
        prune_after: Share of a run before which nothing is pruned.

    Raises:
        ValueError: For another name or share.
    """
    if not 0 <= prune_after < 1:
        raise ValueError(f"`prune_after` is a share of the run, 0 or more and below 1, but got {prune_after}.")
    from optuna import pruners

    first = round(100 * prune_after)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=first, n_min_trials=3)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=max(first, 1), max_resource=100, reduction_factor=3)
    if name == "none":
        return pruners.NopPruner()
    raise ValueError(f"`pruner` must be median, hyperband or none, but got {name!r}.")


@contextmanager
def alone(storage: str, name: str, folder: Path) -> Iterator[None]:
    """Keep other processes from the study: what is under way in the database is then of one that died.

    Raises:
        ValueError: If another process works on it.
    """
    path = folder / "study" if "://" in storage else Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another process works on the study '{name}' in {storage}. Wait for it, or end it.") from None
    try:
        yield
    finally:
        lock.release()
