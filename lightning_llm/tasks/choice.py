"""From the arguments of ``LLMModule`` to the task that trains as they say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning_llm.tasks import TASKS
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.context_parallel_causal_lm import ContextParallelCausalLM
from lightning_llm.tasks.windowed_causal_lm import WindowedCausalLM
from lightning_llm.tasks.windowed_dpo import WindowedDPO

WINDOWED: dict[str, Callable[..., Task]] = {"causal-lm": WindowedCausalLM, "dpo": WindowedDPO}


def choose_task(
    name: str | Task,
    loss_kernel: Any,
    options: Mapping[str, Any] | None = None,
    *,
    sequence_window: int | str | None = None,
    offload: bool = False,
    context_parallel: bool = False,
) -> Task:
    """Make the task, after a look at what does not go together.

    Args:
        name: Of the task; one that is made already is taken as it is.
        loss_kernel: ``chunked``, ``plain``, ``liger`` or ``cce``.
        options: What this task takes beside.
        sequence_window: Tokens in a window; None for whole rows; ``auto`` for whole rows until a plan is made.
        offload: Whether windows keep keys, values and their gradients in host memory.
        context_parallel: Whether ranks share rows.

    Raises:
        ValueError: For an argument that is not understood, or two that do not go together.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, but got {name!r}.")
    if loss_kernel not in ("chunked", "plain", "liger", "cce"):
        raise ValueError(f"`loss_kernel` must be 'chunked', 'plain', 'liger' or 'cce', but got {loss_kernel!r}.")
    if not isinstance(offload, bool):
        raise ValueError(f"`offload` must be True or False, but got {offload!r}.")
    if isinstance(sequence_window, str) and sequence_window != "auto":
        raise ValueError(f"`sequence_window` must be a number of tokens or 'auto', but got {sequence_window!r}.")
    if sequence_window is not None and loss_kernel != "chunked":
        raise ValueError(f"Windows compute a loss of their own ('chunked'), not {loss_kernel!r}: leave that out.")
    if sequence_window is not None and context_parallel:
        raise ValueError("`sequence_window` and `context_parallel` do not go together yet: leave out one of them.")
    window = None if isinstance(sequence_window, str) else sequence_window
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"`sequence_window` must be a number of tokens, at least 1, but got {window!r}.")
    options = _known_options(name, options)
    if name != "causal-lm":
        _refuse_decoders_options(name, loss_kernel, sequence_window, context_parallel)
    if context_parallel:
        return ContextParallelCausalLM(loss_kernel)
    if window is None:
        return TASKS[name](loss_kernel, **options)
    return WINDOWED[name](window, offload, **options)


def _known_options(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = [option for option in inspect.signature(TASKS[name]).parameters if option != "loss_kernel"]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        takes = f"takes {', '.join(known)}" if known else "takes none"
        raise ValueError(f"`task_options` of {name!r}: it {takes}, but got {', '.join(unknown)}.")
    return dict(options or {})


def _refuse_decoders_options(name: str, loss_kernel: str, sequence_window: Any, context_parallel: bool) -> None:
    """What is there for decoders only."""
    if sequence_window == "auto" and name in WINDOWED:
        raise ValueError(
            f"`sequence_window='auto'` plans for the task 'causal-lm' only: give {name!r} a number of tokens, or leave "
            f"it out."
        )
    cannot_cut = sequence_window == "auto" or (sequence_window is not None and name not in WINDOWED)
    if cannot_cut or context_parallel:
        argument = "context_parallel" if context_parallel else "sequence_window"
        raise ValueError(
            f"`{argument}` cuts rows of the task 'causal-lm'; the model of {name!r} sees a row as a whole. For long "
            f"rows use gradient_checkpointing=True or offload=True, for many of them DynamicBatchScaler."
        )
    if loss_kernel in ("liger", "cce"):
        raise ValueError(f"loss_kernel={loss_kernel!r} is for 'causal-lm'; {name!r} takes 'chunked' or 'plain'.")
