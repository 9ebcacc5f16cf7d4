"""One picture of a run and one screen of text: what was reached, and where everything lies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

History = dict[str, list[tuple[int, float]]]


class Panel(NamedTuple):
    """One plot of the picture.

    Attributes:
        title: Says what is drawn and its unit.
        metrics: Those that exist are drawn, with what lies between ``<metric>_low`` and ``<metric>_high`` shaded.
        from_zero: Whether the axis starts at 0 (amounts) or fits the values (losses).
    """

    title: str
    metrics: tuple[str, ...]
    from_zero: bool = True


PANELS = (
    Panel("loss (nats per label token)", ("train/loss", "val/loss"), from_zero=False),
    Panel("bits per byte of validation text", ("val/bits_per_byte",), from_zero=False),
    Panel("label tokens per second", ("train/tokens_per_s",)),
    Panel("global batch (label tokens)", ("train/global_batch_tokens",)),
    Panel("noise scale (label tokens)", ("train/noise_scale_tokens",)),
    Panel("learning rate", ("learning_rate", "train/learning_rate")),
    Panel("sequence length (tokens)", ("train/sequence_length",)),
    Panel("model FLOP utilisation", ("train/mfu",)),
)
_COLUMNS = 3
_SMOOTHING = 10  # entries in the running mean of the training loss


class TrainingReport(L.Callback):
    """Collect what is logged, draw it at the end of ``fit``, and print results and paths.

    Works with any logger or none. The picture shows the panels whose metrics exist. Where the data module offers
    ``zlib_bits_per_byte()``, its value stands beside the bits per byte as a yardstick.

    Args:
        filename: Of the picture (PNG, PDF or SVG by its ending), in the logger's folder unless it is absolute.
    """

    def __init__(self, filename: str = "report.png") -> None:
        self.filename = filename
        self.history: History = {}
        self._started_at = 0.0

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started_at = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the training metrics as often as they are logged."""
        step = trainer.global_step
        seen = self.history.get("learning_rate")
        if step and step % max(getattr(trainer, "log_every_n_steps", 1), 1) == 0 and not (seen and seen[-1][0] == step):
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._note(step, {name: value for name, value in metrics.items() if not name.startswith("val/")})
            if trainer.optimizers:
                self._note(step, {"learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"])})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the validation metrics."""
        if not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._note(trainer.global_step, {name: v for name, v in metrics.items() if name.startswith("val/")})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and print, on rank 0."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero or not self.history:
            return
        yardstick = getattr(getattr(trainer, "datamodule", None), "zlib_bits_per_byte", None)
        reference = yardstick() if yardstick is not None and "val/bits_per_byte" in self.history else None
        path = folder / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_history(self.history, path, zlib_bits_per_byte=reference)
        seconds = time.perf_counter() - self._started_at
        print(self._text(trainer, path, reference, seconds), flush=True)

    def state_dict(self) -> dict[str, Any]:
        """What has been noted, so that a resumed run draws the whole of it."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on noting."""
        self.history = {name: [(int(s), float(v)) for s, v in points] for name, points in state_dict["history"].items()}

    # ---- details -------------------------------------------------------------------------------------------------

    def _note(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.history.setdefault(name, []).append((step, value))

    def _text(self, trainer: L.Trainer, picture: Path, reference: float | None, seconds: float) -> str:
        lines = [f"\nTraining report: {trainer.global_step:,} optimizer steps in {seconds:.0f} s"]
        for name, points in sorted(self.history.items()):
            if name.startswith(("val/", "train/loss", "train/tokens_per_s", "train/global_batch", "train/mfu")):
                note = (
                    f"   (zlib -9 on the same text: {reference:.2f})"
                    if name == "val/bits_per_byte" and reference
                    else ""
                )
                lines.append(f"  {name:<26} {_number(points[-1][1])}{note}")
        lines += [f"  {name:<26} {path}" for name, path in {**_paths(trainer), "plot": str(picture)}.items()]
        return "\n".join(lines)


def plot_history(history: History, path: Path, *, zlib_bits_per_byte: float | None = None) -> None:
    """Draw the panels whose metrics exist, over optimizer steps; the first one fills the space that is left.

    Args:
        history: (step, value) pairs of each metric.
        path: The picture's file.
        zlib_bits_per_byte: Drawn as a line in the panel of bits per byte.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(name in history for name in panel.metrics)]
    num_rows = max(-(-len(panels) // _COLUMNS), 1)
    figure = Figure(figsize=(4.2 * _COLUMNS, 3.1 * num_rows), layout="constrained", dpi=110)
    grid = figure.add_gridspec(num_rows, _COLUMNS)
    cell = 0
    for panel in panels:
        width = 1 + num_rows * _COLUMNS - len(panels) if cell == 0 else 1
        row, column = divmod(cell, _COLUMNS)
        axes = figure.add_subplot(grid[row, column : column + width])
        cell += width
        for color, name in enumerate(panel.metrics):
            if name in history:
                _draw(axes, name, history[name], f"C{color}")
                _draw_interval(axes, name, history, f"C{color}")
        if panel.metrics == ("val/bits_per_byte",) and zlib_bits_per_byte is not None:
            axes.axhline(zlib_bits_per_byte, color="0.4", linestyle="--", linewidth=1, label="zlib -9, same text")
        _finish(axes, panel)
    figure.savefig(path)


def _draw(axes: Any, name: str, points: list[tuple[int, float]], color: str) -> None:
    """Few points with markers; a noisy training loss pale, with its running mean on top."""
    steps, values = zip(*points, strict=True)
    if name != "train/loss" or len(values) < _SMOOTHING:
        marker = "o" if len(values) < 30 else None
        axes.plot(steps, values, color=color, label=name, linewidth=1.6, marker=marker, markersize=4)
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    means, mean = [], values[0]
    for index, value in enumerate(values, start=1):
        mean += (value - mean) / min(index, _SMOOTHING)
        means.append(mean)
    axes.plot(steps, means, color=color, label=f"{name} (running mean)", linewidth=1.6)


def _draw_interval(axes: Any, name: str, history: History, color: str) -> None:
    low, high = (dict(history.get(f"{name}_{end}", ())) for end in ("low", "high"))
    steps = sorted(low.keys() & high.keys())
    if steps:
        ends = ([end[step] for step in steps] for end in (low, high))
        axes.fill_between(steps, *ends, color=color, alpha=0.2, linewidth=0, label="its interval")


def _finish(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if panel.from_zero:
        highest = max((max(line.get_ydata()) for line in axes.get_lines()), default=0.0)
        axes.set_ylim(0, 1.15 * highest or 1.0)
    axes.yaxis.set_major_formatter(_tick)
    if len(axes.get_lines()) + len(axes.collections) > 1:
        axes.legend(fontsize=8, frameon=False)


def _tick(value: float, position: int | None = None) -> str:
    """12k, 1.5M, 6e-3: short labels for an axis."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _paths(trainer: L.Trainer) -> dict[str, str]:
    """What the run has written: the loggers' files, Lightning's checkpoint, and what callbacks say of themselves."""
    paths: dict[str, str] = {}
    for logger in trainer.loggers:
        metrics = Path(logger.log_dir or "") / "metrics.csv"
        paths["metrics" if metrics.is_file() else type(logger).__name__] = str(
            metrics if metrics.is_file() else logger.log_dir or logger.save_dir
        )
    checkpoint = trainer.checkpoint_callback
    best = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
    if best:
        paths["Lightning checkpoint"] = str(best)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "written_paths"):
            paths |= callback.written_paths()
    return paths


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
