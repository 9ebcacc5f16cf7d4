"""What a model is trained for: one small file per task, chosen by name in ``LLMModule(task=...)``."""

from lightning_llm.tasks.audio_classification import AudioClassification
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.causal_lm import CausalLM
from lightning_llm.tasks.dpo import DPO
from lightning_llm.tasks.embedding import Embedding
from lightning_llm.tasks.image_classification import ImageClassification
from lightning_llm.tasks.masked_lm import MaskedLM
from lightning_llm.tasks.question_answering import QuestionAnswering
from lightning_llm.tasks.seq2seq import Seq2Seq
from lightning_llm.tasks.sequence_classification import SequenceClassification
from lightning_llm.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        CausalLM,
        MaskedLM,
        Seq2Seq,
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        ImageClassification,
        AudioClassification,
        DPO,
        Embedding,
    )
}

__all__ = [
    "DPO",
    "TASKS",
    "AudioClassification",
    "CausalLM",
    "Embedding",
    "ImageClassification",
    "MaskedLM",
    "QuestionAnswering",
    "Seq2Seq",
    "SequenceClassification",
    "Task",
    "TokenClassification",
]
