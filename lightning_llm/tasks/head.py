"""What the tasks of encoders and classifiers share: one forward, one output, a loss beside its targets."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.head_loss import unwrapped
from lightning_llm.loss import IGNORE_INDEX, TokenLoss
from lightning_llm.tasks.base import Task

_TARGETS = ("labels", "start_positions", "end_positions")  # the loss is ours: the model is not to make it too


class HeadTask(Task):
    """A task whose model maps a row to an output in one forward.

    Attributes:
        inputs: Columns of which a batch must have one.
        targets: Columns that a batch to train on must have.
        collator: Of transformers, that makes such batches; for messages.
    """

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "inputs_embeds")
    targets: ClassVar[tuple[str, ...]] = ("labels",)
    collator: ClassVar[str] = "DataCollatorWithPadding"

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse batches that lack their input, or whose documents are packed."""
        if not any(batch.get(name) is not None for name in self.inputs):
            raise KeyError(
                f"A {self.name} batch needs {' or '.join(f'`{name}`' for name in self.inputs)}, but got the keys "
                f"{sorted(batch)}. transformers' {self.collator} makes such batches."
            )
        _check_unpacked(batch, self.name)
        super().check(batch, config)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the loss over the batch's targets."""
        return self.loss_of(self.run(model, batch), batch)

    @abstractmethod
    def loss_of(self, output: Any, batch: Mapping[str, Any]) -> TokenLoss:
        """The summed loss of what :meth:`run` returned."""

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Call the model with what its ``forward`` takes of a batch."""
        return model(**model_inputs(model, batch))

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The model's logits."""
        logits: Tensor = self.run(model, batch).logits
        return logits

    def target(self, batch: Mapping[str, Any], name: str = "labels") -> Tensor:
        """A column of targets.

        Raises:
            KeyError: If the batch does not have it.
        """
        if not isinstance(batch.get(name), Tensor):
            raise KeyError(
                f"A {self.name} batch needs {' and '.join(f'`{name}`' for name in self.targets)}, but got the keys "
                f"{sorted(batch)}. transformers' {self.collator} makes such batches."
            )
        values: Tensor = batch[name]
        return values


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a model's ``forward`` takes, without targets; no cache is kept.

    Args:
        model: A transformers model, or one in PEFT.
        batch: With columns that are for us too (``row_ids``, ...).
    """
    taken = inspect.signature(unwrapped(model).forward).parameters
    inputs = {key: value for key, value in batch.items() if key in taken and key not in _TARGETS and value is not None}
    return {**inputs, "use_cache": False} if "use_cache" in taken else inputs


def check_range(values: Tensor, num_classes: int, batch: Mapping[str, Any], what: str, advice: str) -> None:
    """Refuse a target that is no class; on an accelerator an assertion would end the process without a name.

    Args:
        values: (batch, ...) int64, -100 where there is no target; looked at on the host only.
        num_classes: Classes are numbered from 0.
        batch: Its ``row_ids`` name rows.
        what: The column's name.
        advice: What to do.

    Raises:
        ValueError: Naming the first row.
    """
    if values.device.type != "cpu":
        return
    is_bad = (values != IGNORE_INDEX) & ((values < 0) | (values >= num_classes))
    if bool(is_bad.any()):
        place = is_bad.nonzero()[0].tolist()
        ids = batch.get("row_ids")
        row = f"row {place[0]} of the batch" + ("" if ids is None else f" (row_id {int(ids[place[0]])})")
        where = f", position {place[1]}" if len(place) > 1 else ""
        raise ValueError(
            f"`{what}` must lie in 0..{num_classes - 1}, or be {IGNORE_INDEX} for none, but {row}{where} has "
            f"{int(values[tuple(place)])}. {advice}"
        )


def _check_unpacked(batch: Mapping[str, Any], name: str) -> None:
    """A row holds one document if the positions of its tokens begin once."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    is_packed = "cu_seq_lens_q" in batch
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.device.type == "cpu":
        is_token = mask != 0 if isinstance(mask, Tensor) and mask.shape == positions.shape else torch.tensor(True)
        is_packed |= bool((((positions == 0) & is_token).sum(1) > 1).any())
    if is_packed:
        raise ValueError(
            f"The task {name!r} takes one document a row, but this batch is packed (position_ids restart): its "
            f"documents would see each other. Use TextDataModule(windowing='documents'), or a collator that pads."
        )
