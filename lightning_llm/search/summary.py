"""A study on one screen: a table of its trials, the best of them, and what mattered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_llm.search.study import SearchStudy


def table(study: SearchStudy, metric: str) -> str:
    """All trials, the best first, then those that were pruned, then those that failed.

    Args:
        study: With some trials.
        metric: Its name, for the heading.
    """
    names = short_names([parameter.key for parameter in study.space])
    heading = ["trial", "state", metric, "run", "steps", "tokens", *names]
    rows = [_row(trial, list(study.space)) for trial in _sorted(study)]
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heading, *rows]]
    reasons = [
        f"trial {trial.number} {word}, {trial.user_attrs[key]}"
        for trial in study.trials()
        for key, word in (("reason", "failed"), ("error", "interrupted"))
        if key in trial.user_attrs
    ]
    return "\n".join([*lines, *reasons])


def counts(study: SearchStudy) -> str:
    """How many trials there are, by what became of them.

    A trial that was interrupted is not among those that count.
    """
    states = [trial.state.name for trial in study.finished()]
    names = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed"}
    parts = [f"{states.count(state)} {name}" for state, name in names.items() if state in states]
    interrupted = len(study.trials()) - len(states)
    parts += [f"{interrupted} interrupted and not counted"] if interrupted else []
    return f"{len(states)} trials ({', '.join(parts) or 'none yet'})"


def token_warning(study: SearchStudy) -> str | None:
    """What to say if completed trials trained on unequal tokens, by more than a tenth; else None."""
    tokens = [number for trial in study.completed() if (number := trial.user_attrs.get("tokens"))]
    if not tokens or max(tokens) <= 1.1 * min(tokens):
        return None
    return (
        f"Completed trials trained on {min(tokens):,} to {max(tokens):,} label tokens: they differ in cost too. Equal "
        f"epochs (trainer.max_epochs, trainer.limit_train_batches) are equal tokens, equal steps are not."
    )


def short_names(keys: Sequence[str]) -> list[str]:
    """The shortest ends of dotted keys by which they differ.

    Example:
        >>> short_names(["model.learning_rate", "model.peft.r", "data.other.r"])
        ['learning_rate', 'peft.r', 'other.r']
    """
    names = []
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        names.append(next((e for e in ends if sum(f".{k}".endswith(f".{e}") for k in keys) == 1), key))
    return names


def number_text(value: Any) -> str:
    """Four digits of a number, anything else as it is.

    Example:
        >>> number_text(0.000123456), number_text(65536), number_text("5%"), number_text(None)
        ('0.0001235', '65536', '5%', 'null')
    """
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sorted(study: SearchStudy) -> list[Any]:
    order = {"COMPLETE": 0, "PRUNED": 1, "FAIL": 2, "RUNNING": 3}
    sign = -1 if study.is_maximized else 1
    return sorted(study.trials(), key=lambda t: (order[t.state.name], sign * t.value if t.value is not None else 0.0))


def _row(trial: Any, space: list[Any]) -> list[str]:
    facts, state = trial.user_attrs, trial.state.name
    is_interrupted = state == "FAIL" and "reason" not in facts
    word = "interrupted" if is_interrupted else {"FAIL": "failed"}.get(state, state.lower())
    return [
        str(trial.number),
        word,
        "" if trial.value is None else number_text(float(trial.value)),
        f"{facts['share']:.0%}" if "share" in facts else "",
        f"{facts['steps']:,}" if "steps" in facts else "",
        f"{facts['tokens']:,}" if "tokens" in facts else "",
        *(number_text(trial.params.get(parameter.key, "")) for parameter in space),
    ]
