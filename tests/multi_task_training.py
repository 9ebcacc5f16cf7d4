"""Three tiny tasks on one BERT, with rows of unequal length, and the bare loop that training is held against."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback
from task_models import BERT

from lightning_llm import MultiTaskModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.datamodules import MultiTaskDataModule, TextClassificationDataModule, TextDataModule
from lightning_llm.datamodules.row_data_module import RowDataModule
from lightning_llm.optimizers import decay_groups

MODEL = {**BERT, "vocab_size": 300, "max_position_embeddings": 64}
TASKS = {
    "topic": {"task": "sequence-classification", "labels": ["a", "b", "c"]},
    "grade": {"task": "sequence-classification", "labels": 1},
    "lm": "masked-lm",
}
WEIGHTS = {"topic": 1.0, "grade": 0.25, "lm": 0.5}
SIZES = {"topic": 22, "grade": 14}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "slept", "under", "an", "old", "tree"]


def texts(number, seed):
    generator = torch.Generator().manual_seed(seed)
    for index in range(number):
        length = int(torch.randint(1, 9, (), generator=generator))
        chosen = torch.randint(0, len(WORDS), (length,), generator=generator)
        yield index, " ".join(WORDS[word] for word in chosen.tolist())


class Hidden:
    """Rows of a text data module for masked-lm: every third token is hidden, by its row alone."""

    def __init__(self, rows):
        self.rows, self.table = rows, rows.table

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row_ids):
        batch = self.rows[row_ids]
        labels = batch["labels"].clone()
        keep = (torch.arange(labels.shape[1])[None] + batch["row_ids"][:, None]) % 3 == 0
        labels[~keep] = -100
        return {**batch, "labels": labels, "input_ids": batch["input_ids"].masked_fill(labels != -100, 1)}


class MaskedTextDataModule(TextDataModule):
    def _dataset(self, split):
        return Hidden(super()._dataset(split))


def data(folder, sampling="size", global_batch_size=11, **options):
    """Three data modules as one."""
    common = {"tokenizer": "bytes", "max_length": 48, "cache_dir": str(folder / "cache"), "micro_batch_size": 3}
    topic = [{"text": text, "label": "abc"[index % 3]} for index, text in texts(SIZES["topic"], 0)]
    grade = [{"text": text, "label": float(index % 5)} for index, text in texts(SIZES["grade"], 1)]
    (folder / "text").mkdir(exist_ok=True, parents=True)
    for index, text in texts(12, 2):
        (folder / "text" / f"{index:02}.txt").write_text(text + " end")
    text = MaskedTextDataModule(str(folder / "text"), windowing="documents", validation_fraction=0.2, seed=1, **common)
    numbers = {"problem_type": "regression", "validation_fraction": 0.2}
    parts: dict[str, RowDataModule] = {
        "topic": TextClassificationDataModule(topic, validation_fraction=0.2, allow_empty_classes=True, **common),
        "grade": TextClassificationDataModule(grade, **numbers, **common),
        "lm": text,
    }
    return MultiTaskDataModule(parts, sampling=sampling, global_batch_size=global_batch_size, **options)


def module(cls=MultiTaskModule, **options):
    defaults = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.1, "dtype": "float64", "eps": 1e-3}
    torch.manual_seed(0)
    made = cls(dict(MODEL), TASKS, **{"weights": WEIGHTS, "learning_rate": 1e-2, **defaults, **options})
    made.configure_model()
    with torch.no_grad():  # heads and norms begin at 0 and 1: values that hide mistakes
        for parameter in made.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def weights(module):
    return torch.cat([value.double().flatten() for value in module.state_dict().values() if value.is_floating_point()])


class Seen(Callback):
    """The rows of each optimizer step and the numbers of targets that batches say, as (task, row) and a mapping."""

    def __init__(self):
        self.steps, self.targets, self.tasks, self._rows = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._rows += [(batch["task"], int(row)) for row in batch["row_ids"] if row >= 0]
        self.tasks.append(batch["task"])
        if trainer.fit_loop.epoch_loop._accumulated_batches_reached() or trainer.is_last_batch:
            self.steps.append(self._rows)
            self.targets.append(dict(batch["step_targets"]))
            self._rows = []


class Gradients(Callback):
    """The gradient of each optimizer step, by the names of parameters."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trained(folder, make_trainer, micro_batches=3, callbacks=(), made=None, loaded=None, **options):
    """Train; return the module and its trainer."""
    names = ("max_steps", "max_epochs", "enable_checkpointing", "limit_val_batches")
    of_trainer = {name: options.pop(name) for name in names if name in options}
    ckpt_path = options.pop("ckpt_path", None)
    made = made or module(**options)
    trainer = make_trainer(
        **{"max_epochs": 2, "limit_val_batches": 0, **of_trainer},
        accumulate_grad_batches=micro_batches,
        callbacks=[TokenWeightedAccumulation(), *callbacks],
    )
    trainer.fit(made, loaded or data(folder), ckpt_path=ckpt_path)
    return made, trainer


def prepared(folder):
    """The data modules, to be asked for rows."""
    loaded = data(folder)
    loaded.prepare_data()
    loaded.setup("fit")
    return loaded


def batches_of(loaded, rows):
    """For each task of a step the batch of its rows, one by one as their data module makes them."""
    by_task = {name: [row for task, row in rows if task == name] for name in loaded.tasks}
    return {name: loaded.tasks[name]._dataset("train")[mine] for name, mine in by_task.items() if mine}


def true_objective(made, loaded, rows, log_variances=None):
    """The step's objective, by the models' own losses over whole batches: a mean for each task."""
    total = 0.0
    for name, batch in batches_of(loaded, rows).items():
        model, labels = made.model.tasks[name], batch["labels"]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        labels = labels.double() if name == "grade" else labels
        loss = model(**inputs, labels=labels).loss
        if log_variances is None:
            total = total + WEIGHTS[name] * loss
        else:
            s = log_variances[name]
            total = total + WEIGHTS[name] * loss * torch.exp(-s) * (0.5 if name == "grade" else 1) + s / 2
    return total


def bare_loop(made, loaded, steps, log_variances=None, learning_rate=1e-2):
    """AdamW on the true objective of each step."""
    groups = decay_groups(made.named_parameters(), 0.1)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-3)
    for rows in steps:
        optimizer.zero_grad()
        true_objective(made, loaded, rows, log_variances).backward()
        optimizer.step()
    return made
