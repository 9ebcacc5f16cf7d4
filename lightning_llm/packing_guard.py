"""Packed batches on their way to the model: documents that would see each other are refused, or unpacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_llm.document_masks import document_ids
from lightning_llm.isolation import PackingLeakError, check_mask, verify_packing
from lightning_llm.unpacking import unpack_documents
from lightning_llm.virtual_tokens import prompt_config


class PackingGuard:
    """Finds out once whether the model isolates packed documents, and looks at masks that come with positions.

    Args:
        leaking_packs: What to do if documents see each other: ``refuse``, or ``unpack`` each batch into one document a
            row.

    Raises:
        ValueError: For another word.
    """

    def __init__(self, leaking_packs: Literal["refuse", "unpack"]) -> None:
        if leaking_packs not in ("refuse", "unpack"):
            raise ValueError(f"`leaking_packs` must be 'refuse' or 'unpack', but got {leaking_packs!r}.")
        self._refuses = leaking_packs == "refuse"
        self._model_checked = self._masks_checked = self._unpacks = False

    def check_model(self, model: nn.Module, outputs: Callable[..., Tensor], device: torch.device) -> None:
        """Run the model on packed and on separate documents, the first time.

        Args:
            model: On ``device``; if it is sharded, every rank calls this.
            outputs: From model and batch to (batch, seq, features), as training runs it.
            device: Of the batches.

        Raises:
            PackingLeakError: If packed documents see each other and are to be refused.
        """
        if not self._model_checked:
            if prompt_config(model) is not None:
                self._refuse_or_unpack(_refuse_prompts)
            else:
                self._refuse_or_unpack(lambda: verify_packing(model, outputs, device=device))
            self._model_checked = True

    def isolated(
        self, batch: Mapping[str, Any], model: nn.Module, outputs: Callable[..., Tensor], device: torch.device
    ) -> Mapping[str, Any]:
        """The batch as the model may see it; the first packed batch, of whatever loader, has the model checked.

        Arguments and errors are those of :meth:`check_model`.
        """
        if batch.get("position_ids") is None:
            return batch
        if prompt_config(model) is not None:
            if not _restarts(batch):
                return batch
            self.check_model(model, outputs, device)
        elif batch.get("attention_mask") is None:
            self.check_model(model, outputs, device)
        elif not self._masks_checked or device.type == "cpu":  # elsewhere the host would wait for the device
            self._refuse_or_unpack(lambda: check_mask(batch))
            self._masks_checked = True
        return unpack_documents(batch) if self._unpacks else batch

    def _refuse_or_unpack(self, check: Callable[[], object]) -> None:
        try:
            check()
        except PackingLeakError as leak:
            if self._refuses:
                raise
            self._unpacks = True
            rank_zero_warn(
                f"leaking_packs='unpack': each document becomes a row of its own, padded to the longest of its batch. "
                f"Losses are those of separate documents; memory and time grow with the padding. The reason: {leak}"
            )


def _refuse_prompts() -> None:
    raise PackingLeakError(
        "A prompt that trains (prompt tuning, prefix tuning) stands before a row as a whole, so that in a packed row "
        "only the first document would have it, and documents would see each other. Use windowing='documents', "
        "LLMModule(leaking_packs='unpack'), or LoRA."
    )


def _restarts(batch: Mapping[str, Any]) -> bool:
    """Whether a row holds several documents; the host waits for a device."""
    return bool((document_ids(batch["position_ids"]).diff(dim=1) > 0).any())
