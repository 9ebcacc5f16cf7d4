"""A causal language model in a plain LightningModule, and the bare loop over big batches that it is held against."""

import lightning as L
import torch
from support import pad_rows, ragged_rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.loss import token_cross_entropy

GLOBAL_BATCH = 16
NUM_ROWS = 44  # two full steps of 16 and a tail of 12
EPOCHS = 2


class Module(L.LightningModule):
    """A plain LightningModule that knows nothing of us: mean loss and token count."""

    def __init__(self, config, optimizer="adamw", dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).train()
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = token_cross_entropy(logits, batch["labels"])
        return {"loss": loss.mean, "num_tokens": loss.num_tokens}

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-4)


def rows(num_rows=NUM_ROWS, silent=()):
    data = ragged_rows(num_rows, seed=2)
    for index in silent:
        data[index]["labels"] = torch.full_like(data[index]["labels"], -100)
    return data


def loader(data, batch_size):
    return DataLoader(data, batch_size=batch_size, collate_fn=pad_rows)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def big_batch(config, optimizer, clip, data=None, epochs=EPOCHS, global_batch=GLOBAL_BATCH):
    """The truth: a bare loop over whole batches; also the token mean of each step."""
    module, data = Module(config, optimizer), data or rows()
    stepper = module.configure_optimizers()
    losses = []
    for _ in range(epochs):
        for begin in range(0, len(data), global_batch):
            stepper.zero_grad()
            output = module.training_step(pad_rows(data[begin : begin + global_batch]), 0)
            output["loss"].backward()
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            stepper.step()
            losses.append(output["loss"].item())
    return weights(module), losses


def difference(module, truth):
    return float((weights(module) - truth).norm() / truth.norm())


class Losses(L.Callback):
    def __init__(self):
        self.values = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values[trainer.global_step] = trainer.callback_metrics.get("train/loss")
