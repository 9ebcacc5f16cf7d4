"""The picture of a study: its values one after another, and against each parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning_llm.search.space import Choice, Parameter
from lightning_llm.search.study import SearchStudy
from lightning_llm.search.summary import number_text, short_names

_COLUMNS = 3
_LONGEST_LABEL = 16
_OUTLIER = 5.0  # times the distance of the median from the best


class _Values(NamedTuple):
    """The finished trials that have a value."""

    complete: list[Any]
    pruned: list[Any]
    limits: tuple[float, float]  # of the axis


def plot_study(study: SearchStudy, path: Path, metric: str) -> None:
    """Draw the values of all trials with the best so far, and the values against each parameter.

    Values far worse than the others stand at the edge, as triangles, so that they do not flatten the rest.

    Args:
        study: With some trials.
        path: The picture's file (PNG, PDF or SVG by its ending).
        metric: Its name, for the axes.
    """
    from matplotlib.figure import Figure

    values = _values(study)
    num_rows = -(-len(study.space) // _COLUMNS)
    figure = Figure(figsize=(12, 3.4 + 3.1 * num_rows), layout="constrained", dpi=110)
    grid = figure.add_gridspec(1 + num_rows, _COLUMNS, height_ratios=[1.1, *[1.0] * num_rows])
    _draw_history(figure.add_subplot(grid[0, :]), study, values, metric)
    names = short_names([parameter.key for parameter in study.space])
    for number, (parameter, name) in enumerate(zip(study.space, names, strict=True)):
        row, column = divmod(number, _COLUMNS)
        axes = figure.add_subplot(grid[1 + row, column])
        _draw_parameter(axes, study, values, parameter)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_ylabel(metric if column == 0 else "", fontsize=9)
    figure.savefig(path)


def axis_limits(values: list[float], is_maximized: bool) -> tuple[float, float]:
    """From the best value to the worst, or to where a value is an outlier.

    Example:
        >>> axis_limits([2.0, 3.0, 4.0, 50.0], is_maximized=False)
        (2.0, 12.0)
        >>> axis_limits([2.0, 3.0], is_maximized=False)
        (2.0, 3.0)
    """
    if not values:
        return (0.0, 1.0)
    best, worst = (max(values), min(values)) if is_maximized else (min(values), max(values))
    middle = sorted(values, reverse=is_maximized)[len(values) // 2]
    furthest = best + _OUTLIER * (middle - best)
    worst = max(worst, furthest) if is_maximized else min(worst, furthest)
    return (min(best, worst), max(best, worst))


def _values(study: SearchStudy) -> _Values:
    trials = [trial for trial in study.finished() if trial.value is not None]
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    low, high = axis_limits([trial.value for trial in trials], study.is_maximized)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return _Values(complete, pruned, (low - margin, high + margin))


def _draw_history(axes: Any, study: SearchStudy, values: _Values, metric: str) -> None:
    _draw_points(axes, study, values, lambda trial: trial.number, by_number=False)
    best, steps = None, []
    for trial in values.complete:
        best = trial.value if best is None else (max if study.is_maximized else min)(best, trial.value)
        steps.append((trial.number, best))
    last = max((trial.number for trial in study.trials()), default=0)
    if steps:
        steps.append((last, steps[-1][1]))
        axes.step(*zip(*steps, strict=True), where="post", color="C1", linewidth=1.6, label="best so far", zorder=2)
    failed = [trial.number for trial in study.finished() if trial.state.name == "FAIL"]
    if failed:
        marks = {"marker": "|", "s": 90, "color": "C3", "linewidths": 2, "label": "failed", "clip_on": False}
        axes.scatter(failed, [0.0] * len(failed), transform=axes.get_xaxis_transform(), zorder=4, **marks)
    axes.set_xlim(-0.5, last + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("trial", fontsize=9)
    axes.set_ylabel(metric, fontsize=9)
    axes.set_title(f"{metric} of each trial", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6)
    axes.set_title(axes.get_title(loc="left"), fontsize=10, loc="right")
    axes.set_title("", loc="left")


def _draw_parameter(axes: Any, study: SearchStudy, values: _Values, parameter: Parameter) -> None:
    if isinstance(parameter, Choice):
        names = [number_text(label) for label in parameter.labels]
        places = {name: float(place) for place, name in enumerate(names)}
        _draw_points(axes, study, values, lambda trial: places[number_text(trial.params[parameter.key])])
        short = [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…" for name in names]
        is_crowded = sum(map(len, short)) > 30
        turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_crowded else {}
        axes.set_xticks(range(len(short)), short, **turn)
        axes.set_xlim(-0.5, len(short) - 0.5)
        return
    _draw_points(axes, study, values, lambda trial: trial.params[parameter.key])
    if parameter.log:
        _logarithmic(axes, parameter.low, parameter.high)
    else:
        margin = 0.04 * (parameter.high - parameter.low)
        axes.set_xlim(parameter.low - margin, parameter.high + margin)
        axes.xaxis.get_major_locator().set_params(nbins=6, integer=parameter.whole)


def _logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithmic axis with a few labels, whether it spans one decade or eight."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    margin = (high / low) ** 0.04
    axes.set_xlim(low / margin, high * margin)
    subs = (1.0, 2.0, 5.0) if high / low <= 100 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_points(axes: Any, study: SearchStudy, values: _Values, place: Any, by_number: bool = True) -> None:
    """Completed trials as dots, the later the darker; pruned ones as grey crosses; the best as a star."""
    low, high = values.limits
    best = study.best()
    for trials, style, name in (
        (values.complete, {"marker": "o", "s": 26, "linewidths": 0}, "complete"),
        (values.pruned, {"marker": "x", "s": 24, "color": "0.55", "linewidths": 1.2}, "pruned"),
    ):
        inside = [trial for trial in trials if low <= trial.value <= high]
        if inside:
            is_dot = style["marker"] == "o"
            colors = {"c": [trial.number for trial in inside], "cmap": "Blues", "vmin": -len(study.trials())}
            color = (colors if by_number else {"color": "C0"}) if is_dot else {}
            axes.scatter([place(t) for t in inside], [t.value for t in inside], label=name, zorder=3, **style, **color)
        beyond = [trial for trial in trials if not low <= trial.value <= high]
        if beyond:
            edge, marker = (low, "v") if study.is_maximized else (high, "^")
            looks = {"s": 26, "color": "C0" if style["marker"] == "o" else "0.55", "zorder": 3, "clip_on": False}
            edges = [edge] * len(beyond)
            axes.scatter([place(t) for t in beyond], edges, marker=marker, label=f"{name}, beyond the axis", **looks)
    if best is not None:
        style = {"marker": "*", "s": 150, "color": "C1", "edgecolors": "white", "linewidths": 0.6, "zorder": 5}
        axes.scatter([place(best)], [best.value], label="best", **style)
    axes.set_ylim(low, high)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
