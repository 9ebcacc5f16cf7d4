"""One body of documents and its share of each split: tokens on disk, and the rows laid out over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.cache import build_once, fingerprint
from lightning_llm.datamodules.order import selected
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.rows import RowTable, Windowing, make_rows
from lightning_llm.datamodules.sources import DocumentSource, open_source
from lightning_llm.datamodules.store_builder import build_store
from lightning_llm.datamodules.token_store import FORMAT_VERSION, TokenStore
from lightning_llm.datamodules.tokenizer import byte_tokenizer, encoder, load_tokenizer, token_bytes, train_bpe
from lightning_llm.datamodules.windows import Int64Array

Data = str | Path | Sequence[str | Path]


class SplitRows(NamedTuple):
    """What a split of a source holds.

    Attributes:
        store: The tokens of all documents.
        documents: (n,) int64, those of the split, by number.
        table: Their rows.
    """

    store: TokenStore
    documents: Int64Array
    table: RowTable


@dataclass(frozen=True)
class TextSource:
    """Documents, where they are and who trains on which of them.

    Attributes:
        data: As :func:`~lightning_llm.datamodules.sources.open_source` takes it.
        validation_data: Likewise; None takes a share of the documents of ``data``.
        validation_fraction: That share.
        test_data: Likewise; None tests on the validation documents.
        split: Of a data set: the split to train on.
        validation_split: Of ``validation_data``, if it is a data set: the split to validate on.
        seed: Of the choice of validation documents.
        min_length: Documents with fewer tokens are left out.
        open_options: Further arguments of ``open_source``.
    """

    data: Data
    validation_data: Data | None
    validation_fraction: float
    test_data: Data | None
    split: str
    validation_split: str
    seed: int
    min_length: int
    open_options: dict[str, Any]

    def title(self, name: str) -> str:
        """What to call the source on a screen, where a mixture calls it ``name``."""
        places = [self.data] if isinstance(self.data, (str, Path)) else self.data
        place = f"{places[0]}" if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
        return f"{name} ({place})" if name not in ("", place) else place

    @property
    def has_validation(self) -> bool:
        """Whether there are documents to validate on."""
        return self.validation_data is not None or self.validation_fraction > 0

    @property
    def stored_splits(self) -> list[Split]:
        """Splits with documents of their own."""
        own: dict[Split, Data | None] = {"validation": self.validation_data, "test": self.test_data}
        return ["train", *(split for split, data in own.items() if data is not None)]

    def open(self, split: Split) -> DocumentSource:
        """Where a split's documents come from."""
        if split == "test" and self.test_data is not None:
            data, part = self.test_data, "test"
        elif split != "train" and self.validation_data is not None:
            data, part = self.validation_data, self.validation_split
        else:
            data, part = self.data, self.split
        return open_source(data if isinstance(data, (str, Path)) else list(data), split=part, **self.open_options)

    def training_texts(self) -> Iterator[str]:
        """The text of the training documents, and of no other."""
        for number, document in enumerate(self.open("train").documents()):
            if not self._is_held_out(number):
                yield document.text

    def store(
        self,
        split: Split,
        cache_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        append_eos: bool,
        special_tokens: bool = True,
    ) -> TokenStore:
        """Open a split's token cache; write it first where it is missing."""
        source = self.open(split)
        encode = encoder(tokenizer, append_eos=append_eos, special_tokens=special_tokens)
        name = fingerprint([str(FORMAT_VERSION), source.fingerprint(), encode.fingerprint()])
        folder = build_once(
            cache_dir / f"tokens-{name}",
            lambda path: build_store(
                path,
                source.documents(),
                encode,
                token_bytes(tokenizer),
                name=source.name,
                total_bytes=source.total_bytes,
            ),
        )
        return TokenStore.open(folder)

    def rows(
        self,
        split: Split,
        open_store: Callable[[Split], TokenStore],
        max_length: int,
        windowing: Windowing,
        stride: int | None,
    ) -> SplitRows:
        """Lay a split's documents out in rows.

        Raises:
            ValueError: If the split has no document, saying why.
        """
        if split == "test" and self.test_data is None and not self.has_validation:
            raise ValueError(
                "There are no test documents: all are trained on. Pass test_data=..., or hold some out with "
                "validation_fraction or validation_data."
            )
        store = open_store(split)
        documents = self.documents(split, store)
        if not len(documents):
            raise self._no_document(split, store)
        table = make_rows(store.offsets, documents, max_length, windowing, stride)
        if table.num_cut_tokens:
            total = table.num_cut_tokens + table.num_tokens
            rank_zero_warn(
                f"windowing='documents' leaves out {table.num_cut_tokens:,} of {total:,} tokens "
                f"({table.num_cut_tokens / total:.0%}) of the {split} documents: what is beyond max_length="
                f"{max_length}. 'packed' and 'windows' lose none."
            )
        return SplitRows(store, documents, table)

    def documents(self, split: Split, store: TokenStore) -> Int64Array:
        """Documents of the split, by number; those of validation are chosen by number and seed alone."""
        numbers = np.arange(store.num_documents)
        shared = self.validation_data is None and self.validation_fraction > 0
        if shared and (split != "test" or self.test_data is None):
            held_out = self._is_held_out(numbers)
            numbers = numbers[~held_out] if split == "train" else numbers[held_out]
        return numbers[store.lengths[numbers] >= self.min_length]

    def _is_held_out(self, numbers: Any) -> Any:
        return selected(numbers, self.validation_fraction if self.validation_data is None else 0.0, self.seed)

    def _no_document(self, split: Split, store: TokenStore) -> ValueError:
        name, longest = self.open(split).name, int(store.lengths.max(initial=0))
        if longest >= self.min_length:
            return ValueError(
                f"No document is left for {split}: of {store.num_documents} in {name}, none was drawn for it with "
                f"validation_fraction={self.validation_fraction} and seed={self.seed}. Change those, pass "
                f"validation_data=..., or validation_fraction=0 to train without validation."
            )
        return ValueError(
            f"No document is left for {split}: of {store.num_documents} in {name}, none has {self.min_length} "
            f"tokens or more (min_length); the longest has {longest}. Lower min_length or add documents."
        )


def prepare_tokenizer(
    tokenizer: Any, sources: Iterable[TextSource], cache_dir: Path, *, vocab_size: int, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a user named, or train one on the training documents of all sources, and on no other.

    Args:
        tokenizer: A tokenizer; ``bytes``; ``bpe``, trained once and then kept in ``cache_dir``; a folder or hub id.
        sources: Where a ``bpe`` learns from.
        cache_dir: Where it is kept.
        vocab_size: Its size.
        trust_remote_code: Run code that comes with the tokenizer.
    """
    if not isinstance(tokenizer, str):
        given: PreTrainedTokenizerBase = tokenizer
        return given
    if tokenizer == "bytes":
        return byte_tokenizer()
    if tokenizer != "bpe":
        return load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    sources = list(sources)
    choice = [str(vocab_size)]
    for source in sources:
        held_out = (source.seed, source.validation_data, source.validation_fraction)
        choice += [source.open("train").fingerprint(), *map(str, held_out)]

    def build(folder: Path) -> None:
        texts = chain.from_iterable(source.training_texts() for source in sources)
        train_bpe(texts, vocab_size).save_pretrained(str(folder))

    return load_tokenizer(build_once(cache_dir / f"bpe-{fingerprint(choice)}", build))
