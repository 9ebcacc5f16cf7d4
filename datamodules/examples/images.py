"""Images of rows: opened when a batch asks for them, upright, in three colours, and as a model takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_llm.datamodules.examples.media_files import open_binary
from lightning_llm.datamodules.examples.records import RecordError, Records
from lightning_llm.datamodules.rows import EMPTY_ROW

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


def open_image(value: Any, row: str, column: str) -> Any:
    """An image as PIL's, turned as its EXIF says, in RGB; a transparent one loses its transparency.

    Args:
        value: A path, bytes, a mapping with either, a PIL image, or a uint8 array (height, width[, channels]).
        row: Its name.
        column: Of the value.

    Raises:
        RecordError: If it does not open.
    """
    from PIL import Image, ImageOps

    name = "of the row"
    try:
        if isinstance(value, Image.Image):
            image = value
        elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
            image = Image.fromarray(value)
        else:
            file, name = open_binary(value, row, column)
            with file:
                image = Image.open(file)
                image.load()
        image = ImageOps.exif_transpose(image)
    except RecordError:
        raise
    except Exception as error:  # PIL's plugins raise whatever a damaged file leads them to
        raise RecordError(
            f"{row}: the image {name} in column {column!r} does not open ({error}). Mend the file, or leave the row "
            f"out."
        ) from error
    if image.mode.startswith(("I", "F")):
        raise RecordError(
            f"{row}: the image {name} in column {column!r} has more than 8 bits a pixel (mode {image.mode!r}), and "
            f"would be cut off at white. Scale it to 8 bits first."
        )
    return image.convert("RGB")


def check_image(value: Any, row: str, column: str) -> None:
    """Refuse what is no image or no file, without a look into it.

    Raises:
        RecordError: If it is none.
    """
    from PIL import Image

    if not isinstance(value, (Image.Image, np.ndarray)):
        open_binary(value, row, column)[0].close()


@dataclass(frozen=True)
class Augmentation:
    """Another view of an image in each epoch.

    Attributes:
        flip: Mirror every second image.
        crop: The smallest share of an image's area that is seen; 1 for all of it.
        seed: Of both.
    """

    flip: bool = False
    crop: float = 1.0
    seed: int = 0

    def __call__(self, image: Any, row: int, epoch: int) -> Any:
        """What seed, epoch and row make of a PIL image."""
        random = np.random.default_rng([self.seed, 0, epoch, row])
        if self.crop < 1:
            image = image.crop(_random_box(random, image.size, self.crop))
        if self.flip and random.random() < 0.5:
            image = image.transpose(0)  # left to right
        return image


def _random_box(random: np.random.Generator, size: tuple[int, int], least: float) -> tuple[int, int, int, int]:
    """A box of ``least`` to all of the area, sides in 3:4 to 4:3 of the image's own where they fit."""
    area, ratio = random.uniform(least, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    shares = math.sqrt(area * ratio), math.sqrt(area / ratio)
    width, height = (min(max(round(length * share), 1), length) for length, share in zip(size, shares, strict=True))
    left, top = (int(random.integers(0, whole - part + 1)) for whole, part in zip(size, (width, height), strict=True))
    return left, top, left + width, top + height


@dataclass(frozen=True, eq=False)
class ImageLoader:
    """Reads the image of a record, as the model takes it.

    Attributes:
        records: Of the split.
        column: Of the images.
        processor: transformers' image processor.
        augmentation: In training.
    """

    records: Records
    column: str
    processor: Any
    augmentation: Augmentation | None = None

    def __call__(self, record: int, row: int, epoch: int) -> Mapping[str, Any]:
        """``pixel_values`` (channels, height, width) float32; of a black image for the empty row."""
        if record == EMPTY_ROW:
            image = open_image(np.zeros((32, 32, 3), np.uint8), "the empty row", self.column)
        else:
            name = self.records.row_name(record)
            image = open_image(self.records[record].get(self.column), name, self.column)
            if self.augmentation is not None:
                image = self.augmentation(image, row, epoch)
        pixels = self.processor(image, return_tensors="np")["pixel_values"][0]
        return {"pixel_values": np.asarray(pixels, np.float32)}
