"""Token-weighted evaluation: sums over tokens on every rank, one division at the end."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_llm.loss import TokenLoss

_SUMS = ("total_nats", "num_tokens", "num_bytes", "num_words", "byte_nats", "word_nats")


class LanguageModelingMetrics(Metric):
    r"""Loss, perplexity and bits per byte over a whole data set, independent of how it was cut into batches.

    .. math:: L = \frac{\sum_t \mathrm{nll}_t}{\sum_t 1}, \quad \mathrm{ppl} = e^L, \quad
              \mathrm{bpb} = \frac{\sum_t \mathrm{nll}_t}{\ln 2 \cdot \mathrm{bytes}}, \quad
              \mathrm{bpw} = \frac{\sum_t \mathrm{nll}_t}{\ln 2 \cdot \mathrm{words}}

    Sums are kept in float64 (float32 on devices without it) and added over ranks before the division, so ranks
    with unequal numbers of tokens weigh what they hold. Bits per byte and per word compare models with different
    tokenizers; they are reported where the batches say how many bytes and words of text their label tokens stand for.

    For a mixture, the same values are kept for each source beside the totals, as ``loss/<source>`` and so on; sources
    without a label token are left out.

    Args:
        source_names: Names of the sources, in the order that ``source_ids`` count them; the same on every rank.
        **kwargs: As for every torchmetrics metric.

    Example:
        >>> metrics = LanguageModelingMetrics()
        >>> metrics.update(TokenLoss(torch.tensor(6.0), torch.tensor(3)), num_bytes=torch.tensor(12.0))
        >>> metrics.update(TokenLoss(torch.tensor(2.0), torch.tensor(1)), num_bytes=torch.tensor(4.0))
        >>> {name: round(value.item(), 4) for name, value in metrics.compute().items()}
        {'loss': 2.0, 'perplexity': 7.3891, 'bits_per_byte': 0.7213}

        Two rows of two sources:

        >>> metrics = LanguageModelingMetrics(["web", "code"])
        >>> metrics.update(TokenLoss(torch.tensor([6.0, 2.0]), torch.tensor([3, 2])), source_ids=torch.tensor([1, 0]))
        >>> {name: round(value.item(), 4) for name, value in metrics.compute().items() if "loss" in name}
        {'loss': 1.6, 'loss/web': 1.0, 'loss/code': 2.0}
    """

    full_state_update = False
    total_nats: Tensor
    num_tokens: Tensor
    num_bytes: Tensor
    num_words: Tensor
    byte_nats: Tensor  # of the batches that say how many bytes they stand for
    word_nats: Tensor
    source_sums: Tensor

    def __init__(self, source_names: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.source_names = distinct_names(source_names)
        if self.source_names:
            # A row per source, and one for rows of no source; a column for each of the sums above.
            shape = (len(self.source_names) + 1, len(_SUMS))
            self.add_state("source_sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, but keep the type: a bfloat16 model takes modules along, and sums would stop growing."""
        return super()._apply(moves_only(fn), *args, **kwargs)

    def update(
        self,
        loss: TokenLoss,
        num_bytes: Tensor | None = None,
        num_words: Tensor | None = None,
        source_ids: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            loss: The batch's summed loss in nats and its number of label tokens; (), or (rows,) each.
            num_bytes: UTF-8 bytes that the label tokens stand for; any shape, summed.
            num_words: Words that the label tokens stand for; any shape, summed.
            source_ids: (rows,) int64, the source of each row, where the metric has names for them; everything else is
                (rows,) then. A row without a label token may have any.

        Raises:
            ValueError: If there are ``source_ids``, but something else is not given row by row.
        """
        nats = (None if counted is None else loss.total for counted in (num_bytes, num_words))
        sums = [None if x is None else x.detach().to(self.total_nats) for x in (*loss, num_bytes, num_words, *nats)]
        for name, values in zip(_SUMS, sums, strict=True):
            if values is not None:
                getattr(self, name).add_(values.sum())
        if source_ids is not None and self.source_names:
            _check_rows(sums, source_ids)
            is_named = (source_ids >= 0) & (source_ids < len(self.source_names))
            source = source_ids.where(is_named, len(self.source_names))
            for column, values in enumerate(sums):
                if values is not None:
                    self.source_sums[:, column].index_add_(0, source, values)

    def compute(self) -> dict[str, Tensor]:
        """Divide the sums.

        Returns:
            ``loss`` in nats per token and ``perplexity``; ``bits_per_byte`` if bytes are known; ``bits_per_word`` and
            ``word_perplexity`` if words are; and the same, followed by ``/`` and its name, for each source.

        Raises:
            ValueError: If rows with label tokens had a source that has no name; on every rank.
        """
        values = _ratios(*(getattr(self, name) for name in _SUMS))
        if not self.source_names:
            return values
        *named, unknown = self.source_sums
        if unknown[1] > 0:
            raise ValueError(
                f"`source_ids` must lie in 0..{len(named) - 1}, as there are {len(named)} source_names "
                f"({', '.join(self.source_names)}), but rows with {int(unknown[1])} label tokens had others."
            )
        for name, sums in zip(self.source_names, named, strict=True):
            if sums[1] > 0:
                values |= {f"{ratio}/{name}": value for ratio, value in _ratios(*sums).items()}
        return values


def moves_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` does with a tensor, as far as its device goes; its type stays.

    Apple's devices have no float64; sums are float32 there.
    """

    def move(tensor: Tensor) -> Tensor:
        device = fn(torch.empty(0)).device
        return (tensor.float() if device.type == "mps" and tensor.is_floating_point() else tensor).to(device)

    return move


def distinct_names(names: Iterable[str]) -> list[str]:
    """Make names fit to end a metric's name: no slash or space in them, none empty, none twice.

    Example:
        >>> distinct_names(["web", "owner/code", "web", "/data/my books"])
        ['web', 'owner-code', 'web-2', 'data-my-books']
    """
    distinct: list[str] = []
    for name in names:
        plain = "-".join(filter(None, re.split(r"[\s/\\]+", name))) or "source"
        numbered = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        distinct.append(next(candidate for candidate in numbered if candidate not in distinct))
    return distinct


def _ratios(
    nats: Tensor, num_tokens: Tensor, num_bytes: Tensor, num_words: Tensor, byte_nats: Tensor, word_nats: Tensor
) -> dict[str, Tensor]:
    loss = nats / num_tokens
    values = {"loss": loss, "perplexity": loss.exp()}
    if num_bytes > 0:
        values["bits_per_byte"] = byte_nats / (math.log(2) * num_bytes)
    if num_words > 0:
        values["bits_per_word"] = word_nats / (math.log(2) * num_words)
        values["word_perplexity"] = (word_nats / num_words).exp()
    return values


def _check_rows(sums: Sequence[Tensor | None], source_ids: Tensor) -> None:
    names = ("loss.total", "loss.num_tokens", "num_bytes", "num_words")
    for name, values in zip(names, sums[: len(names)], strict=True):
        if values is not None and values.shape != source_ids.shape:
            raise ValueError(
                f"With `source_ids` of shape {tuple(source_ids.shape)}, `{name}` must have one entry per row too, but "
                f"got shape {tuple(values.shape)}."
            )
