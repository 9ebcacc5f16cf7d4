"""From the arguments of ``LLMModule`` to the task that trains as they say."""

from __future__ import annotations

from typing import Any

from lightning_llm.tasks import TASKS
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.context_parallel_causal_lm import ContextParallelCausalLM
from lightning_llm.tasks.windowed_causal_lm import WindowedCausalLM


def choose_task(
    name: str, loss_kernel: Any, *, sequence_window: int | str | None, offload: bool, context_parallel: bool
) -> Task:
    """Make the task, after a look at what does not go together.

    Args:
        name: Of the task.
        loss_kernel: ``chunked``, ``plain``, ``liger`` or ``cce``.
        sequence_window: Tokens in a window; None for whole rows; ``auto`` for whole rows until a plan is made.
        offload: Whether windows keep keys, values and their gradients in host memory.
        context_parallel: Whether ranks share rows.

    Raises:
        ValueError: For an argument that is not understood, or two that do not go together.
    """
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
    if context_parallel:
        return ContextParallelCausalLM(loss_kernel)
    if sequence_window is None or isinstance(sequence_window, str):
        return TASKS[name](loss_kernel)
    return WindowedCausalLM(sequence_window, offload)
