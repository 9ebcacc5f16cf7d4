"""Recordings of rows: read when a batch asks for them, one channel, at the rate that a model expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_llm.datamodules.examples.dataset import PaddedColumns
from lightning_llm.datamodules.examples.media_files import check_package, open_binary
from lightning_llm.datamodules.examples.records import RecordError, Records
from lightning_llm.datamodules.examples.store import Example
from lightning_llm.datamodules.rows import EMPTY_ROW

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"})

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SoundReader:
    """Reads recordings, or how long they are.

    Attributes:
        column: Of the recordings.
        sampling_rate: Samples a second that they must have.
    """

    column: str
    sampling_rate: int

    def num_samples(self, value: Any, row: str) -> int:
        """Samples of a recording; of a file only the head is read.

        Args:
            value: A path, bytes, a mapping with either, a mapping with ``array`` and ``sampling_rate``, or samples.
            row: Its name.

        Raises:
            RecordError: If it does not open, has another rate or no sample.
        """
        array = self._array(value, row)
        number = len(array) if array is not None else self._read_file(value, row, head=True)
        if not number:
            raise RecordError(f"{row}: the recording in column {self.column!r} has no sample. Leave the row out.")
        return int(number)

    def samples(self, value: Any, row: str) -> FloatArray:
        """The samples of a recording, (n,) float32, the mean of its channels.

        Raises:
            RecordError: As above.
        """
        array = self._array(value, row)
        return self._read_file(value, row, head=False) if array is None else array

    def _array(self, value: Any, row: str) -> FloatArray | None:
        if isinstance(value, Mapping) and value.get("array") is not None:
            self._check_rate(int(value.get("sampling_rate") or self.sampling_rate), "the recording", row)
            value = value["array"]
        if not isinstance(value, (list, tuple, np.ndarray, torch.Tensor)):
            return None
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            array = np.zeros((0, 0, 0), np.float32)
        if array.ndim != 1:
            raise RecordError(f"{row}: column {self.column!r} should hold the samples of one channel, as numbers.")
        return array

    def _read_file(self, value: Any, row: str, *, head: bool) -> Any:
        check_package("soundfile", "audio", "Files of sounds")
        import soundfile

        file, name = open_binary(value, row, self.column)
        try:
            with file, soundfile.SoundFile(file) as sound:
                rate, number = sound.samplerate, sound.frames
                samples = None if head else sound.read(dtype="float32", always_2d=True).mean(1)
        except (RuntimeError, OSError, TypeError) as error:
            raise RecordError(
                f"{row}: the recording {name} in column {self.column!r} does not open ({error}). Mend the file, or "
                f"leave the row out."
            ) from error
        self._check_rate(rate, f"the recording {name}", row)
        return number if head else samples

    def _check_rate(self, rate: int, what: str, row: str) -> None:
        if rate != self.sampling_rate:
            raise RecordError(
                f"{row}: {what} in column {self.column!r} has {rate} samples a second, but the model expects "
                f"{self.sampling_rate}. Convert the files to that rate (ffmpeg -i in.wav -ar {self.sampling_rate} "
                f"out.wav)."
            )


@dataclass(frozen=True, eq=False)
class SoundLoader:
    """Reads the recording of a record, as the model takes it.

    Attributes:
        records: Of the split.
        reader: Reads recordings.
        extractor: transformers' feature extractor.
        max_samples: Of a recording; what is beyond is left out. None: all.
    """

    records: Records
    reader: SoundReader
    extractor: Any
    max_samples: int | None = None

    def __call__(self, record: int, row: int, epoch: int) -> Mapping[str, Any]:
        """``input_values`` (samples,) or ``input_features``; of half a second of silence for the empty row."""
        if record == EMPTY_ROW:
            samples = np.zeros(self.reader.sampling_rate // 2, np.float32)
        else:
            value = self.records[record].get(self.reader.column)
            name = self.records.row_name(record)
            samples = self.reader.samples(value, name)[: self.max_samples]
        features = self.extractor(samples, sampling_rate=self.reader.sampling_rate, return_tensors="np")
        name = self.extractor.model_input_names[0]
        return {name: np.asarray(features[name][0], np.float32)}


@dataclass(frozen=True, eq=False)
class PaddedSounds:
    """Make a batch of recordings: padded as the feature extractor pads, with its mask where it makes one.

    Attributes:
        extractor: transformers' feature extractor.
    """

    extractor: Any

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The features, their mask, and what else the examples have."""
        name = self.extractor.model_input_names[0]
        padded = self.extractor.pad({name: [example[name] for example in examples]}, padding=True, return_tensors="pt")
        rest = [{key: value for key, value in example.items() if key != name} for example in examples]
        columns = {key: value.long() if key == "attention_mask" else value.float() for key, value in padded.items()}
        return {**columns, **PaddedColumns(pad_token_id=0)(rest)}
