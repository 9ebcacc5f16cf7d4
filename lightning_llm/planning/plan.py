"""Which ways of training a row of a given length fit into memory, and which of these is chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_llm.flops import matrix_flops
from lightning_llm.planning.live_memory import hollow_copy
from lightning_llm.planning.memory_size import format_size
from lightning_llm.planning.simulation import Need, Step, simulate
from lightning_llm.sequence_windows.attention import UnsupportedModelError
from lightning_llm.sequence_windows.head import base_model
from lightning_llm.sequence_windows.requirements import check_model

MARGIN = 0.1
"""Share of the memory that stays free: what kernels and the allocator take is not counted."""


@dataclass(frozen=True)
class Way:
    """A way to run a training step.

    Attributes:
        checkpointing: Whether each layer's activations are made again in backward.
        window: Tokens in a window along the sequence; None for no windows.
        offload: Whether keys, values and their gradients are in host memory.
        loss_kernel: ``chunked`` or ``plain`` (from logits, shown for comparison).
    """

    checkpointing: bool = False
    window: int | None = None
    offload: bool = False
    loss_kernel: str = "chunked"

    @property
    def name(self) -> str:
        """In words."""
        if self.window is not None:
            return f"windows of {self.window}{', offloaded' if self.offload else ''}"
        name = "checkpointing" if self.checkpointing else "plain"
        return name if self.loss_kernel == "chunked" else f"{name}, with logits"


@dataclass(frozen=True)
class Option:
    """A way, and what it takes.

    Attributes:
        way: The way.
        needs: Peak memory at the length asked for, which is first, and at a shorter and a longer one; by length.
        time: Floating-point operations relative to ``plain``.
    """

    way: Way
    needs: dict[int, Need]
    time: float

    @property
    def need(self) -> Need:
        """Peak memory at the length asked for."""
        return next(iter(self.needs.values()))

    def longest(self, room: float) -> int:
        """The longest row that fits into so many bytes, on straight lines through the lengths that were tried.

        Args:
            room: Bytes on the device.

        Returns:
            Tokens; 0 if none fits.
        """
        points = sorted((length, need.total) for length, need in self.needs.items())
        (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if room <= pair[1][1]), points[-2:])
        if y1 <= y0:
            return x1 if room >= y1 else 0
        return max(0, int(x0 + (room - y0) * (x1 - x0) / (y1 - y0)))


@dataclass(frozen=True)
class Plan:
    """Ways to train rows of a length in a memory, and the choice among them.

    Attributes:
        length: Tokens in a row.
        memory: Bytes of the device.
        options: All ways, in the order in which they are tried: plain, checkpointing, windows (the largest first), and
            the same windows offloaded.
        chosen: The first that fits; None if none does.
        reason: The choice in one line.
        note: Why windows were left out, or empty.
    """

    length: int
    memory: float
    options: tuple[Option, ...]
    chosen: Way | None
    reason: str
    note: str = ""

    def __str__(self) -> str:
        """The table, and the choice."""
        room = self.memory * (1 - MARGIN)
        lines = [f"{'':<30}{'memory':>10}{'host':>10}{'time':>7}{'longest row':>14}   fits"]
        for option in self.options:
            longest = option.longest(room)
            fits = option.need.total <= room
            lines.append(
                f"{option.way.name:<30}{format_size(option.need.total):>10}"
                f"{format_size(option.need.host) if option.need.host else '-':>10}{option.time:>7.2f}"
                f"{longest:>14}   {'yes' if fits else 'no'}"
                f"{' <-' if option.way == self.chosen else ''}"
            )
        return "\n".join([*lines, *([self.note] if self.note else []), self.reason])

    def parts(self) -> str:
        """What each way's memory consists of, as a table."""
        names = [field.name for field in fields(Need) if field.name != "host"]
        lines = [f"{'':<30}" + "".join(f"{name.replace('_', ' '):>17}" for name in names)]
        lines += [
            f"{option.way.name:<30}" + "".join(f"{format_size(getattr(option.need, name)):>17}" for name in names)
            for option in self.options
        ]
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    length: int,
    memory: float,
    step: Step | None = None,
    *,
    windows: Sequence[int] | None = None,
    offload: bool = True,
    with_logits: bool = True,
) -> Plan:
    """Find a way to train rows of a length in a memory: the first that fits.

    No weight is allocated: the step runs on tensors without data, at three lengths for each way. Needs of windows
    between the smallest and the largest are taken from these two, on the straight line, which lies above.

    Args:
        model: A causal language model, best on the meta device; it is not changed.
        length: Tokens in a row.
        memory: Bytes of the device. A tenth of it stays free.
        step: What a training step is like.
        windows: Windows to consider; powers of two if None.
        offload: Whether keys and values may be kept in host memory.
        with_logits: Whether the loss from logits is shown, for comparison.

    Raises:
        ValueError: If ``length`` or ``memory`` is not positive, or the model cannot be run without data.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> with torch.device("meta"):
        ...     model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2))
        >>> make_plan(model, 512, 1e9).chosen.name
        'plain'
    """
    if length < 16 or memory <= 0:
        raise ValueError(
            f"Expected `max_length` of 16 tokens or more and `memory` above 0, but got {length}, {memory}."
        )
    step = step or Step()
    model = hollow_copy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a model's deprecated switches
            options = [
                _option(model, step, length, way) for way in _WHOLE if with_logits or way.loss_kernel == "chunked"
            ]
            windowed, note = _windowed_options(model, step, length, windows)
    except RuntimeError as error:
        raise ValueError(
            f"{type(base_model(model)).__name__} cannot be planned: its code looks at values of tensors, which have "
            f"none here ({str(error).splitlines()[0]}). Choose `gradient_checkpointing` or `sequence_window` yourself."
        ) from error
    return choose(length, memory, [*options, *(o for o in windowed if offload or not o.way.offload)], note)


_WHOLE = (Way(), Way(checkpointing=True), Way(loss_kernel="plain"), Way(checkpointing=True, loss_kernel="plain"))


def choose(length: int, memory: float, options: Sequence[Option], note: str = "") -> Plan:
    """Choose the first option that fits, and say why.

    Args:
        length: Tokens in a row.
        memory: Bytes of the device.
        options: In the order in which they are tried; those with logits are shown, not chosen.
        note: Of the plan.
    """
    room = memory * (1 - MARGIN)
    eligible = [option for option in options if option.way.loss_kernel == "chunked"]
    chosen = next((option for option in eligible if option.need.total <= room), None)
    return Plan(
        length,
        memory,
        tuple(options),
        None if chosen is None else chosen.way,
        _reason(length, memory, eligible, chosen),
        note,
    )


def _reason(length: int, memory: float, options: Sequence[Option], chosen: Option | None) -> str:
    of = f"of {format_size(memory)} (a tenth stays free)"
    if chosen is None:
        least = min(options, key=lambda option: option.need.total)
        longest = max(options, key=lambda option: option.longest(memory * (1 - MARGIN)))
        tokens = longest.longest(memory * (1 - MARGIN))
        most = f"The longest row that fits has {tokens} tokens ({longest.way.name})." if tokens else "No row fits."
        need = format_size(least.need.total)
        return f"nothing fits: rows of {length} tokens need {need} or more ({least.way.name}) {of}. {most}"
    before = options[: options.index(chosen)]
    named = [option for option in before if option.way.window is None]
    named += [option for option in before if option.way.window and not option.way.offload][-1:]
    need = format_size(chosen.need.total)
    if not before:
        return f"{chosen.way.name}: it needs {need} {of}, and nothing is faster"
    if chosen.way.checkpointing:
        small = next((o for o in options if o.way.window and o.need.total < chosen.need.total), None)
        text = f"{chosen.way.name}: it needs {need}; plain needs {format_size(before[0].need.total)} {of}"
        if small is not None:
            text += f"; {small.way.name} would need {format_size(small.need.total)} but take no less time"
        return text
    return (
        f"{chosen.way.name}: needs {need}; "
        + ", ".join(f"{option.way.name} {format_size(option.need.total)}" for option in named)
        + f" {of}"
    )


# ---- options ---------------------------------------------------------------------------------------------------------


def _option(model: nn.Module, step: Step, length: int, way: Way) -> Option:
    step = replace(step, loss_kernel=way.loss_kernel)
    needs = {
        tokens: simulate(model, step, tokens, checkpointing=way.checkpointing, window=way.window)
        for tokens in (length, length // 4, 8 * length)
    }
    return Option(way, needs, _time(model, length, way))


def _windowed_options(
    model: nn.Module, step: Step, length: int, windows: Sequence[int] | None
) -> tuple[list[Option], str]:
    """Largest window first, as it reads the keys least often; then the same offloaded."""
    sizes = sorted({*(windows if windows is not None else _powers(length))}, reverse=True)
    sizes = [size for size in sizes if size < length]
    if not sizes:
        return [], ""
    try:
        check_model(model, length, sizes[-1], is_packed=False)
        ends = {size: _option(model, step, length, Way(window=size)) for size in {sizes[0], sizes[-1]}}
    except UnsupportedModelError as error:
        return [], f"Without windows: {error}"
    options = [_between(model, size, ends[sizes[-1]], ends[sizes[0]]) for size in sizes]
    config: Any = base_model(model).config.get_text_config(decoder=True)
    return [*options, *(_offloaded(option, config.num_hidden_layers) for option in options)], ""


def _powers(length: int) -> list[int]:
    """Powers of two from 256 tokens (fewer in short rows) to half a row."""
    largest = int(math.log2(length // 2))
    smallest = min(8, max(1, largest - 2))
    return [2**power for power in range(smallest, largest + 1)]


def _between(model: nn.Module, window: int, small: Option, large: Option) -> Option:
    assert small.way.window is not None
    assert large.way.window is not None
    span = large.way.window - small.way.window
    share = (window - small.way.window) / span if span else 0.0

    def mix(a: Need, b: Need) -> Need:
        values = {f.name: getattr(a, f.name) * (1 - share) + getattr(b, f.name) * share for f in fields(Need)}
        return Need(**values)

    way = Way(window=window)
    needs = {length: mix(need, large.needs[length]) for length, need in small.needs.items()}
    return Option(way, needs, _time(model, next(iter(needs)), way))


def _offloaded(option: Option, layers: int) -> Option:
    """On the device are the keys and values of two layers, and the gradients of one; on the host those of all."""
    share = min(1.0, 1.5 / layers)
    needs = {
        length: replace(need, keys_and_values=need.keys_and_values * share, host=need.keys_and_values)
        for length, need in option.needs.items()
    }
    return Option(replace(option.way, offload=True), needs, option.time)


def _time(model: nn.Module, length: int, way: Way) -> float:
    """Floating-point operations relative to those of ``plain``: what is run again, without the head."""
    config: Any = base_model(model).config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 12.0 * config.num_hidden_layers * heads * head_dim * length
    total = matrix_flops(model) + attention
    find: Any = base_model(model).get_output_embeddings
    head = find()
    matrices = sum(p.numel() for p in base_model(model).parameters() if p.ndim >= 2)
    embedding = base_model(model).get_input_embeddings().weight
    layers = matrices - embedding.numel() - (0 if head is None or head.weight is embedding else head.weight.numel())
    again = float(2.0 * layers + attention / 3)
    if way.window is not None:
        return float(1.0 + (1 - way.window / length) * again / total)
    return float(1.0 + again / total) if way.checkpointing else 1.0
