"""Data modules for long texts: pure index mathematics, and one LightningDataModule per file."""

from lightning_llm.datamodules.text import TextDataModule

__all__ = ["TextDataModule"]
