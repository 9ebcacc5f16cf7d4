"""The task that is made of tasks: each batch names its own."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.loss import TokenLoss
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.choice import choose_task
from lightning_llm.tasks.sequence_classification import SequenceClassification

TaskSpec = str | Mapping[str, Any]

_KNOWN = ("task", "labels", "task_options")
_ALONE = {
    "dpo": "it compares with a frozen copy of the whole model",
    "embedding": "its loss is of a whole batch, which several tasks would share",
}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class MultiTask(Task):
    """Several tasks; ``batch["task"]`` says which of them a batch is for.

    Args:
        specs: By name: a task as ``LLMModule(task=...)`` names it, or a mapping with ``task`` and, as in ``LLMModule``,
            ``labels`` and ``task_options``.
        weights: Of the tasks in the ``loss`` that metrics add up.
        loss_kernel: As for every task; ``liger`` and ``cce`` for causal language models among them.

    Attributes:
        tasks: The tasks by name.
        configs: Their configurations by name, once :meth:`configure` was called.

    Raises:
        ValueError: For a name or an entry that is not understood.
    """

    name = "multi-task"
    auto_class = "AutoModel"

    def __init__(
        self, specs: Mapping[str, TaskSpec], weights: Mapping[str, float], loss_kernel: Any = "chunked"
    ) -> None:
        super().__init__(loss_kernel)
        if not isinstance(specs, Mapping) or not specs:
            raise ValueError(f"`tasks` must be a mapping of names to tasks, one at least, but got {specs!r}.")
        self.weights = dict(weights)
        self.tasks: dict[str, Task] = {}
        self.labels: dict[str, Any] = {}
        self.configs: dict[str, PretrainedConfig] = {}
        for name, spec in specs.items():
            _check_name(name)
            given: dict[str, Any] = (
                {"task": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
            )
            if "task" not in given or not set(given) <= set(_KNOWN):
                raise ValueError(
                    f"The task {name!r} must be a name such as 'masked-lm', or a mapping with `task` and perhaps "
                    f"`labels` and `task_options`, but got {spec!r}."
                )
            if given["task"] in _ALONE:
                raise ValueError(f"The task {name!r}: {given['task']!r} trains alone, as {_ALONE[given['task']]}.")
            kernel = loss_kernel if given["task"] == "causal-lm" or loss_kernel == "plain" else "chunked"
            self.tasks[name] = choose_task(given["task"], kernel, given.get("task_options"))
            self.labels[name] = given.get("labels")

    # ---- which task ----------------------------------------------------------------------------------------------

    def name_of(self, batch: Mapping[str, Any]) -> str:
        """The task that a batch is for.

        Raises:
            KeyError: If it names none.
            ValueError: If it names another.
        """
        if "task" not in batch:
            raise KeyError(
                f"A batch of several tasks names its own as batch['task'], one of {', '.join(self.tasks)}, but got the "
                f"keys {sorted(batch)}. MultiTaskDataModule makes such batches."
            )
        name = batch["task"]
        if name not in self.tasks:
            raise ValueError(f"A batch is for the task {name!r}, but the module has {', '.join(self.tasks)}.")
        return str(name)

    def of(self, batch: Mapping[str, Any]) -> Task:
        """The task that a batch is for."""
        return self.tasks[self.name_of(batch)]

    def is_squared(self, name: str) -> bool:
        """Whether a task's loss is a squared error, and no negative log-likelihood."""
        task = self.tasks[name]
        return isinstance(task, SequenceClassification) and task.problem_type == "regression"

    # ---- what a task does ----------------------------------------------------------------------------------------

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """A configuration for each task: the same model, classes of its own; those that its data module knows."""
        if labels is not None:
            raise ValueError("`labels` belong to one of the tasks: tasks={'topic': {'task': ..., 'labels': [...]}}.")
        parts = getattr(datamodule, "tasks", None)
        parts = parts if isinstance(parts, Mapping) else {}
        if parts and set(parts) != set(self.tasks):
            raise ValueError(
                f"The module has the tasks {', '.join(sorted(self.tasks))}, the data module "
                f"{', '.join(sorted(parts))}: they must be the same. A task without data is learned by nobody."
            )
        for name, task in self.tasks.items():
            own: Any = self.configs.setdefault(name, copy.deepcopy(config))
            for token in _SPECIAL_TOKENS:  # of the tokenizer, once that is known
                if hasattr(config, token):
                    setattr(own, token, getattr(config, token))
            try:
                task.configure(own, self.labels[name], datamodule=parts.get(name), is_built=is_built)
            except ValueError as error:
                raise ValueError(f"The task {name!r}: {error}") from error

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """As the batch's own task does."""
        name = self.name_of(batch)
        self.tasks[name].check(batch, self.configs[name])

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """As the batch's own task does."""
        return self.of(batch).loss(self._model(model, batch), batch)

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """As the batch's own task does."""
        return self.of(batch).num_targets(batch)

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As the batch's own task does; with the ``task`` of each row."""
        scores = self.of(batch).score(self._model(model, batch), batch)
        num_rows = len(next(iter(scores.values())))
        return {**scores, "task": [self.name_of(batch)] * num_rows}

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As the batch's own task does."""
        return self.of(batch).outputs(self._model(model, batch), batch)

    def metrics(self, source_names: Sequence[str] = ()) -> MultiTaskMetrics:
        """The metrics of each task."""
        return MultiTaskMetrics({name: task.metrics() for name, task in self.tasks.items()}, self.weights)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: MultiTaskMetrics) -> None:
        """As the batch's own task does."""
        self.of(batch).evaluate(self._model(model, batch), batch, metrics.tasks[self.name_of(batch)])

    def _model(self, model: nn.Module, batch: Mapping[str, Any]) -> nn.Module:
        any_model: Any = model
        found: nn.Module = any_model.tasks[self.name_of(batch)]
        return found


class MultiTaskMetrics(nn.Module):
    """The metrics of several tasks, each under its name, and ``loss``, the weighted sum of their losses.

    Args:
        metrics: By task.
        weights: By task; they stay, so that ``loss`` means the same in every validation.
    """

    def __init__(self, metrics: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(metrics)
        self.weights = dict(weights)

    def compute(self) -> dict[str, Tensor]:
        """``<task>/<metric>`` of the tasks that had a target, and ``loss`` if all had; the same on every rank."""
        values: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for name, metrics in self.tasks.items():
            any_metrics: Any = metrics
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*``compute`` method of metric.*before the ``update``")
                found = any_metrics.compute()
            if "loss" in found:
                values |= {f"{name}/{key}": value for key, value in found.items()}
                losses.append(self.weights[name] * found["loss"])
        if len(losses) == len(self.tasks):
            values["loss"] = sum(losses[1:], losses[0])
        return values

    def reset(self) -> None:
        """Forget all."""
        for metrics in self.tasks.values():
            any_metrics: Any = metrics
            any_metrics.reset()


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"A task's name stands in metrics, weights and folders: letters, digits, '_' and '-', and no word that "
            f"torch keeps for modules ('train', 'type', ...), but got {name!r}."
        )
