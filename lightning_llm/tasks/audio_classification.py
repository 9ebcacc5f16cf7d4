"""A label for each recording."""

from __future__ import annotations

from lightning_llm.tasks.sequence_classification import SequenceClassification


class AudioClassification(SequenceClassification):
    """:class:`SequenceClassification` of ``input_values`` (batch, samples) or ``input_features``, with their mask."""

    name = "audio-classification"
    auto_class = "AutoModelForAudioClassification"
    reads_tokens = False
    inputs = ("input_values", "input_features")
    collator = "feature extractor's `pad`"
