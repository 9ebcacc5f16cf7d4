"""Images with a class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lightning_llm.datamodules.examples.dataset import (
    Collate,
    ExampleDataset,
    ExampleTable,
    LoadedDataset,
    PaddedColumns,
)
from lightning_llm.datamodules.examples.images import IMAGE_SUFFIXES, Augmentation, ImageLoader, check_image
from lightning_llm.datamodules.examples.labelled_rows import LabelledRowsDataModule
from lightning_llm.datamodules.examples.labels import ProblemType
from lightning_llm.datamodules.examples.media_files import check_package, open_media
from lightning_llm.datamodules.examples.records import Record, Records
from lightning_llm.datamodules.examples.store import Example, ExampleStore
from lightning_llm.datamodules.row_data_module import Split
from lightning_llm.datamodules.windows import Int64Array


class ImageClassificationDataModule(LabelledRowsDataModule):
    """Rows of an image with a label, for ``LLMModule(task="image-classification")``.

    Images are opened when a batch asks for them: let ``num_workers`` do it. Batches have ``pixel_values`` (batch,
    channels, height, width) float32 and ``labels``. Needs the package pillow.

    Args:
        data: A folder with a folder of images for each class, also below a folder of the split's name; or jsonl, json,
            csv or parquet files, a data set, or a list of mappings.
        image_processor: Of the model: its folder or hub id, or an image processor. None resizes and normalises.
        image_size: Without one: height and width, a number for both; 224 if None.
        image_mean: Without one: what is taken off each colour, 0..1.
        image_std: Without one: what each is divided by.
        image_column: The column of the images: a path (from the file's folder), a file's bytes, or a mapping with
            ``path`` or ``bytes``, as data sets store images.
        label_column: Of the labels, as for ``TextClassificationDataModule``.
        labels: Names of the classes, in order, or how many there are, numbered from 0. None: those of the folders or
            the data set, or all that the training rows have.
        problem_type: ``single_label_classification``, ``multi_label_classification`` or ``regression``.
        label_separator: Between the classes of a row in one column of text.
        allow_empty_classes: Whether a class may have no training row.
        random_flip: Mirror every second training image; another choice in each epoch.
        random_crop: The smallest share of a training image's area that is seen, another part in each epoch; 1: all.
        **options: Of :class:`~lightning_llm.datamodules.examples.data_module.ExampleDataModule`: splits, batches,
            order, cache.

    Raises:
        ValueError: For settings that do not fit each other, and for rows that cannot be used, naming the row.
    """

    def __init__(
        self,
        data: Any,
        image_processor: str | Any | None = None,
        *,
        image_size: int | list[int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        image_column: str = "image",
        label_column: str | list[str] = "label",
        labels: list[str] | int | None = None,
        problem_type: ProblemType = "single_label_classification",
        label_separator: str = ",",
        allow_empty_classes: bool = False,
        random_flip: bool = False,
        random_crop: float = 1.0,
        **options: Any,
    ) -> None:
        if options.get("batching", "rows") != "rows":
            raise ValueError(f"Images of a batch have one size: leave out batching={options['batching']!r}.")
        if image_processor is not None and not (image_size is image_mean is image_std is None):
            raise ValueError("The image processor knows size, mean and deviation: leave out image_size and the others.")
        if not 0 < random_crop <= 1:
            raise ValueError(f"`random_crop` is a share of the image's area, above 0 and 1 at most, not {random_crop}.")
        check_package("PIL", "images", "Images")
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
        self.image_column = image_column
        self._processor = image_processor
        self._image_settings = (image_size, image_mean, image_std)
        self._augmentation = (
            Augmentation(random_flip, random_crop, self.seed) if random_flip or random_crop < 1 else None
        )

    @cached_property
    def image_processor(self) -> Any:
        """What makes ``pixel_values`` of an image; exported with the model."""
        if self._processor is not None and not isinstance(self._processor, str):
            return self._processor
        return load_image_processor(self._processor, *self._image_settings, trust_remote_code=self.trust_remote_code)

    def _columns(self) -> Mapping[str, str]:
        return {"image_column": self.image_column, **self._label_columns()}

    def _open(self, split: Split) -> Records:
        columns = (self.image_column, self._labels.columns[0])
        name, config = self._names[split], self._dataset_config
        return open_media(self._data[split], IMAGE_SUFFIXES, columns, split=name, dataset_config=config)

    def _encode(self, records: Sequence[Record], names: Sequence[str]) -> list[list[Example]]:
        examples: list[list[Example]] = []
        for record, row in zip(records, names, strict=True):
            check_image(record.get(self.image_column), row, self.image_column)
            examples.append([{"labels": self._labels.encode(record, row)}])
        return examples

    def _empty(self) -> Example:
        return {"labels": self._labels.empty()}

    def _collate(self) -> Collate:
        return PaddedColumns(pad_token_id=0)

    def _make_dataset(self, split: Split, store: ExampleStore, rows: Int64Array) -> ExampleDataset:
        augmentation = self._augmentation if split == "train" else None
        load = ImageLoader(self.records(split), self.image_column, self.image_processor, augmentation)
        table = ExampleTable(np.ones(len(rows), np.int64), store.num_targets()[rows])
        return LoadedDataset(store, rows, self._collate(), self._empty(), table, load=load)


def load_image_processor(
    name: str | None,
    size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """An image processor from a folder or the hub, or one that resizes and normalises.

    Raises:
        FileNotFoundError: If there is none of that name.
    """
    import transformers

    if name is None:
        height, width = [224 if size is None else size] * 2 if size is None or isinstance(size, int) else size
        kind: Any = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
        options = {"image_mean": list(mean or [0.5] * 3), "image_std": list(std or [0.5] * 3)}
        return kind(size={"height": height, "width": width}, **options)
    try:
        loader: Any = transformers.AutoImageProcessor
        return loader.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no image processor in {name!r} ({error}). Expected a folder or hub id with a "
            f"preprocessor_config.json; or leave `image_processor` out, and name `image_size` and the others."
        ) from error
