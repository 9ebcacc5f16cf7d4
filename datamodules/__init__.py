"""Data modules for long texts and for examples of every task: pure index mathematics, and one class per file."""

from lightning_llm.datamodules.examples.audio_classification import AudioClassificationDataModule
from lightning_llm.datamodules.examples.chat import ChatDataModule
from lightning_llm.datamodules.examples.image_classification import ImageClassificationDataModule
from lightning_llm.datamodules.examples.pairs import PairDataModule
from lightning_llm.datamodules.examples.preference import PreferenceDataModule
from lightning_llm.datamodules.examples.question_answering import QuestionAnsweringDataModule
from lightning_llm.datamodules.examples.seq2seq import Seq2SeqDataModule
from lightning_llm.datamodules.examples.text_classification import TextClassificationDataModule
from lightning_llm.datamodules.examples.token_classification import TokenClassificationDataModule
from lightning_llm.datamodules.masked_text import MaskedTextDataModule
from lightning_llm.datamodules.multi_task.data_module import MultiTaskDataModule
from lightning_llm.datamodules.streaming_text import StreamingTextDataModule
from lightning_llm.datamodules.text import TextDataModule

__all__ = [
    "AudioClassificationDataModule",
    "ChatDataModule",
    "ImageClassificationDataModule",
    "MaskedTextDataModule",
    "MultiTaskDataModule",
    "PairDataModule",
    "PreferenceDataModule",
    "QuestionAnsweringDataModule",
    "Seq2SeqDataModule",
    "StreamingTextDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
    "TokenClassificationDataModule",
]
