"""Data modules for long texts: pure index mathematics, and one LightningDataModule per file."""

from lightning_llm.datamodules.streaming_text import StreamingTextDataModule
from lightning_llm.datamodules.text import TextDataModule

__all__ = ["StreamingTextDataModule", "TextDataModule"]
