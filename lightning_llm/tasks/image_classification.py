"""A label for each image."""

from __future__ import annotations

from lightning_llm.tasks.sequence_classification import SequenceClassification


class ImageClassification(SequenceClassification):
    """:class:`SequenceClassification` of ``pixel_values`` (batch, channels, height, width)."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    reads_tokens = False
    inputs = ("pixel_values",)
    collator = "DefaultDataCollator, after an image processor,"
