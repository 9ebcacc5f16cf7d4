"""What a model is trained for: one small file per task, chosen by name in ``LLMModule(task=...)``."""

from lightning_llm.tasks.base import Task
from lightning_llm.tasks.causal_lm import CausalLM

TASKS: dict[str, type[Task]] = {task.name: task for task in (CausalLM,)}

__all__ = ["TASKS", "CausalLM", "Task"]
