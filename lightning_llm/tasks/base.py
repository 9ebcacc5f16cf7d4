"""The interface between ``LLMModule`` and a task: which model class, which loss, which scores, which metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.compatibility import check_length
from lightning_llm.head_loss import LossKernel
from lightning_llm.loss import IGNORE_INDEX, TokenLoss
from lightning_llm.tasks.labels import agreed_labels, set_labels

SHORTEST_WINDOW = 64  # tokens; below, passes over the keys cost more than the memory is worth


class Task(ABC):
    """One kind of training: the module asks it for the loss, the scores and the metrics, and knows nothing of heads.

    :meth:`configure` is called before the model is built, and again when the data is known. :meth:`check` sees each
    batch before the model does.

    Attributes:
        name: What users write in ``LLMModule(task=...)``.
        auto_class: The transformers class that builds the model, for instance ``AutoModelForCausalLM``.
        has_labels: Whether the model's head has a class for each of a set of labels.
        reads_tokens: Whether rows are tokens, so that vocabulary and length of model and data must fit.
        packs: Whether a row may hold several documents, which :meth:`outputs` keeps apart.
        generates: Whether the model continues or answers with tokens of its own.
        needs_whole_batches: Whether a row's loss depends on the batch's other rows, so that no batch may be cut.
        window: Tokens in a window; None where rows are not cut.
        chunk_size: Rows that the model sees at once, of a batch that is not cut; None for all.
        offload: Whether windows keep keys, values and their gradients in host memory.

    Args:
        loss_kernel: How a task with a large vocabulary computes its loss: ``chunked``, ``plain``, ``liger``, ``cce``.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    has_labels: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    needs_whole_batches: bool = False
    window: int | None = None
    chunk_size: int | None = None
    offload: bool = False

    def __init__(self, loss_kernel: LossKernel = "chunked") -> None:
        self.loss_kernel: LossKernel = loss_kernel

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """Fit the model's configuration to the task: its classes, where it has some.

        Args:
            config: Of the model; changed in place.
            labels: Names of the classes, or how many there are; None for those of the data or the configuration.
            datamodule: What it knows of the data; None where there is none, or not yet.
            is_built: Whether the model stands already, so that only names may change.

        Raises:
            ValueError: If something does not fit.
        """
        if self.has_labels:
            agreed = agreed_labels(labels, getattr(datamodule, "label_names", None))
            if agreed is not None:
                set_labels(config, agreed, is_built=is_built)
        elif labels is not None:
            raise ValueError(
                f"`labels` are the classes of a classifier; the task {self.name!r} has none: leave it out."
            )
        elif getattr(datamodule, "label_names", None):
            rank_zero_warn(
                f"{type(datamodule).__name__} has rows with classes, but the task {self.name!r} learns none. Is it "
                f"another one that is meant, such as LLMModule(task='sequence-classification')?"
            )

    def complete(self, model: nn.Module, source: Any = None) -> nn.Module:
        """Add to a model, as it is built, what the task trains beside it; before there is an optimizer.

        Args:
            model: As transformers makes it.
            source: What its weights were loaded from; None if it has the architecture only.
        """
        return model

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse a batch that the model would stumble over. What is on an accelerator is not looked into.

        Raises:
            ValueError: If it does not fit.
        """
        input_ids = batch.get("input_ids")
        if self.reads_tokens and isinstance(input_ids, Tensor):
            # Without padding, a row is a whole batch, and its longest document is what needs positions.
            check_length(config, int(batch.get("max_length_q", input_ids.shape[-1])), "a batch")

    def check_packing(self) -> None:
        """Refuse a data module that packs several documents into a row, where the task does not keep them apart.

        Raises:
            ValueError: If it does not.
        """
        if not self.packs:
            raise ValueError(
                f"The task {self.name!r} takes one document a row, but the data module packs them, and they would see "
                f"each other. Use windowing='documents'."
            )

    def built(self, model: nn.Module, copy: Callable[[], nn.Module]) -> None:  # noqa: B027 - most need nothing
        """The model stands, with the weights that training begins with.

        Args:
            model: On the host or sharded.
            copy: Makes another one like it, for a task that needs the original beside the trained one.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Run the model on a batch; return the summed loss and its weight, by which its mean is taken."""

    def loss_and_details(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[TokenLoss, dict[str, TokenLoss]]:
        """As :meth:`loss`, with sums and counts of what else is logged in training, by name; the same names always."""
        return self.loss(model, batch), {}

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """The weight that :meth:`loss` will give a batch, from its targets alone; shape ()."""
        return num_labels(batch["labels"])

    @abstractmethod
    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model on a batch, with or without labels; return what prediction gives, an entry for each row."""

    def merged(self, outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Make one prediction of those of the windows of a whole, in whichever batches they lie.

        Args:
            outputs: What :meth:`score` gave of each batch.

        Returns:
            An entry for each whole, plain values by name; None where each row is one.
        """
        return None

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Run the model on a batch as training does; return (batch, ...), for instance logits.

        The test of a model's isolation calls this, for a task that packs: packed with ``position_ids``, separate with
        ``input_ids`` alone.
        """

    @abstractmethod
    def metrics(self, source_names: Sequence[str] = ()) -> Any:
        """Make the metrics that validation and test fill, with ``compute`` (a value for each name) and ``reset``.

        Args:
            source_names: Of a mixture, to be evaluated one by one beside the whole, where the task can do that.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: Any) -> None:
        """Run the model on a batch and add it to what :meth:`metrics` made."""

    def shrink_window(self, length: int) -> int | None:
        """Halve the window, or the row of ``length`` tokens that it holds as a whole, down to 64 tokens.

        Returns:
            Tokens in a window from now on; None, and nothing was changed, if there is none or it cannot be shorter.
        """
        window = min(self.window or 0, length)
        if window <= SHORTEST_WINDOW:
            return None
        self.window = max(window // 2, SHORTEST_WINDOW)
        return self.window

    def shrink_chunk_size(self, rows: int) -> int | None:
        """See fewer of a batch's rows at once than ``rows``, if the task can; None, and nothing changed, if not."""
        return None

    def write_beside(self, folder: Path, config: PretrainedConfig) -> None:  # noqa: B027 - most write nothing
        """Write what others than transformers want to know of an exported model.

        Args:
            folder: That ``save_pretrained`` has written.
            config: Of the model.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the task, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Go on with it."""


def num_labels(labels: Tensor) -> Tensor:
    """How many of some labels are targets: numbers that are no NaN, classes that are not -100; shape ()."""
    return (~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX).sum()
