"""Text for masked language models: windows of documents, tokens of which are hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.collate import Segment
from lightning_llm.datamodules.examples.dataset import PaddedColumns
from lightning_llm.datamodules.masking import Masking, word_begins
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.rows import RowDataset, RowTable
from lightning_llm.datamodules.sources import STDLIB
from lightning_llm.datamodules.text import TextDataModule
from lightning_llm.datamodules.text_source import SplitRows, TextSource, prepare_tokenizer
from lightning_llm.datamodules.token_store import TokenStore
from lightning_llm.datamodules.windows import Int64Array
from lightning_llm.loss import IGNORE_INDEX

MASK = "<|mask|>"

_NOT_FOR_MASKED = ("stride", "eval_windowing", "eval_context", "append_eos")


class MaskedTextDataModule(TextDataModule):
    """Train a masked language model on texts, for ``LLMModule(task="masked-lm")``.

    Documents and their cache are those of :class:`~lightning_llm.datamodules.text.TextDataModule`. A row is a window of
    one document between the tokenizer's special tokens. Of its tokens, ``mask_probability`` are targets: 80% of them
    give way to the mask token, 10% to a random one, 10% stay. Which, follows from the seed, the epoch and the row, and
    not from batch, rank, worker or what was drawn before; a run that is resumed hides what it would have hidden. In
    evaluation it is always the same. Batches have ``input_ids``, ``attention_mask`` and ``labels`` (batch, seq), -100
    for all but targets.

    Args:
        data: As for ``TextDataModule``; a mapping of names to these is a mixture.
        tokenizer: A tokenizer with a mask token, its hub id or local folder; ``bytes`` and ``bpe`` get one.
        max_length: Tokens in a row, special ones included.
        windowing: ``windows``: all of a document, each token new in one window. ``documents``: its beginning.
        mask_probability: Share of a row's tokens that are targets; one at least.
        mask_share: Of the targets, those that the mask token stands for.
        random_share: Of the targets, those that a random token stands for.
        whole_words: Hide words, and not tokens.
        vocab_size: Size of the tokenizer that ``bpe`` trains, special tokens included.
        **options: Of :class:`~lightning_llm.datamodules.text.TextDataModule`: splits, batches, order, cache.

    Raises:
        ValueError: For settings that do not fit each other, or a tokenizer without a mask token.
    """

    def __init__(
        self,
        data: str | list[str] | dict[str, str | list[str]] = STDLIB,
        tokenizer: str | Any = "bpe",
        max_length: int = 512,
        windowing: Literal["windows", "documents"] = "windows",
        *,
        mask_probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        whole_words: bool = False,
        vocab_size: int = 8192,
        **options: Any,
    ) -> None:
        if windowing not in ("windows", "documents"):
            raise ValueError(
                f"`windowing` must be 'windows' or 'documents', as a masked model sees all of a row, but got "
                f"{windowing!r}."
            )
        if options.get("batching") == "padding_free":
            raise ValueError("batching='padding_free' lays rows end to end, and the model would see them as one.")
        unfit = [name for name in _NOT_FOR_MASKED if options.get(name) is not None]
        if unfit:
            raise ValueError(f"`{unfit[0]}` has no meaning for masked texts: leave it out.")
        if not 0 < mask_probability < 1:
            raise ValueError(f"`mask_probability` lies between 0 and 1, but got {mask_probability}.")
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
            raise ValueError(
                f"`mask_share` and `random_share` are parts of the targets, 1 together at most, but got {mask_share} "
                f"and {random_share}."
            )
        super().__init__(data, tokenizer, max_length, windowing, vocab_size=vocab_size, append_eos=False, **options)
        self.mask_probability = mask_probability
        self.mask_share = mask_share
        self.random_share = random_share
        self.whole_words = whole_words

    def cut_batch(self, batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
        """Refused: a row without its special tokens is none.

        Raises:
            ValueError: Always.
        """
        raise ValueError("Rows of masked texts cannot be cut while they are trained on. Choose a shorter `max_length`.")

    # ---- details -------------------------------------------------------------------------------------------------

    def _open_store(self, source: TextSource, split: Split) -> TokenStore:
        return source.store(split, self.cache_dir, self.tokenizer, append_eos=False, special_tokens=False)

    def _lay_out(self, split: Split) -> dict[str, SplitRows]:
        room = self.max_length - sum(map(len, special_tokens(self.tokenizer)))
        if room < 1:
            raise ValueError(f"max_length={self.max_length} leaves no room beside the special tokens of a row.")
        stride = room if self.windowing == "windows" else None
        return {
            name: source.rows(split, partial(self._open_store, source), room, self.windowing, stride)
            for name, source in self.sources.items()
            if split != "validation" or source.has_validation
        }

    def _row_dataset(self, split: Split, rows: SplitRows) -> RowDataset:
        masking = self._masking()
        edges = special_tokens(self.tokenizer)
        table = MaskedTable(
            **{field.name: getattr(rows.table, field.name) for field in fields(RowTable)},
            num_special=sum(map(len, edges)),
            masking=masking,
        )
        return MaskedRowDataset(
            *(rows.store, table, self._pad_token_id(), masking, edges),
            special_ids=np.array(self.tokenizer.all_special_ids, np.int64),
            is_train=split == "train",
        )

    def _masking(self) -> Masking:
        tokenizer = self.tokenizer
        vocabulary = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        special = set(tokenizer.all_special_ids)
        return Masking(
            mask_token_id=int(tokenizer.mask_token_id),
            random_ids=np.array([number for number in range(len(vocabulary)) if number not in special], np.int64),
            probability=self.mask_probability,
            mask_share=self.mask_share,
            random_share=self.random_share,
            seed=self.seed,
            begins_word=word_begins(vocabulary) if self.whole_words else None,
        )

    def _training_identity(self) -> dict[str, Any] | None:
        identity = super()._training_identity()
        masking = {
            "mask_probability": self.mask_probability,
            "mask_share": self.mask_share,
            "random_share": self.random_share,
            "whole_words": self.whole_words,
        }
        return None if identity is None else identity | masking

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = prepare_tokenizer(
            self._tokenizer,
            self.sources.values(),
            self.cache_dir,
            vocab_size=self.vocab_size - 1,  # the mask token is one
            trust_remote_code=self.trust_remote_code,
        )
        if self._tokenizer in ("bytes", "bpe"):
            tokenizer.add_special_tokens({"mask_token": MASK})
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "The tokenizer has no mask token. Take that of a masked model (BERT, RoBERTa, ...), 'bytes' or 'bpe'; "
                "or call tokenizer.add_special_tokens({'mask_token': '[MASK]'}), and let the model's vocabulary have "
                "len(tokenizer) entries."
            )
        return tokenizer


@dataclass(frozen=True)
class MaskedTable(RowTable):
    """Rows between special tokens, some of whose tokens are targets.

    Attributes:
        num_special: Special tokens of a row.
        masking: Says how many targets a row has.
    """

    num_special: int = 0
    masking: Masking | None = None

    @property
    def row_lengths(self) -> Int64Array:
        """(num_rows,) int64, tokens in each row, special ones included."""
        return super().row_lengths + self.num_special

    @property
    def num_label_tokens(self) -> int:
        """Targets in all rows."""
        assert self.masking is not None
        return int(self.masking.num_targets(self.length - self.num_context).sum())


class MaskedRowDataset(RowDataset):
    """Batches of rows with hidden tokens.

    Args:
        store: Where the tokens are.
        table: Which tokens stand in which row.
        pad_token_id: Fills the rest of a row.
        masking: Says what is hidden.
        edges: Special tokens before and after a row.
        special_ids: Tokens that are never hidden.
        is_train: Whether each epoch hides others.
    """

    def __init__(
        self,
        store: TokenStore,
        table: MaskedTable,
        pad_token_id: int,
        masking: Masking,
        edges: tuple[list[int], list[int]],
        *,
        special_ids: Int64Array,
        is_train: bool,
    ) -> None:
        super().__init__(store, table, pad_token_id)
        self.masking = masking
        self.edges = edges
        self.special_ids = special_ids
        self.is_train = is_train

    def collate(
        self, rows: Sequence[Sequence[Segment]], row_ids: Sequence[int], per_row: Mapping[str, Int64Array]
    ) -> dict[str, Any]:
        """Hide tokens and pad."""
        epoch = getattr(row_ids, "epoch", 0) if self.is_train else None
        examples = [self._masked(row, row_id, epoch) for row, row_id in zip(rows, row_ids, strict=True)]
        batch = PaddedColumns(self.pad_token_id)(examples)
        return {**batch, **{name: torch.from_numpy(values) for name, values in per_row.items()}}

    def _masked(self, row: Sequence[Segment], row_id: int, epoch: int | None) -> dict[str, Any]:
        before, after = self.edges
        if not row:  # an empty row
            tokens = np.array([*before, *after] or [self.pad_token_id], np.int64)
            return {"input_ids": tokens, "labels": np.full(len(tokens), IGNORE_INDEX)}
        (segment,) = row
        tokens = np.concatenate([before, segment.tokens, after]).astype(np.int64)
        may_hide = np.zeros(len(tokens), bool)
        may_hide[len(before) + segment.num_context : len(before) + len(segment.tokens)] = True
        may_hide &= ~np.isin(tokens, self.special_ids)
        hidden, labels = self.masking.hide(tokens, may_hide, row_id, epoch)
        return {"input_ids": hidden, "labels": labels}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoding["input_ids"], encoding["special_tokens_mask"]
    first = mask.index(0) if 0 in mask else len(ids)
    last = len(ids) - mask[::-1].index(0) if 0 in mask else len(ids)
    return list(ids[:first]), list(ids[last:])
