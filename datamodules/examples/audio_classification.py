"""Recordings with a class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lightning_llm.datamodules.examples.dataset import Collate, ExampleDataset, ExampleTable, LoadedDataset
from lightning_llm.datamodules.examples.labelled_rows import LabelledRowsDataModule
from lightning_llm.datamodules.examples.labels import ProblemType
from lightning_llm.datamodules.examples.media_files import open_media
from lightning_llm.datamodules.examples.records import Record, Records
from lightning_llm.datamodules.examples.sounds import AUDIO_SUFFIXES, PaddedSounds, SoundLoader, SoundReader
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array


class AudioClassificationDataModule(LabelledRowsDataModule):
    """Rows of a recording with a label, for ``LLMModule(task="audio-classification")``.

    Recordings are read when a batch asks for them: let ``num_workers`` do it. Batches have what the feature extractor
    makes, ``input_values`` (batch, samples) or ``input_features``, its ``attention_mask`` where it makes one, and
    ``labels``. A budget (``batching="padded"``, ``micro_batch_tokens``) counts samples. Files need the package
    soundfile.

    Args:
        data: A folder with a folder of recordings for each class, also below a folder of the split's name; or jsonl,
            json, csv or parquet files, a data set, or a list of mappings.
        feature_extractor: Of the model: its folder or hub id, or a feature extractor. None takes the samples as they
            are, at a mean of 0 and a variance of 1, as wav2vec 2.0 does.
        sampling_rate: Without one: samples a second; 16,000 if None. Recordings of another rate are refused.
        max_seconds: Of a recording; a warning says how much is cut. None: all.
        audio_column: The column of the recordings: a path (from the file's folder), a file's bytes, a mapping with
            ``path`` or ``bytes``, as data sets store sounds, a mapping with ``array`` and ``sampling_rate``, or a list
            of samples.
        label_column: Of the labels, as for ``TextClassificationDataModule``.
        labels: Names of the classes, in order, or how many there are, numbered from 0. None: those of the folders or
            the data set, or all that the training rows have.
        problem_type: ``single_label_classification``, ``multi_label_classification`` or ``regression``.
        label_separator: Between the classes of a row in one column of text.
        allow_empty_classes: Whether a class may have no training row.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    _unit = "samples"

    def __init__(
        self,
        data: Any,
        feature_extractor: str | Any | None = None,
        *,
        sampling_rate: int | None = None,
        max_seconds: float | None = None,
        audio_column: str = "audio",
        label_column: str | list[str] = "label",
        labels: list[str] | int | None = None,
        problem_type: ProblemType = "single_label_classification",
        label_separator: str = ",",
        allow_empty_classes: bool = False,
        **options: Any,
    ) -> None:
        if feature_extractor is not None and sampling_rate is not None:
            raise ValueError("The feature extractor knows the sampling rate: leave out `sampling_rate`.")
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"`max_seconds` must be above 0, but got {max_seconds}.")
        super().__init__(
            data,
            None,
            label_column=label_column,
            labels=labels,
            problem_type=problem_type,
            label_separator=label_separator,
            allow_empty_classes=allow_empty_classes,
            **options,
        )
        self.max_seconds = max_seconds
        self.audio_column = audio_column
        self._extractor = feature_extractor
        self._sampling_rate = sampling_rate

    @cached_property
    def feature_extractor(self) -> Any:
        """What makes a model's input of samples; exported with the model."""
        if self._extractor is not None and not isinstance(self._extractor, str):
            return self._extractor
        return load_feature_extractor(self._extractor, self._sampling_rate, trust_remote_code=self.trust_remote_code)

    @property
    def _reader(self) -> SoundReader:
        return SoundReader(self.audio_column, int(self.feature_extractor.sampling_rate))

    @property
    def _max_samples(self) -> int | None:
        if self.max_seconds is None:
            return None
        return max(round(self.max_seconds * self._reader.sampling_rate), 1)

    @property
    def _limits(self) -> str:
        return f"max_seconds={self.max_seconds}"

    def _columns(self) -> Mapping[str, str]:
        return {"audio_column": self.audio_column, **self._label_columns()}

    def _encoding(self) -> Mapping[str, Any]:
        return {**super()._encoding(), "sampling_rate": self._reader.sampling_rate, "max_samples": self._max_samples}

    def _open(self, split: Split) -> Records:
        columns = (self.audio_column, self._labels.columns[0])
        name, config = self._names[split], self._dataset_config
        return open_media(self._data[split], AUDIO_SUFFIXES, columns, split=name, dataset_config=config)

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        examples: list[list[Example]] = []
        for record, row in zip(records, names, strict=True):
            number = self._reader.num_samples(record.get(self.audio_column), row)
            kept = number if self._max_samples is None else min(number, self._max_samples)
            label = self._labels.encode(record, row)
            examples.append([{"labels": label, "_num_samples": kept, "_num_cut": number - kept}])
        return examples

    def _empty(self) -> Example:
        return {"labels": self._labels.empty()}

    def _collate(self) -> Collate:
        return PaddedSounds(self.feature_extractor)

    def _make_dataset(self, split: Split, store: ExampleStore, rows: Int64Array) -> ExampleDataset:
        load = SoundLoader(self.records(split), self._reader, self.feature_extractor, self._max_samples)
        table = ExampleTable(np.asarray(store.values["_num_samples"], np.int64)[rows], store.num_targets()[rows])
        return LoadedDataset(store, rows, self._collate(), self._empty(), table, load=load)


def load_feature_extractor(
    name: str | None, sampling_rate: int | None = None, *, trust_remote_code: bool = False
) -> Any:
    """A feature extractor from a folder or the hub, or one that takes normalised samples.

    Raises:
        FileNotFoundError: If there is none of that name.
    """
    import transformers

    if name is None:
        kind: Any = transformers.Wav2Vec2FeatureExtractor
        return kind(sampling_rate=16_000 if sampling_rate is None else sampling_rate, return_attention_mask=True)
    try:
        loader: Any = transformers.AutoFeatureExtractor
        return loader.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no feature extractor in {name!r} ({error}). Expected a folder or hub id with a "
            f"preprocessor_config.json; or leave `feature_extractor` out, and name `sampling_rate`."
        ) from error
