"""Tiny models of every task with rows to train on, in Hugging Face's own batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_llm import LLMModule

VOCAB = 60
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"model_type": "bert", **SIZES, **NO_DROPOUT, "intermediate_size": 32, "max_position_embeddings": 40}
ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1}
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": VOCAB,
    "dim": 16,
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "qa_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
LLAMA = {"model_type": "llama", **SIZES, "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
BART = {
    "model_type": "bart",
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    **NO_DROPOUT,
}
WAV2VEC2 = {
    "model_type": "wav2vec2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "classifier_proj_size": 8,
}
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@dataclass(frozen=True)
class Case:
    """A task with a tiny model, and how a row's targets are made."""

    task: str
    config: dict[str, Any]
    target: Callable[[torch.Generator, int], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)

    def module(self, **options: Any) -> LLMModule:
        defaults = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dtype": "float64"}
        torch.manual_seed(0)
        module = LLMModule(dict(self.config), self.task, **{**defaults, **self.options, **options})
        module.configure_model()
        with torch.no_grad():  # heads and norms begin at 0 and 1: values that hide mistakes
            for parameter in module.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return module

    def rows(self, number: int, seed: int = 0) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for index in range(number):
            length = int(torch.randint(5, 13, (), generator=generator))
            row = {"row_ids": torch.tensor(100 + index), **self.target(generator, length)}
            if self.task == "image-classification":
                row["pixel_values"] = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
            elif self.task == "audio-classification":
                row["input_values"] = torch.randn(20 * length, generator=generator, dtype=torch.float64)
            else:
                row["input_ids"] = torch.randint(3, VOCAB, (length,), generator=generator)
            rows.append(row)
        return rows


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Right padding and a mask, as Hugging Face's collators make them."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        is_ragged = values[0].ndim == 1 and len({len(value) for value in values}) > 1
        padding = -100 if key == "labels" else 0
        batch[key] = pad_sequence(values, True, padding) if is_ragged else torch.stack(values)
        if key in ("input_ids", "input_values"):
            batch["attention_mask"] = pad_sequence([torch.ones(len(value)).long() for value in values], True)
    return batch


def _token_labels(number: int, share: float) -> Any:
    def make(generator: torch.Generator, length: int) -> dict[str, Tensor]:
        labels = torch.randint(0, number, (length,), generator=generator)
        return {"labels": labels.masked_fill(torch.rand(length, generator=generator) > share, -100)}

    return make


def _target_text(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    target = int(torch.randint(2, 12, (), generator=generator))
    return {"labels": torch.randint(3, VOCAB, (target,), generator=generator)}


def _one_class(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(0, 3, (), generator=generator)}


def _some_classes(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    return {"labels": (torch.rand(4, generator=generator) > 0.5).double()}


def _number(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    return {"labels": torch.randn((), generator=generator, dtype=torch.float64)}


def _numbers(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    return {"labels": torch.randn(3, generator=generator, dtype=torch.float64)}


def _answer(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    """One row in three has its answer beyond the row's end."""
    start = int(torch.randint(0, length, (), generator=generator))
    end = int(torch.randint(start, length, (), generator=generator))
    if int(torch.randint(0, 3, (), generator=generator)) == 0:
        start = end = 400
    return {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}


_SEVERAL = {"labels": 4, "task_options": {"problem_type": "multi_label_classification"}}
_REGRESSION = {"labels": 3, "task_options": {"problem_type": "regression"}}
CASES = {
    "masked-lm, bert": Case("masked-lm", BERT, _token_labels(VOCAB, 0.3)),
    "masked-lm, roberta": Case("masked-lm", ROBERTA, _token_labels(VOCAB, 0.3)),
    "masked-lm, distilbert": Case("masked-lm", DISTILBERT, _token_labels(VOCAB, 0.3)),
    "masked-lm, plain": Case("masked-lm", BERT, _token_labels(VOCAB, 0.3), {"loss_kernel": "plain"}),
    "seq2seq, t5": Case("seq2seq", T5, _target_text),
    "seq2seq, bart": Case("seq2seq", BART, _target_text),
    "seq2seq, plain": Case("seq2seq", BART, _target_text, {"loss_kernel": "plain"}),
    "one class": Case("sequence-classification", BERT, _one_class, {"labels": ["bad", "fair", "good"]}),
    "one class, decoder": Case("sequence-classification", LLAMA, _one_class, {"labels": 3}),
    "some classes": Case("sequence-classification", ROBERTA, _some_classes, _SEVERAL),
    "a number": Case("sequence-classification", DISTILBERT, _number, {"labels": 1}),
    "numbers": Case("sequence-classification", BERT, _numbers, _REGRESSION),
    "tokens": Case("token-classification", BERT, _token_labels(5, 0.7), {"labels": TAGS}),
    "answers, bert": Case("question-answering", BERT, _answer),
    "answers, distilbert": Case("question-answering", DISTILBERT, _answer),
    "images": Case("image-classification", VIT, _one_class, {"labels": ["cat", "dog", "cow"]}),
    "audio": Case("audio-classification", WAV2VEC2, _one_class, {"labels": ["yes", "no", "up"]}),
}


def padded(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """All rows as long as the longest of all: batches of them differ in nothing else."""
    whole = batch_of(rows)
    return [{key: value[index] for key, value in whole.items()} for index in range(len(rows))]
