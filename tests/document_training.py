"""Classifiers of documents in windows: tiny modules, documents of unequal lengths, one batch of any of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from task_models import BERT, DISTILBERT, LLAMA, ROBERTA, VOCAB

from lightning_llm import LLMModule
from lightning_llm.datamodules.document_windows import collate_documents

LENGTHS = [30, 2, 11, 17, 8, 45, 9, 5, 5, 61, 3, 24, 8, 13]  # tokens; windows hold 10
POOLINGS = ["mean", "token_mean", "max", "first", "attention"]
KINDS: dict[str, dict[str, Any]] = {
    "one class": {"config": BERT, "labels": ["bad", "fair", "good"]},
    "one class, roberta": {"config": ROBERTA, "labels": 3},
    "one class, decoder": {"config": LLAMA, "labels": 3},
    "some classes": {"config": BERT, "labels": 4, "problem_type": "multi_label_classification"},
    "a number": {"config": DISTILBERT, "labels": 1},
    "numbers": {"config": BERT, "labels": 3, "problem_type": "regression"},
}


def module_of(kind="one class", pooling="mean", cls=LLMModule, **options):
    """A module whose weights hide no mistake: none is 0 or 1."""
    settings = dict(KINDS[kind])
    task_options = {"pooling": pooling}
    if "problem_type" in settings:
        task_options["problem_type"] = settings.pop("problem_type")
    torch.manual_seed(0)
    defaults = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dtype": "float64", "eps": 1e-3}
    module = cls(
        dict(settings.pop("config")), "sequence-classification", **settings, task_options=task_options,
        **{**defaults, "learning_rate": 1e-2, **options},
    )  # fmt: skip
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def documents(kind="one class", lengths=LENGTHS, seed=0):
    """Documents with labels; the third has none where a class is asked for."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        label = {
            "some classes": (rng.random(4) > 0.5).astype(np.float64),
            "a number": rng.normal(),
            "numbers": rng.normal(size=3),
        }.get(kind, -100 if number == 2 else int(rng.integers(0, 3)))
        made.append({"tokens": rng.integers(3, VOCAB, length), "label": label, "row_id": 100 + number})
    return made


def batch_of(some, max_length=10, overlap=3):
    batch = collate_documents(
        [document["tokens"] for document in some],
        max_length,
        overlap,
        pad_token_id=0,
        prefix_ids=[1],
        suffix_ids=[2],
        labels=np.array([document["label"] for document in some]),
    )
    return {**batch, "row_ids": torch.tensor([document["row_id"] for document in some])}


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])
