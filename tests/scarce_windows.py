"""``LLMModule`` in windows that runs out of memory when told to, and the bare loop over big batches."""

import torch
from torch import nn
from windowed_models import VOCAB, build

from lightning_llm import LLMModule
from lightning_llm.callbacks import TokenWeightedAccumulation
from lightning_llm.loss import token_cross_entropy
from lightning_llm.tasks import windowed_causal_lm

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"
LENGTH, ROWS, STEPS = 36, 4, 4
CLIP = 0.3


def batches(steps=STEPS, rows=ROWS, seed=0):
    """Global batches whose rows have unequal numbers of label tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
        share = torch.rand(rows, 1, generator=generator)
        labels = ids.masked_fill(torch.rand(rows, LENGTH, generator=generator) < share, -100)
        made.append({"input_ids": ids, "labels": labels})
    return made


class GlobalBatches:
    """A plain iterable, so that Lightning puts no sampler in; a resumed run goes on at its place."""

    def __init__(self, data):
        self.data, self.num_given = data, 0

    def __iter__(self):
        for batch in self.data[self.num_given :]:
            self.num_given += 1
            yield batch
        self.num_given = 0

    def __len__(self):
        return len(self.data)

    def state_dict(self):
        return {"num_given": self.num_given}

    def load_state_dict(self, state):
        self.num_given = state["num_given"]


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, check):
        ctx.check = check
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.check()
        return gradient, None


class ScarceInWindows(LLMModule):
    """Runs out of memory where so many tokens pass a layer at once: without a graph, with one, or in backward."""

    def __init__(self, where="backward", limit=None, when="forward", ranks=(0, 1), sequence_window=32):
        options = {"lr_schedule": "constant", "warmup": 0}
        super().__init__(build("llama_tied"), sequence_window=sequence_window, **options)
        self.where, self.limit, self.when, self.ranks, self.num_failed = where, limit, when, ranks, 0
        self.model.model.layers[0].register_forward_hook(self._after_layer)

    def _check(self, area):
        if self.limit is not None and area > self.limit and self.global_rank in self.ranks:
            self.num_failed += 1
            raise torch.OutOfMemoryError(MESSAGE)

    def _after_layer(self, layer, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        area, has_graph = hidden.shape[0] * hidden.shape[1], torch.is_grad_enabled()
        if self.where == ("second pass" if has_graph else "first pass"):
            self._check(area)
        if self.where != "backward" or not has_graph:
            return output
        hidden = _FailInBackward.apply(hidden, lambda: self._check(area))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def training_step(self, batch, batch_idx):
        loss_of = windowed_causal_lm.windowed_loss
        windowed_causal_lm.windowed_loss = lambda *args, **options: loss_of(*args, **{**options, "when": self.when})
        try:
            return super().training_step(batch, batch_idx)
        finally:
            windowed_causal_lm.windowed_loss = loss_of

    def configure_optimizers(self):
        return make_optimizer(self)


def make_optimizer(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def big_batch_loop(steps=STEPS, rows=ROWS):
    """The truth: uncut rows, one batch a step, the mean over its tokens, clipped."""
    model = build("llama_tied").double()  # rotary frequencies too, as Lightning does
    optimizer = make_optimizer(model)
    for batch in batches(steps, rows):
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        token_cross_entropy(logits, batch["labels"]).mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return weights_of(model)


def train(make_trainer, module, scaler, *, data=None, callbacks=(), ckpt_path=None, max_steps=STEPS, **options):
    """Fit on the global batches, or on ``data``."""
    callbacks = [TokenWeightedAccumulation(), scaler, *callbacks]
    settings = {"gradient_clip_val": CLIP, "max_steps": max_steps, "callbacks": callbacks, "precision": "64-true"}
    trainer = make_trainer(**{**settings, **options})
    trainer.fit(module, GlobalBatches(batches() if data is None else data), ckpt_path=ckpt_path)
    return trainer
