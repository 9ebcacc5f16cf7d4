"""Data modules for long texts and for examples of every task: pure index mathematics, and one class per file."""

from lightning_llm.datamodules.examples.text_classification import TextClassificationDataModule
from lightning_llm.datamodules.multi_task.data_module import MultiTaskDataModule
from lightning_llm.datamodules.streaming_text import StreamingTextDataModule
from lightning_llm.datamodules.text import TextDataModule

__all__ = ["MultiTaskDataModule", "StreamingTextDataModule", "TextClassificationDataModule", "TextDataModule"]
