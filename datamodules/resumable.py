"""What data modules for language models share: a tokenizer, this rank's place, and a position that is resumed."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.loader import check_identity
from lightning_llm.datamodules.trainer_position import is_fitting


class ResumableDataModule(L.LightningDataModule):
    """A data module whose training loader knows what was trained, and goes on there.

    Lightning restores a data module before it asks for loaders, so the position is kept until the loader is made.

    Args:
        tokenizer: A tokenizer, or what :meth:`_make_tokenizer` makes one of.
        pin_memory: Page-lock batches for copies to a GPU; None does so where there is one.
    """

    def __init__(self, tokenizer: Any, pin_memory: bool | None) -> None:
        super().__init__()
        self.pin_memory = pin_memory
        self._tokenizer = tokenizer
        self._ready: PreTrainedTokenizerBase | None = None
        self._train_loader: Any = None
        self._loaded_state: dict[str, Any] | None = None

    @abstractmethod
    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load or train the tokenizer."""

    @abstractmethod
    def _training_identity(self) -> dict[str, Any] | None:
        """What a position in the training data is a position in, by name; None before ``setup``."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded or trained on first use."""
        if self._ready is None:
            self._ready = self._make_tokenizer()
        return self._ready

    def state_dict(self) -> dict[str, Any]:
        """What was trained up to the last optimizer step; the same on every rank, loadable on any layout."""
        state: dict[str, Any] = self._train_loader.state_dict() if self._train_loader is not None else {}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved.

        Raises:
            ValueError: If it was saved over other data or settings, naming what changed.
        """
        if self.trainer is not None and not is_fitting(self.trainer):
            return  # a checkpoint that is only evaluated
        identity = self._training_identity()
        if identity is not None:
            check_identity(state_dict, identity)
        self._loaded_state = state_dict
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)

    def setup(self, stage: str | None = None) -> None:
        """Forget an earlier run's position: a ``fit`` begins anew, or loads its own."""
        if stage == "fit":
            self._train_loader = self._loaded_state = None

    def _resumed(self, loader: Any) -> Any:
        """The training loader, at the loaded position if there is one."""
        if self._loaded_state is not None:
            loader.load_state_dict(self._loaded_state)
        self._train_loader = loader
        return loader

    def _ranks(self) -> tuple[int, int]:
        """Rank and number of ranks that split the data: not the world, where a strategy splits the model itself."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        layout = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return layout["rank"], layout["num_replicas"]

    def _pins_memory(self) -> bool:
        if self.pin_memory is None:
            return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return self.pin_memory

    def _pad_token_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0
