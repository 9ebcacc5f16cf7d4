"""Callbacks for any LightningModule; importing them imports neither transformers nor datasets."""

from lightning_llm.callbacks.accumulation_schedule import AccumulationSchedule
from lightning_llm.callbacks.ada_lora_allocation import AdaLoraAllocation
from lightning_llm.callbacks.adaptive_accumulation import AdaptiveAccumulation
from lightning_llm.callbacks.dynamic_batch_scaler import DynamicBatchScaler
from lightning_llm.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_llm.callbacks.huggingface_checkpoint import HuggingFaceCheckpoint
from lightning_llm.callbacks.learning_rate_scaling import LearningRateScaling
from lightning_llm.callbacks.magnitude_pruning import MagnitudePruning
from lightning_llm.callbacks.pieces.rows import CannotSplit
from lightning_llm.callbacks.sequence_length_schedule import SequenceLengthSchedule
from lightning_llm.callbacks.token_throughput import TokenThroughput
from lightning_llm.callbacks.token_weighted_accumulation import TokenWeightedAccumulation
from lightning_llm.callbacks.training_report import TrainingReport

__all__ = [
    "AccumulationSchedule",
    "AdaLoraAllocation",
    "AdaptiveAccumulation",
    "CannotSplit",
    "DynamicBatchScaler",
    "GradientNoiseScale",
    "HuggingFaceCheckpoint",
    "LearningRateScaling",
    "MagnitudePruning",
    "SequenceLengthSchedule",
    "TokenThroughput",
    "TokenWeightedAccumulation",
    "TrainingReport",
]
