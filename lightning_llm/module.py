"""The LightningModule around a Hugging Face model: loss, metrics, optimizer, and nothing that a Trainer owns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from lightning_llm.activation_offload import ActivationOffload, warn_if_on_host
from lightning_llm.adapters import adapter_fields, add_adapter, check_adapter, check_sharding, warn_of_fixed_ranks
from lightning_llm.compatibility import check_length, check_vocabulary, take_special_tokens
from lightning_llm.context_parallel.mesh import sharing_group
from lightning_llm.duration import Duration
from lightning_llm.learning_rate import make_schedule
from lightning_llm.loss import NonFiniteLossError, TokenLoss
from lightning_llm.optimizers import ADAMW_BETAS, ADAMW_EPS, make_optimizer, optimizer_class
from lightning_llm.packed_attention import use_packed_attention
from lightning_llm.packing_guard import PackingGuard
from lightning_llm.parallel import data_parallel_size
from lightning_llm.partial_checkpoint import check_source, check_strategy, complete, keep_trained, note_classes
from lightning_llm.planning.of_module import plan_of_trainer, plan_source
from lightning_llm.planning.plan import Plan
from lightning_llm.pretrained import build_model, is_complete, resolve_config, resolve_dtype
from lightning_llm.quantization import check_quantization, check_training
from lightning_llm.run_length import tokens_of, total_optimizer_steps
from lightning_llm.sharding import build_sharded, copy_sharded, mesh_to_shard
from lightning_llm.step_window import MicroBatch, StepWindow
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.choice import choose_task
from lightning_llm.tasks.context_parallel_causal_lm import ContextParallelCausalLM
from lightning_llm.tasks.windowed_causal_lm import WindowedCausalLM
from lightning_llm.virtual_tokens import check_room


class LLMModule(L.LightningModule):
    """A Hugging Face model to train, validate, test and predict with in any Lightning Trainer.

    ``training_step`` takes Hugging Face batches, as transformers' collators make them for the task, and returns
    ``{"loss": mean over targets, "num_tokens": how many}``: label tokens of language models, rows of classifiers.

    Logged: ``train/loss`` (mean over the targets of the whole optimizer step and all ranks), ``val/loss`` and the
    task's other metrics, the same under ``test/``. For ``causal-lm`` these are ``val/perplexity``,
    ``val/bits_per_byte`` (where batches carry ``num_bytes``), ``val/bits_per_word`` and ``val/word_perplexity``
    (``num_words``); if the data module has several ``source_names`` and its batches ``source_ids``, one per row, the
    same for each source, as ``val/loss/<source>`` and so on.

    Args:
        model: A hub id or local folder (pretrained weights), a mapping with ``model_type`` and the fields of a
            transformers configuration (random weights), a ``PretrainedConfig`` (random weights), or a built model.
        task: What is trained: ``causal-lm``, ``masked-lm``, ``seq2seq``, ``sequence-classification``,
            ``token-classification``, ``question-answering``, ``image-classification``, ``audio-classification``,
            ``dpo``, ``embedding``; or a :class:`~lightning_llm.tasks.base.Task` of your own.
        labels: A classifier's classes, names or how many; if None the data module's ``label_names``, else the model's.
        task_options: What the task takes beside, such as ``{"problem_type": "multi_label_classification"}``; see
            :mod:`lightning_llm.tasks`.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of matrices; biases, norms and other vectors do not decay.
        betas: Decay rates of AdamW's two averages; those of another optimizer stand in ``optimizer_options``.
        eps: Added to the denominator of AdamW's update.
        optimizer: ``adamw``, in one fused kernel where it can be; another of torch's by its name (``sgd``); one of the
            package pytorch-optimizer (``lamb``, ``lars``, ``lion``, ...); or the import path of a class. Not all of
            that package step sharded parameters (FSDP2): ``lars`` does with ``{"foreach": False}``, ``lamb`` does not.
        optimizer_options: Further arguments of the optimizer, for instance ``{"momentum": 0.9}``.
        lr_schedule: Name of a transformers schedule: ``linear``, ``cosine``, ``constant``, ``cosine_with_min_lr``,
            ``warmup_stable_decay``, ``inverse_sqrt``, ...; or ``quarter_cosine``.
        warmup: Length of the warm-up: ``"500 steps"`` or 500, ``"2M tokens"``, ``"5%"`` or 0.05 of the run.
        lr_schedule_options: Further options of the schedule, for instance ``{"min_lr_rate": 0.1}``.
        lr_schedule_length: How long the schedule takes. None: the run, by its optimizer steps. ``"2B tokens"``, ``"1
            epoch"``, ``"100%"`` of the epochs: by the tokens trained on, so that a batch that changes does not change
            the learning rate of any token. ``"5k steps"``: by steps, then constant.
        gradient_checkpointing: Recompute each layer's activations in backward instead of keeping them.
        sequence_window: Cut each row into windows of so many tokens: the exact gradient in the memory of a window, and
            of the keys and values of the row, at the cost of another forward pass. See
            :func:`~lightning_llm.windowed.windowed_loss` for the models that allow it. None: no windows. ``auto``: as
            :meth:`plan` chooses for the data module's ``max_length`` and the device's memory when training begins: no
            windows, gradient checkpointing, or windows.
        offload: Keep in host memory what the backward needs: saved activations, or, in windows, keys, values and their
            gradients. See :class:`~lightning_llm.activation_offload.ActivationOffload`.
        context_parallel: Share each row among the ranks of ``ModelParallelStrategy(tensor_parallel_size=...)``: the
            exact gradient with 1 / ranks of the activations on each. See
            :func:`~lightning_llm.context_parallel_loss` for the models that allow it.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; transformers' choice if None.
        dtype: Type of the parameters; if None, what the Trainer's ``precision`` asks for (float32 for mixed).
        trust_remote_code: Run model code that comes with the hub repository or folder. Off unless asked for.
        leaking_packs: What to do if the model lets packed documents see each other, which is found out before the first
            packed batch: ``refuse`` it, or ``unpack`` each batch into one document a row, which costs padding.
        loss_kernel: ``chunked`` computes the loss from hidden states, without logits in memory, where the model's head
            allows it; ``plain`` from logits; on a GPU also ``liger`` (package liger-kernel) and ``cce``
            (cut-cross-entropy). Windows are always chunked.
        peft: An adapter to train in place of the model (package peft): a mapping such as ``{"peft_type": "LORA", "r":
            8}`` with the fields of peft's configuration, or a ``PeftConfig``. Its task follows from ``task``, and a
            classifier's head trains too. See :mod:`lightning_llm.adapters`.
        quantization: How pretrained weights are quantised as they are loaded, for adapters on top: transformers'
            ``quantization_config`` as a mapping, such as ``{"quant_method": "torchao", "quant_type":
            "Int8WeightOnlyConfig"}`` or ``{"quant_method": "bitsandbytes", "load_in_4bit": True}``.
        checkpoint: What of the model a Lightning checkpoint holds: ``whole``, or ``trainable``, without the frozen
            weights, which are then read from the hub or the folder again. If None, ``trainable`` for quantised models.

    Raises:
        ValueError: For an unknown task, schedule, duration or configuration field.
        FileNotFoundError: For a model folder that does not exist or holds no weights.

    Example:
        >>> tiny = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> module = LLMModule(tiny, learning_rate=1e-3, warmup="10 steps")
        >>> module.configure_model()  # the Trainer does this
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
        >>> module.training_step(batch, 0)["num_tokens"]
        tensor(2)
    """

    def __init__(
        self,
        model: str | dict[str, Any] | Any,  # Any, as the command line's help would list every class of torch
        task: str | Any = "causal-lm",  # Any: a Task
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = ADAMW_BETAS,
        eps: float = ADAMW_EPS,
        optimizer: str = "adamw",
        optimizer_options: dict[str, Any] | None = None,
        lr_schedule: str = "cosine",
        warmup: str | int | float = "2%",
        lr_schedule_options: dict[str, Any] | None = None,
        lr_schedule_length: str | int | float | None = None,
        gradient_checkpointing: bool = False,
        sequence_window: int | Literal["auto"] | None = None,
        offload: bool = False,
        context_parallel: bool = False,
        attn_implementation: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        leaking_packs: Literal["refuse", "unpack"] = "refuse",
        loss_kernel: Literal["chunked", "plain", "liger", "cce"] = "chunked",
        labels: list[str] | int | None = None,
        task_options: dict[str, Any] | None = None,
        peft: dict[str, Any] | Any | None = None,
        quantization: dict[str, Any] | None = None,
        checkpoint: Literal["whole", "trainable"] | None = None,
    ) -> None:
        super().__init__()
        peft = adapter_fields(peft)
        if model is None:
            raise ValueError(
                "`model` is missing. A checkpoint of a model that was passed in built (a PeftModel, say) does not "
                "hold its architecture: LLMModule.load_from_checkpoint(path, model=the same model, built again)."
            )
        self._packing = PackingGuard(leaking_packs)
        if sequence_window == "auto" and gradient_checkpointing:
            raise ValueError(
                "`sequence_window='auto'` chooses checkpointing itself: leave `gradient_checkpointing` out."
            )
        self.task: Task = choose_task(
            *(task, loss_kernel, task_options),
            sequence_window=sequence_window,
            offload=offload,
            context_parallel=context_parallel,
        )
        if peft is not None:
            check_adapter(
                *(peft, model, self.task),
                gradient_checkpointing=gradient_checkpointing,
                sequence_window=sequence_window,
                checkpoint=checkpoint,
            )
        check_quantization(quantization, model, checkpoint)
        checkpoint = checkpoint or ("whole" if quantization is None else "trainable")
        check_source(checkpoint, model)
        self.save_hyperparameters(ignore=["model"] if isinstance(task, str) else ["model", "task"])
        self.source = model
        self.config = resolve_config(model, trust_remote_code=trust_remote_code)
        self.model: nn.Module | None = model if isinstance(model, nn.Module) else None
        self.labels = labels
        self.task.configure(self.config, labels, is_built=self.model is not None)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.lr_schedule = lr_schedule
        self.warmup = Duration.parse(warmup)
        self.lr_schedule_options = lr_schedule_options
        self.lr_schedule_length = None if lr_schedule_length is None else Duration.parse(lr_schedule_length)
        self.optimizer = optimizer
        self.optimizer_options = optimizer_options
        self.gradient_checkpointing = gradient_checkpointing
        self.offload = offload
        self.peft = peft
        self.quantization = quantization
        self.checkpoint = checkpoint
        self._plans = sequence_window == "auto"
        self.attn_implementation = attn_implementation
        self.dtype_name = dtype
        self.trust_remote_code = trust_remote_code
        self.val_metrics = self.task.metrics()
        self.test_metrics = self.task.metrics()
        self.tokens_seen = 0
        self._tokens_before = 0  # this run
        self._micro_batch: MicroBatch | None = None
        self._window = StepWindow()
        self._prepared = False

    # ---- windows along the sequence, which DynamicBatchScaler may shorten ------------------------------------------

    @property
    def sequence_window(self) -> int | None:
        """Tokens in a window, whatever a callback has made of it; None if rows are not cut."""
        return self.task.window

    @sequence_window.setter
    def sequence_window(self, tokens: int) -> None:
        """Take other windows, in a module that has some."""
        if self.task.window is None:
            raise ValueError("This module does not train in windows: make it with LLMModule(sequence_window=...).")
        self.task.window = tokens

    def shrink_sequence_window(self, length: int) -> int | None:
        """Halve the window, for rows of ``length`` tokens that do not fit; loss and gradient stay the same.

        Returns:
            Tokens in a window from now on; None, and nothing was changed, if they cannot be fewer than they are.
        """
        return self.task.shrink_window(length)

    # ---- batches that are not to be cut, whose chunks DynamicBatchScaler may make smaller --------------------------

    @property
    def needs_whole_batches(self) -> bool:
        """Whether a row's loss depends on the batch's other rows; what is predicted never does."""
        is_predicting = self._trainer is not None and self._trainer.predicting
        return self.task.needs_whole_batches and not is_predicting

    @property
    def chunk_size(self) -> int | None:
        """Rows of a whole batch that the model sees at once; None for all."""
        return self.task.chunk_size

    @chunk_size.setter
    def chunk_size(self, rows: int) -> None:
        """Take other chunks."""
        self.task.chunk_size = rows

    def shrink_chunk_size(self, rows: int) -> int | None:
        """Halve the chunks, of a batch of ``rows`` that does not fit; loss and gradient stay the same.

        Returns:
            Rows in a chunk from now on; None, and nothing was changed, if they cannot be fewer than they are.
        """
        return self.task.shrink_chunk_size(rows)

    # ---- the model -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the model against the data module and the strategy, before anything large is built."""
        if stage == "fit":
            self._tokens_before = self.tokens_seen
            optimizer_class(self.optimizer)
            if self.peft is not None:
                warn_of_fixed_ranks(self.peft, self.trainer)
            check_training(self.quantization, self.peft is not None)
        if isinstance(self.task, ContextParallelCausalLM):
            self.task.group = sharing_group(self.device_mesh)
        datamodule = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(datamodule, "tokenizer", None)
        length = getattr(datamodule, "max_length", None)
        if tokenizer is not None and self.task.reads_tokens:
            check_vocabulary(self.config, tokenizer)
            if isinstance(self.source, (dict, PretrainedConfig)) and not is_complete(self.source):
                take_special_tokens(self.config, tokenizer)
        self.task.configure(self.config, self.labels, datamodule=datamodule, is_built=self.model is not None)
        sources = tuple(getattr(datamodule, "source_names", None) or ())
        sources = sources if len(sources) > 1 else ()  # a single one is the whole
        # The metrics' sums have a place for each source and class, on every rank.
        self.val_metrics, self.test_metrics = (self.task.metrics(sources) for _ in range(2))
        if length is not None and self.task.reads_tokens:
            check_length(self.config, length, "the data module's `max_length`")
        if self._plans and stage == "fit":
            self._follow_plan()

    def plan(
        self,
        max_length: int,
        memory: str | float | None = None,
        *,
        precision: str = "32-true",
        micro_batch_size: int = 1,
        shards: int = 1,
        optimizer: bool = True,
        offload: bool = True,
        with_logits: bool = True,
    ) -> Plan:
        """Estimate the memory of training rows of a length in each way, and choose the first that fits.

        They are tried in this order: plain, checkpointing, windows, the largest first, and the same windows offloaded.

        No weight is loaded or allocated for it: the step runs on tensors that have no data. ``print(module.plan(...))``
        shows a table, ``.reason`` is the choice in one line, ``.parts()`` what the memory consists of.

        Args:
            max_length: Tokens in a row.
            memory: Of the device, such as ``"16GB"`` or ``"80GiB"``; if None, what is free on this machine's.
            precision: The Trainer's.
            micro_batch_size: Rows in a micro-batch.
            shards: Ranks among which FSDP2 divides weights, gradients and optimizer state.
            optimizer: Whether AdamW's state counts.
            offload: Whether keys and values may be kept in host memory.
            with_logits: Whether the loss from logits is shown, for comparison.

        Raises:
            ValueError: For arguments that are not understood, and for models that cannot be planned.
        """
        return plan_source(
            self.source if self.model is None else self.model,
            self.config,
            self.task.auto_class,
            max_length,
            memory,
            precision=precision,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            micro_batch_size=micro_batch_size,
            shards=shards,
            optimizer=optimizer,
            offload=offload,
            with_logits=with_logits,
        )

    def configure_model(self) -> None:
        """Build the model where the strategy wants it: sharded over its device mesh, else whole on the host."""
        if self._prepared:
            return
        if self.device_mesh is not None:
            check_sharding(self.peft, self.quantization)
            if self.checkpoint == "trainable":
                check_strategy(self.trainer.strategy)
                self.strict_loading = False  # what is not in a checkpoint stays as it was built
            mesh = mesh_to_shard(self.device_mesh, self.source, isinstance(self.task, ContextParallelCausalLM))
            model = build_sharded(self._build, mesh, self._root_device(), self._prepare_layers)
            copy = partial(copy_sharded, model, self._build, mesh, self._root_device())
            self.model = model
        else:
            with torch.device("cpu"):  # the same random weights for a seed on every accelerator
                self.model = self._build(True)
            self._prepare_layers(self.model)
            copy = partial(deepcopy, self.model)
        if not any(module.training for module in self.model.modules()):
            self.model.train()  # from_pretrained leaves a model in evaluation mode, and Lightning would keep it there
        self.task.built(self.model, copy)
        self._prepared = True

    def _build(self, load_weights: bool) -> nn.Module:
        """The model on the current default device; without weights only its architecture."""
        model = build_model(
            self.source,
            self.config,
            self.task.auto_class,
            dtype=resolve_dtype(self.dtype_name),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            load_weights=load_weights,
            fresh_head=self.task.has_labels,
            quantization=self.quantization,
        )
        model = model if self.peft is None else add_adapter(model, self.peft, self.task.auto_class)
        return self.task.complete(model, self.source if load_weights else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the parameters, but leave buffers as precise as the model made them.

        ``precision="bf16-true"`` casts the whole module. Rotary frequencies in bfloat16 are wrong by radians at
        position 4096; transformers keeps them in float32 for a bfloat16 model, and so do we.
        """
        held = [(m, name, b) for m in self.modules() for name, b in m._buffers.items() if b is not None]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in held:
            after = module._buffers[name]
            if after is not None and after.is_floating_point() and after.dtype.itemsize < before.dtype.itemsize:
                module._buffers[name] = before.to(after.device)
        return self

    def forward(self, **inputs: Any) -> Any:
        """Call the wrapped model."""
        return self._built()(**inputs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continue sequences, or answer them, with the model's own ``generate``, in evaluation mode.

        Args:
            input_ids: (batch, seq) int64.
            **options: As in transformers: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``, ...

        Returns:
            (batch, seq + new) int64; of ``seq2seq`` (batch, new).

        Raises:
            ValueError: If the task's model does not write.
        """
        if not self.task.generates:
            raise ValueError(
                f"The model of {self.task.name!r} does not write: `generate` is for causal-lm, dpo and seq2seq."
            )
        self.configure_model()
        model: Any = self._built()
        was_training = model.training
        model.eval()
        try:
            tokens: Tensor = model.generate(input_ids=input_ids, **options)
        finally:
            model.train(was_training)
        return tokens

    def on_fit_start(self) -> None:
        """Before packed rows come, find out whether the model lets their documents see each other."""
        if self.offload:
            warn_if_on_host(self.device)
        if self.needs_whole_batches and self.trainer.accumulate_grad_batches > 1:
            rank_zero_warn(
                "Rows are contrasted with those of their own micro-batch only: accumulating several is not the same as "
                "one large batch. For more negatives let the loader give the whole batch (accumulate_grad_batches=1) "
                "and set task_options={'chunk_size': ...}, or let DynamicBatchScaler find it."
            )
        self._check_datamodule()

    def on_validation_start(self) -> None:
        """As at the start of ``fit``, where validation runs by itself."""
        self._check_datamodule()

    def on_test_start(self) -> None:
        """As at the start of ``fit``."""
        self._check_datamodule()

    def on_predict_start(self) -> None:
        """As at the start of ``fit``."""
        self._check_datamodule()

    # ---- training ------------------------------------------------------------------------------------------------

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """How many targets a batch has, without the model: tokens, rows, pairs; shape (). For whoever counts ahead."""
        return self.task.num_targets(batch)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Mean loss over the batch's targets (nats; of numbers, squared), and how many there are."""
        with self._offloaded():
            loss, details = self.task.loss_and_details(self._built(), self._checked(batch))
        detached = TokenLoss(loss.total.detach(), loss.num_tokens)
        self._micro_batch = MicroBatch(batch_idx, batch.get("row_ids"), detached, details)
        return {"loss": loss.mean, "num_tokens": loss.num_tokens}

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget an accumulation window that was left unfinished: a new one starts."""
        self._window.clear()

    def on_after_backward(self) -> None:
        """Count the micro-batch, now that its gradient is there."""
        if self._micro_batch is not None:  # a subclass may have a training step of its own
            self._window.add(self._micro_batch)
        self._micro_batch = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sum the step's loss and tokens over micro-batches and ranks; stop before a NaN reaches the weights.

        One small all-reduce and one host synchronisation per optimizer step, none per micro-batch.
        """
        if not self._window:
            return
        sums = self.trainer.strategy.reduce(self._window.sums(), reduce_op="sum")
        total, num_tokens, num_bad, *details = sums.tolist()
        if num_bad:
            where = f"optimizer step {self.global_step}, epoch {self.current_epoch}"
            raise NonFiniteLossError(self._window.describe_bad(where, self.global_rank, self._built()))
        names = self._window.names()
        self._window.clear()
        share = data_parallel_size(self.trainer) / self.trainer.world_size  # ranks that share a row count it once each
        self.tokens_seen += round(num_tokens * share)
        if num_tokens:
            self.log("train/loss", total / num_tokens, prog_bar=True, batch_size=1)
        for name, value, count in zip(names, details[::2], details[1::2], strict=True):
            if count:
                self.log(f"train/{name}", value / count, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule stepped once per optimizer step."""
        optimizer = make_optimizer(
            self.optimizer,
            self._trained(),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            options=self.optimizer_options,
        )
        schedule = make_schedule(
            self.lr_schedule,
            optimizer,
            **self._schedule_length(),
            warmup=self.warmup,
            tokens_seen=lambda: self.tokens_seen - self._tokens_before,
            options=self.lr_schedule_options,
        )
        by_metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": schedule,
                "interval": "epoch" if by_metric else "step",
                "monitor": "val/loss" if by_metric else None,
            },
        }

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the batch to the validation metrics."""
        self.task.evaluate(self._built(), self._checked(batch), self.val_metrics)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add the batch to the test metrics."""
        self.task.evaluate(self._built(), self._checked(batch), self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and the task's other metrics; of a mixture also ``val/loss/<source>``, ..."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and the task's other metrics; of a mixture also ``test/loss/<source>``, ..."""
        self._log_metrics("test", self.test_metrics)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Score each row, with the batch's ``row_ids``.

        A language model gives ``nll`` in nats and ``num_tokens``, (batch,) each; a classifier ``probabilities`` and
        ``predictions``; see each task's ``score``.
        """
        scores = self.task.score(self._built(), self._checked(batch))
        if "row_ids" in batch:
            scores["row_ids"] = batch["row_ids"]
        return scores

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the tokens seen, and the architecture, so that loading needs neither the hub nor the folder."""
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["tokens_before_run"] = self._tokens_before
        checkpoint["hyper_parameters"]["model"] = self._model_hyper_parameter()
        if state := self.task.state_dict():
            checkpoint["task"] = state
        if self.checkpoint == "trainable":
            keep_trained(checkpoint, self)
            note_classes(checkpoint["hyper_parameters"], self.task, self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the tokens seen and what the task remembers; add frozen weights that the checkpoint leaves out."""
        complete(checkpoint, self)
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        self._tokens_before = checkpoint.get("tokens_before_run", 0)
        self.task.load_state_dict(checkpoint.get("task", {}))

    def write_beside(self, folder: Path) -> None:
        """Write what others than transformers want to know of a model that was exported to a folder."""
        self.task.write_beside(folder, self.config)

    # ---- details -------------------------------------------------------------------------------------------------

    def _schedule_length(self) -> dict[str, float]:
        length = self.lr_schedule_length
        if length is None:
            return {"total_steps": total_optimizer_steps(self.trainer)}
        if length.unit == "steps":
            return {"total_steps": length.value}
        return {"total_tokens": tokens_of(self.trainer, length)}

    def _trained(self) -> nn.Module:
        """What the optimizer steps."""
        return self._built()

    def _built(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("The model is not built yet: the Trainer builds it, or call `configure_model()` first.")
        return self.model

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Look into labels while they are on the host: a device would have to be waited for.

        Lightning's own place for it; the public hook would warn beside every data module, and give way to its own.
        """
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping) and self.device.type != "cpu":
            self.task.check(batch, self.config)
        return batch

    def _checked(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch as the model may see it."""
        self.task.check(batch, self.config)
        check_room(self._built(), batch, self.config)
        if not self.task.packs:
            return batch
        return self._packing.isolated(batch, self._built(), self.task.outputs, self.device)

    def _offloaded(self) -> AbstractContextManager[object]:
        in_windows = self.task.window is not None  # which offload by themselves
        return ActivationOffload(self._built()) if self.offload and not in_windows else nullcontext()

    def _check_datamodule(self) -> None:
        """Check isolation early if the data module packs; on every rank, as a sharded forward needs them all."""
        datamodule = getattr(self.trainer, "datamodule", None)
        by_name = getattr(datamodule, "windowing", None) in ("packed", "wrapped")
        if getattr(datamodule, "packs_documents", by_name):
            self.task.check_packing()
            with self.trainer.precision_plugin.forward_context():
                self._packing.check_model(self._built(), self.task.outputs, self.device)

    def _follow_plan(self) -> None:
        """Train as the plan for this run says; once chosen, it stays so."""
        plan = plan_of_trainer(self, self.trainer)
        assert plan.chosen is not None
        self._plans = False
        self.offload = self.offload or plan.chosen.offload
        self.gradient_checkpointing = plan.chosen.checkpointing
        if plan.chosen.window is not None:
            self.task = WindowedCausalLM(plan.chosen.window, self.offload)
        if self._prepared:
            self._prepare_layers(self._built())
        rank_zero_info(f"sequence_window='auto': {plan.reason}")

    def _prepare_layers(self, model: nn.Module) -> None:
        self._prepare(model, packs=self.task.packs)

    def _prepare(self, model: nn.Module, packs: bool) -> None:
        if self._trainer is not None and self.attn_implementation is None and packs:
            use_packed_attention(model, self._root_device())
        if self.gradient_checkpointing:
            # Newer transformers have renamed the method; the old name must be told not to be reentrant.
            enable: Any = getattr(model, "activation_checkpointing_enable", None)
            if enable is not None:
                enable()
            else:
                old: Any = model.gradient_checkpointing_enable
                old(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _root_device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def _log_metrics(self, stage: str, metrics: Any) -> None:
        values = metrics.compute()
        metrics.reset()
        self.log_dict(
            {f"{stage}/{name}": value for name, value in values.items()},
            prog_bar=stage == "val",
            sync_dist=True,  # already equal on all ranks; said so that Lightning does not warn
            batch_size=1,
        )

    def _model_hyper_parameter(self) -> dict[str, Any] | str | None:
        config = self.config
        if self.checkpoint == "trainable":  # frozen weights are read again
            return None if isinstance(self.source, nn.Module) else str(self.source)
        is_plain = not isinstance(self.source, nn.Module) or type(self.source).__module__.startswith("transformers.")
        if is_plain and config.model_type in CONFIG_MAPPING:
            return config.to_dict()
        return None
