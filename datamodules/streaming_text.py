"""Text that is streamed: corpora larger than disk or memory, encoded, shuffled and packed on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_llm.datamodules.collate import Layout
from lightning_llm.datamodules.mixture import temperature_weights
from lightning_llm.datamodules.resumable import ResumableDataModule
from lightning_llm.datamodules.rows import Windowing
from lightning_llm.datamodules.shorter_rows import cut_rows
from lightning_llm.datamodules.streams.batch import collate_stream_rows
from lightning_llm.datamodules.streams.file_shards import FileShards
from lightning_llm.datamodules.streams.loader import StreamLoader
from lightning_llm.datamodules.streams.shard_sources import open_shards
from lightning_llm.datamodules.streams.shards import ShardedSource
from lightning_llm.datamodules.streams.virtual_stream import Stop, StreamSettings
from lightning_llm.datamodules.text_settings import check_numbers, check_shares, check_weights, check_windowing
from lightning_llm.datamodules.tokenizer import byte_tokenizer, encoder, load_tokenizer, token_bytes

_Split = Literal["train", "validation"]
_STAGES: dict[str | None, tuple[_Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("validation",),
    "predict": ("validation",),
}


class StreamingTextDataModule(ResumableDataModule):
    """Train a language model on text that is read, encoded, shuffled and packed on the way; nothing is kept on disk.

    The data is dealt to ``num_streams`` virtual streams, and each of the R ranks reads those of its number modulo R. So
    the rows of each optimizer step do not depend on the number of ranks, of workers, or of micro-batches that make up
    the step, and a run is resumed exactly, on another number of each as well.

    Args:
        data: A file, folder or pattern of ``.jsonl`` (also ``.gz``, ``.zst``) or ``.parquet`` files, local or at any
            address that fsspec knows (``s3://bucket/folder``), or several; a `datasets` data set, iterable or not, or
            the folder of a saved one; or the id of one on the hub, which is then streamed. A mapping of names to
            these is a mixture.
        tokenizer: A tokenizer, its hub id or local folder; or ``bytes``.
        max_length: Tokens in a row.
        windowing: As in :class:`~lightning_llm.datamodules.text.TextDataModule`; a pool of documents is packed at once.
        layout: ``packed``, ``padded`` or ``padding_free``, see :func:`~lightning_llm.datamodules.collate.collate_rows`;
            None: ``packed`` for rows of several documents, else ``padded``.
        micro_batch_size: Rows in a training batch of one rank.
        eval_micro_batch_size: Rows in a validation, test or predict batch of one rank; ``micro_batch_size`` if None.
        stride: For ``windows`` and ``packed``: new tokens in each window of a long document.
        validation_data: Like ``data``, for a mixture with some of its names; streamed once, in order, each row once.
        weights: Of a mixture's sources: their share of the rows. None: by size.
        temperature: Without ``weights``: shares in proportion to size^(1/temperature), the size of files as they lie.
        stop: When a stream of a mixture ends. ``all_exhausted``: when each source has been read whole; those that end
            before are read again, in another order. ``first_exhausted``: when one has. ``each_once``: when all have;
            none is read again, and those that are left go on alone.
        num_streams: Virtual streams; a multiple of any number of ranks that the run may be resumed on.
        pool_tokens: Tokens that a stream holds of a source, to pack and to shuffle them. None: 2^17, and 32 rows at
            least.
        text_column: Which field holds the text.
        split: Of a data set: the split to train on.
        validation_split: Of ``validation_data``, if it is a data set.
        dataset_config: Configuration of a hub data set.
        append_eos: End each document with the tokenizer's end-of-text token.
        min_length: Documents with fewer tokens are left out.
        skip_corrupt: Leave out unreadable records with a warning, instead of stopping at the first.
        shuffle: Shuffle shards, and the rows of each pool, anew in each epoch, which begins elsewhere in them.
        seed: Of that order.
        num_workers: Processes of a rank that read and encode; each takes some of its streams.
        pin_memory: Page-lock batches for copies to a GPU; None does so where there is one.
        storage_options: For fsspec, credentials for instance; never part of a checkpoint.
        trust_remote_code: Run tokenizer code that comes with the hub repository or folder. Off unless asked for.

    Raises:
        ValueError: For settings that do not fit each other.
    """

    def __init__(
        self,
        data: Any,  # str | list[str] | a data set, or a mapping to these
        tokenizer: str | Any,
        max_length: int = 1024,
        windowing: Windowing = "packed",
        layout: Layout | None = None,
        micro_batch_size: int = 8,
        eval_micro_batch_size: int | None = None,
        stride: int | None = None,
        validation_data: Any = None,
        weights: dict[str, float] | None = None,
        temperature: float = 1.0,
        stop: Stop = "all_exhausted",
        num_streams: int = 48,
        pool_tokens: int | None = None,
        text_column: str = "text",
        split: str = "train",
        validation_split: str = "validation",
        dataset_config: str | None = None,
        append_eos: bool = True,
        min_length: int = 2,
        skip_corrupt: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        storage_options: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(tokenizer, pin_memory)
        self.data = _named(data)
        self.validation_data = _named(validation_data) if validation_data is not None else {}
        unknown = sorted(set(self.validation_data) - set(self.data))
        if unknown:
            raise ValueError(
                f"`validation_data` must name sources of `data` ({sorted(self.data)}), but names {unknown}. For a "
                f"mixture both are mappings, for a single source neither is."
            )
        check_weights(weights, self.data)
        check_shares(temperature=temperature)
        check_numbers(
            max_length=max_length,
            micro_batch_size=micro_batch_size,
            eval_micro_batch_size=eval_micro_batch_size,
            num_streams=num_streams,
            pool_tokens=pool_tokens,
            min_length=min_length,
            num_workers=num_workers,
            seed=seed,
        )
        check_windowing("windowing", windowing, "stride", stride, max_length)
        _check_choice("stop", stop, Stop)
        if layout is not None:
            _check_choice("layout", layout, Layout)
        is_packed = windowing in ("packed", "wrapped")
        if layout == "padded" and is_packed:
            raise ValueError(f"layout='padded' is for rows of one document, but windowing is {windowing!r}.")
        self.max_length = max_length
        self.windowing: Windowing = windowing
        self.layout: Layout = layout or ("packed" if is_packed else "padded")
        self.micro_batch_size = micro_batch_size
        self.eval_micro_batch_size = eval_micro_batch_size or micro_batch_size
        self.stride = stride
        self.weights = weights
        self.temperature = temperature
        self.stop: Stop = stop
        self.num_streams = num_streams
        self.pool_tokens = pool_tokens or max(1 << 17, 32 * max_length)
        self.open_options: dict[str, Any] = {
            "text_column": text_column,
            "dataset_config": dataset_config,
            "skip_corrupt": skip_corrupt,
            "storage_options": storage_options,
        }
        self.splits = {"train": split, "validation": validation_split}
        self.append_eos = append_eos
        self.min_length = min_length
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.trust_remote_code = trust_remote_code
        self._sources: dict[_Split, dict[str, ShardedSource]] = {}

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Load the tokenizer, from the hub if need be; one process per machine."""
        self.tokenizer  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """Find the shards; no document is read yet."""
        super().setup(stage)
        self._find_shards(stage)

    def _find_shards(self, stage: str | None) -> None:
        for split in _STAGES.get(stage, ("train", "validation")):
            if split not in self._sources:
                data = self.data if split == "train" else self.validation_data
                options = {**self.open_options, "split": self.splits[split]}
                self._sources[split] = {name: open_shards(each, **options) for name, each in data.items()}
                if split == "train":
                    rank_zero_info(self.summary())

    def train_dataloader(self) -> StreamLoader:
        """Streamed rows, in a new order each epoch; from the loaded position, if there is one."""
        loader = self._loader("train", self.micro_batch_size)
        if self.trainer is not None:
            loader.epoch = self.trainer.current_epoch
        self._resumed(loader)
        return loader

    def val_dataloader(self) -> StreamLoader | list[Any]:
        """Rows of the validation data, each once, in order; nothing where there is none."""
        return self._loader("validation", self.eval_micro_batch_size) if self.validation_data else []

    def test_dataloader(self) -> StreamLoader | list[Any]:
        """As in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StreamLoader | list[Any]:
        """As in validation."""
        return self.val_dataloader()

    # ---- what others may ask -------------------------------------------------------------------------------------

    @property
    def source_names(self) -> list[str]:
        """Names of a mixture's sources, in the order of a batch's ``source_ids``; of a single source, ``""``."""
        return list(self.data)

    @property
    def packs_documents(self) -> bool:
        """Whether rows hold several documents, which the model must keep apart."""
        return self.windowing in ("packed", "wrapped") or self.layout == "padding_free"

    def cut_batch(self, batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
        """A training batch in rows of ``length`` tokens at most, every target in one of them; for callbacks.

        See :func:`~lightning_llm.datamodules.shorter_rows.cut_rows`; a batch without longer rows comes back as it is.
        """
        return cut_rows(batch, length, layout=self.layout, pad_token_id=self._pad_token_id())

    def summary(self) -> str:
        """A line per source: shards, size, share of the rows, and what dealing them to the streams costs."""
        sources = self._sources["train"]
        weights = self._weights("train")
        lines = []
        for (name, source), weight in zip(sources.items(), weights, strict=True):
            size = f", {sum(source.sizes) / 1e6:,.1f} MB" if isinstance(source, FileShards) else ""
            share = f", {weight / sum(weights):.1%} of the rows" if len(sources) > 1 else ""
            cost = reading_cost(source, self.num_streams)
            again = f"; read {cost:.1f} times over, for want of more files" if cost > 1.5 else ""
            title = f"{name}: {source.name}" if name else source.name
            lines.append(f"{title}: {len(source.sizes):,} shards{size}, {self.num_streams} streams{share}{again}")
        return "\n".join(lines)

    # ---- details -------------------------------------------------------------------------------------------------

    def _weights(self, split: _Split) -> list[float]:
        sources = self._sources[split]
        if len(sources) == 1:
            return [1.0]
        if self.weights is not None:
            return [self.weights[name] for name in sources]
        unknown = [name for name, source in sources.items() if not source.has_known_size]
        if unknown and split == "train":
            raise ValueError(
                f"A mixture by size needs sizes, which iterable data sets do not tell: {unknown}. Pass weights=..., "
                f"the share of the rows of each of {list(sources)}."
            )
        return (
            [1.0] * len(sources)
            if unknown
            else temperature_weights(
                [sum(source.sizes) for source in sources.values()], self.temperature if split == "train" else 1.0
            ).tolist()
        )

    def _settings(self, split: _Split) -> StreamSettings:
        settings = StreamSettings(
            sources=list(self._sources[split].values()),
            weights=self._weights(split),
            num_streams=self.num_streams,
            encode=encoder(self.tokenizer, append_eos=self.append_eos),
            max_length=self.max_length,
            windowing=self.windowing,
            stride=self.stride,
            min_length=self.min_length,
            pool_tokens=self.pool_tokens,
            shuffle=self.shuffle,
            seed=self.seed,
            stop=self.stop,
            vocab_size=len(self.tokenizer),
        )
        if split == "train":
            return settings
        return replace(settings, shuffle=False, stop="each_once", token_bytes=token_bytes(self.tokenizer))

    def _identity(self, split: _Split) -> dict[str, Any]:
        """What decides the rows and their order, for a checkpoint to remember."""
        settings = self._settings(split)
        names = (
            "num_streams",
            "max_length",
            "windowing",
            "stride",
            "min_length",
            "pool_tokens",
            "shuffle",
            "seed",
            "stop",
        )
        identity: dict[str, Any] = {name: getattr(settings, name) for name in names}
        identity["tokenizer"] = encoder(self.tokenizer, append_eos=self.append_eos).fingerprint()
        identity["sources"] = list(self._sources[split])
        identity["weights"] = list(settings.weights)
        for name, source in self._sources[split].items():
            identity |= {f"{key} of {name}" if name else key: value for key, value in source.identity.items()}
        return identity

    def _loader(self, split: _Split, micro_batch_size: int) -> StreamLoader:
        if split not in self._sources:
            self._find_shards({"train": "fit", "validation": "validate"}[split])
        rank, num_ranks = self._ranks()
        collate = partial(
            collate_stream_rows,
            pad_token_id=self._pad_token_id(),
            layout=self.layout,
            max_length=self.max_length,
            source_ids=[self.source_names.index(name) for name in self._sources[split]] if len(self.data) > 1 else None,
        )
        return StreamLoader(
            self._settings(split),
            micro_batch_size,
            collate,
            rank=rank,
            num_ranks=num_ranks,
            num_workers=self.num_workers,
            pin_memory=self._pins_memory(),
            trainer=self.trainer if split == "train" else None,
            identity=self._identity(split),
        )

    def _training_identity(self) -> dict[str, Any] | None:
        return self._identity("train") if "train" in self._sources else None

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        if not isinstance(self._tokenizer, str):
            given: PreTrainedTokenizerBase = self._tokenizer
            return given
        if self._tokenizer == "bytes":
            return byte_tokenizer()
        if self._tokenizer == "bpe":
            raise ValueError(
                "tokenizer='bpe' would read the whole stream to train on it. Train one on a sample: "
                "TextDataModule(sample, 'bpe').tokenizer, and pass that."
            )
        return load_tokenizer(self._tokenizer, trust_remote_code=self.trust_remote_code)


def reading_cost(source: ShardedSource, num_streams: int) -> float:
    """How often a source is read in an epoch: more than once where streams share what can only be read whole."""
    pieces = [piece for stream in source.deal(num_streams) for piece in stream]
    read = sum(source.sizes[p.shard] if source.is_read_whole(p.shard) else p.end - p.begin for p in pieces)
    return read / sum(source.sizes)


def _named(data: Any) -> dict[str, Any]:
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):
        if not data:
            raise ValueError("`data` is a mixture without a source. Name one at least: {'code': 'code/', ...}.")
        return dict(data)
    return {"": data}


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, get_args(choices)))}, but got {value!r}.")
