"""The LightningModule of several tasks on one trunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_llm.loss import TokenLoss
from lightning_llm.module import LLMModule
from lightning_llm.multi_task.model import MultiTaskModel
from lightning_llm.multi_task.step import TaskMicroBatch, TaskStep, touch
from lightning_llm.multi_task.task import MultiTask
from lightning_llm.multi_task.weighting import make_weighting, task_weights
from lightning_llm.pretrained import build_model, resolve_dtype
from lightning_llm.step_window import MicroBatch
from lightning_llm.tasks.sequence_classification import SequenceClassification

_OF_ONE_TASK = ("task", "labels", "task_options", "sequence_window", "context_parallel")
_OF_ONE_MODEL = ("peft", "quantization", "checkpoint")


class MultiTaskModule(LLMModule):
    r"""Several tasks that train one trunk, each with a head of its own.

    .. math:: L = \sum_t w_t \frac{1}{N_t} \sum_{i} \ell_{t,i}

    where :math:`N_t` is the number of the task's targets in the whole optimizer step, over all micro-batches and ranks.
    So the gradient of each task is the mean over its own targets, however its rows are cut. The sum must be known
    before the first backward of a step: batches carry it as ``step_targets``, as
    :class:`~lightning_llm.datamodules.MultiTaskDataModule` writes it, beside ``task``, which names their task. Needs
    :class:`~lightning_llm.callbacks.TokenWeightedAccumulation`.

    A task without a target in a step adds nothing, and its head is left as it is: no momentum, no decay.

    Logged: ``train/loss`` (the step's :math:`L`), ``train/<task>/loss``, ``train/<task>/weight`` unless they are fixed;
    ``val/<task>/<metric>``, and ``val/loss``, the sum of the tasks' losses by ``weights``; the same under ``test/``.

    Args:
        model: As in :class:`~lightning_llm.LLMModule`, but not built: each task's model is built on the same base.
        tasks: By name: a task as ``LLMModule(task=...)`` names it, or a mapping with ``task`` and perhaps ``labels``
            and ``task_options``. Names stand in metrics, checkpoints and folders.
        weights: By task, above 0; 1 where nothing is said.
        weighting: ``fixed``: ``weights`` as they are. ``uncertainty``: variances are learned
            (:class:`~lightning_llm.multi_task.weighting.UncertaintyWeighting`). ``gradient_norm``: all tasks' gradients
            are made equally long at the last layer that all share
            (:class:`~lightning_llm.multi_task.weighting.GradientNormWeighting`); causal language models then make all
            their logits.
        weighting_options: Of ``gradient_norm``: ``alpha`` and ``decay``.
        **options: Of :class:`~lightning_llm.LLMModule`: optimizer, schedule, memory, types.

    Raises:
        ValueError: For tasks, weights and options that are not understood.

    Example:
        >>> tiny = {"model_type": "bert", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1}
        >>> tiny |= {"num_attention_heads": 2, "intermediate_size": 8}
        >>> topic = {"task": "sequence-classification", "labels": ["news", "science", "sport"]}
        >>> module = MultiTaskModule(tiny, {"topic": topic, "lm": "masked-lm"})
        >>> module.configure_model()  # the Trainer does this
        >>> sorted(module.model.tasks)
        ['lm', 'topic']

    References:
        Caruana, Multitask Learning, 1997 (a shared trunk, heads of their own).
    """

    task: MultiTask

    def __init__(
        self,
        model: str | dict[str, Any] | Any,
        tasks: dict[str, str | dict[str, Any]],
        weights: dict[str, float] | None = None,
        weighting: Literal["fixed", "uncertainty", "gradient_norm"] = "fixed",
        weighting_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        for name in _OF_ONE_TASK:
            if options.pop(name, None) not in (None, False, "causal-lm"):  # which the command line passes as defaults
                raise ValueError(f"`{name}` is for one task: MultiTaskModule has `tasks`, each with its own settings.")
        for name in _OF_ONE_MODEL:
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"`{name}` is for one model: MultiTaskModule trains its trunk and all heads whole. Leave it out."
                )
        if isinstance(model, nn.Module):
            raise ValueError(
                f"MultiTaskModule builds a model for each task, but got a built {type(model).__name__}. Pass its "
                f"folder, hub id or configuration."
            )
        known = task_weights(list(tasks) if isinstance(tasks, Mapping) else [], weights)
        rule, kernel = make_weighting(weighting, known, weighting_options), options.get("loss_kernel", "chunked")
        if rule.measures and kernel in ("liger", "cce"):
            raise ValueError(
                f"weighting={weighting!r} goes through each loss backwards twice, which loss_kernel={kernel!r} does "
                f"not allow. Leave it out."
            )
        # The chunked loss of a decoder gives its gradient away once too.
        task = MultiTask(tasks, known, "plain" if rule.measures and kernel == "chunked" else kernel)
        super().__init__(model, task=task, **options)
        self.save_hyperparameters(ignore=["model", *_OF_ONE_TASK, *_OF_ONE_MODEL])
        self.weighting = rule
        self._step = TaskStep(list(task.tasks))
        self._task_batch: TaskMicroBatch | None = None

    # ---- the model -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that the losses will be weighed as they say, and as in ``LLMModule``."""
        if self.device_mesh is not None:
            raise ValueError(
                "MultiTaskModule trains whole models: use one device or DDPStrategy, and gradient_checkpointing=True "
                "or DynamicBatchScaler for memory. Sharded parameters are gathered by a model's forward, and here each "
                "task has one of its own."
            )
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(getattr(each, "normalizes_gradients", False) for each in callbacks):
            raise ValueError(
                "MultiTaskModule needs the callback TokenWeightedAccumulation: without it, Lightning takes the mean of "
                "micro-batches, and a task with many targets in few of them would count too little or too much."
            )
        super().setup(stage)

    def _build(self, load_weights: bool) -> nn.Module:
        models = {}
        for name, task in self.task.tasks.items():
            model = build_model(
                self.source,
                self.task.configs[name],
                task.auto_class,
                dtype=resolve_dtype(self.dtype_name),
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                load_weights=load_weights,
                fresh_head=task.has_labels,
            )
            models[name] = task.complete(model, self.source if load_weights else None)
        return MultiTaskModel(models)

    def plan(self, *args: Any, **options: Any) -> Any:
        """Plans are made for one task: ask an ``LLMModule`` with the largest one.

        Raises:
            ValueError: Always.
        """
        raise ValueError("Plans are made for one task: ask LLMModule(model, task=...).plan(...) with the largest one.")

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, task: str | None = None, **options: Any) -> Tensor:
        """As ``LLMModule.generate``, with the model of a task that writes.

        Args:
            input_ids: (batch, seq) int64.
            task: Its name; None where one task writes.
            **options: As in transformers.

        Raises:
            ValueError: If that task does not write, or it is not clear which.
        """
        writing = [name for name, each in self.task.tasks.items() if each.generates]
        if task is None and len(writing) == 1:
            task = writing[0]
        if task not in writing:
            raise ValueError(f"`task` must be one that writes (of {writing}), but got {task!r}.")
        self.configure_model()
        model: Any = self._multi_task_model().tasks[task]
        was_training = model.training
        model.eval()
        try:
            tokens: Tensor = model.generate(input_ids, **options)
        finally:
            model.train(was_training)
        return tokens

    # ---- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The micro-batch's part of the step's objective, so that the token-weighted mean of all is the objective.

        With n targets of the task's N_t, of N in the step: loss = (N / n) * objective / N_t, weight n.
        """
        name = self.task.name_of(batch)
        targets = self._step_targets(batch)
        with self._offloaded():
            loss = self.task.loss(self._built(), self._checked(batch))
        part = self.weighting.objective(name, loss, self.task.is_squared(name)) / max(targets[name], 1)
        mean = part * sum(targets.values()) / loss.num_tokens.clamp(min=1)
        gradient = None
        if self.weighting.measures:
            (gradient,) = torch.autograd.grad(
                loss.total, self._multi_task_model().last_shared_matrix(), retain_graph=True
            )
        self._task_batch = TaskMicroBatch(name, TokenLoss(loss.total.detach(), loss.num_tokens), gradient, targets)
        weighted = TokenLoss(mean.detach() * loss.num_tokens, loss.num_tokens)
        self._micro_batch = MicroBatch(batch_idx, batch.get("row_ids"), weighted)
        return {"loss": mean + touch(self._others(name)).to(mean), "num_tokens": loss.num_tokens}

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget an accumulation window that was left unfinished."""
        super().on_before_zero_grad(optimizer)
        self._step.clear()

    def on_after_backward(self) -> None:
        """Count the micro-batch, now that its gradient is there."""
        super().on_after_backward()
        if self._task_batch is not None:
            self._step.add(self._task_batch)
        self._task_batch = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """As in ``LLMModule``; leave tasks without a target alone, log the others, weigh the next step's."""
        super().on_before_optimizer_step(optimizer)
        if not self._step:
            return
        found = self._step.finish(self.trainer)
        for name, parameters in self._own_parameters().items():
            if name not in found.losses:
                for parameter in parameters:
                    parameter.grad = None
        self.log_dict({f"train/{name}/loss": value for name, value in found.losses.items()}, batch_size=1)
        if self.weighting.changes:
            weights = self.weighting.current()
            self.log_dict({f"train/{name}/weight": weights[name] for name in found.losses}, batch_size=1)
        self.weighting.after_step(found.losses, found.norms)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in ``LLMModule``, with each task's classes, so that loading needs no data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["tasks"] = {name: self._spec(name) for name in self.task.tasks}

    # ---- details -------------------------------------------------------------------------------------------------

    def _spec(self, name: str) -> dict[str, Any]:
        """A task as it now is: with the classes that its data named."""
        given = self.hparams["tasks"][name]
        spec: dict[str, Any] = {"task": given} if isinstance(given, str) else dict(given)
        task, config = self.task.tasks[name], self.task.configs[name]
        if task.has_labels and name in self.task.configs:
            any_config: Any = config
            spec["labels"] = [str(any_config.id2label[index]) for index in range(any_config.num_labels)]
        if isinstance(task, SequenceClassification):
            spec["task_options"] = {**(spec.get("task_options") or {}), "problem_type": task.problem_type}
        return spec

    def _trained(self) -> nn.Module:
        return self  # the model, and what the weighting learns

    def _multi_task_model(self) -> MultiTaskModel:
        model = self._built()
        assert isinstance(model, MultiTaskModel)
        return model

    def _own_parameters(self) -> dict[str, list[nn.Parameter]]:
        learned = self.weighting.own_parameters()
        return {name: [*own, *learned[name]] for name, own in self._multi_task_model().own_parameters().items()}

    def _others(self, name: str) -> list[nn.Parameter]:
        """What a backward of the task does not reach."""
        reached = {*self._multi_task_model().tasks[name].parameters(), *self.weighting.own_parameters()[name]}
        return [parameter for parameter in self.parameters() if parameter not in reached]

    def _step_targets(self, batch: Mapping[str, Any]) -> dict[str, int]:
        targets = batch.get("step_targets")
        if not isinstance(targets, Mapping) or set(targets) != set(self.task.tasks):
            got = (
                f"`step_targets` for {sorted(targets)}" if isinstance(targets, Mapping) else f"the keys {sorted(batch)}"
            )
            raise KeyError(
                f"A batch of several tasks says how many targets each task has in the whole optimizer step, over all "
                f"its micro-batches and all ranks: batch['step_targets'] = {{name: number}} for each of "
                f"{', '.join(self.task.tasks)}, but got {got}. MultiTaskDataModule writes them; in a loader of your "
                f"own count with `module.num_targets(batch)`."
            )
        return {name: int(targets[name]) for name in self.task.tasks}

    def _checked(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        name = self.task.name_of(batch)
        task, model = self.task.tasks[name], self._multi_task_model().tasks[name]
        self.task.check(batch, self.config)
        return self._packing.isolated(batch, model, task.outputs, self.device) if task.packs else batch

    def _check_datamodule(self) -> None:
        parts = getattr(getattr(self.trainer, "datamodule", None), "tasks", {})
        for name, part in parts.items():
            by_name = getattr(part, "windowing", None) in ("packed", "wrapped")
            if getattr(part, "packs_documents", by_name):
                task = self.task.tasks[name]
                task.check_packing()
                with self.trainer.precision_plugin.forward_context():
                    self._packing.check_model(self._multi_task_model().tasks[name], task.outputs, self.device)

    def _prepare_layers(self, model: nn.Module) -> None:
        assert isinstance(model, MultiTaskModel)
        packs = any(task.packs for task in self.task.tasks.values())
        for part in model.tasks.values():  # all alike: shared layers ask the configuration of one of them
            self._prepare(part, packs)
