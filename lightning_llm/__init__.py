"""Train large language models with PyTorch Lightning: large batches, long sequences, gradient accumulation.

Public names are imported on first use, so that ``import lightning_llm.callbacks`` stays free of transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_llm.activation_offload import ActivationOffload
    from lightning_llm.context_parallel.loss import context_parallel_loss, context_parallel_nll
    from lightning_llm.duration import Duration
    from lightning_llm.int8_export import export_int8
    from lightning_llm.isolation import verify_packing
    from lightning_llm.module import LLMModule
    from lightning_llm.multi_task.module import MultiTaskModule
    from lightning_llm.ramps import ramp
    from lightning_llm.run_length import total_optimizer_steps
    from lightning_llm.schedule import Progress, Schedule
    from lightning_llm.seesaw import Seesaw
    from lightning_llm.windowed import windowed_loss, windowed_nll

__version__ = "0.1.0"
__all__ = [
    "ActivationOffload",
    "Duration",
    "LLMModule",
    "MultiTaskModule",
    "Progress",
    "Schedule",
    "Seesaw",
    "__version__",
    "context_parallel_loss",
    "context_parallel_nll",
    "export_int8",
    "ramp",
    "total_optimizer_steps",
    "verify_packing",
    "windowed_loss",
    "windowed_nll",
]

_HOME = {
    "ActivationOffload": "lightning_llm.activation_offload",
    "Duration": "lightning_llm.duration",
    "LLMModule": "lightning_llm.module",
    "MultiTaskModule": "lightning_llm.multi_task.module",
    "Progress": "lightning_llm.schedule",
    "Schedule": "lightning_llm.schedule",
    "Seesaw": "lightning_llm.seesaw",
    "context_parallel_loss": "lightning_llm.context_parallel.loss",
    "context_parallel_nll": "lightning_llm.context_parallel.loss",
    "export_int8": "lightning_llm.int8_export",
    "ramp": "lightning_llm.ramps",
    "total_optimizer_steps": "lightning_llm.run_length",
    "verify_packing": "lightning_llm.isolation",
    "windowed_loss": "lightning_llm.windowed",
    "windowed_nll": "lightning_llm.windowed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
