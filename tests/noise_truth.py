"""Noise and signal computed plainly: every part's gradient by itself, in full, in float64."""

import lightning as L
import torch
from token_training import Module
from torch import nn

from lightning_llm.noise_scale import NoiseScaleAverage, noise_and_signal


class Still(Module):
    """Learns nothing, so that all gradients are those of the first weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Recorder(L.Callback):
    """Notes the batches whose backward counts, as ``training_step`` saw them, step by step."""

    def __init__(self):
        self.steps, self.last = [], None

    def setup(self, trainer, pl_module, stage):
        inner = pl_module.training_step

        def training_step(batch, batch_idx):
            self.last = batch
            return inner(batch, batch_idx)

        pl_module.training_step = training_step

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.steps.append([])

    def on_after_backward(self, trainer, pl_module):
        self.steps[-1].append(self.last)

    def teardown(self, trainer, pl_module, stage):
        pl_module.__dict__.pop("training_step", None)


class Estimates(L.Callback):
    """Notes what each step added to the averages: (noise, signal) of tokens, then of sequences."""

    def __init__(self, noise_scale):
        self.noise_scale, self.values = noise_scale, []

    def on_train_start(self, trainer, pl_module):
        for unit, averages in self.noise_scale._averages.items():
            self._spy(averages[0], unit)

    def _spy(self, average, unit):
        inner = average.update

        def update(noise, signal):
            self.values.append((unit, noise, signal))
            inner(noise, signal)

        average.update = update

    def of(self, unit):
        return [(noise, signal) for name, noise, signal in self.values if name == unit]


def part(module, batch):
    """Gradient by parameter, label tokens and rows of one part."""
    module.zero_grad()
    output = module.training_step(batch, 0)
    output["loss"].backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for p in module.parameters()]
    module.zero_grad()
    return gradients, float(output["num_tokens"]), len(batch["input_ids"])


def true_estimates(module, steps, weighting="tokens", divide=None):
    """(noise, signal) of each step in tokens and in sequences, at the module's weights.

    Steps of one part give none. ``weighting``: by ``tokens``, by ``rows``, or every part alike (``equal``).
    ``divide``: the gradient's divisors, by parameter.
    """
    found = {"tokens": [], "sequences": []}
    for batches in steps:
        parts = [part(module, batch) for batch in batches]
        divisors = divide or [1.0] * len(parts[0][0])
        flat = [torch.cat([(g / d).flatten() for g, d in zip(part[0], divisors, strict=True)]) for part in parts]
        flat = torch.stack(flat)
        tokens, rows = (torch.tensor([p[i] for p in parts], dtype=torch.float64) for i in (1, 2))
        keep = tokens > 0 if weighting == "tokens" else tokens >= 0
        flat, tokens, rows = flat[keep], tokens[keep], rows[keep]
        if len(tokens) < 2:
            continue
        weights = {"tokens": tokens, "rows": rows, "equal": torch.ones_like(tokens)}[weighting]
        weights = weights / weights.sum()
        mean_of_squares, square_of_mean = weights @ flat.square().sum(1), (weights @ flat).square().sum()
        for unit, sizes in (("tokens", tokens), ("sequences", rows)):
            values = (mean_of_squares, square_of_mean, (weights / sizes).sum(), (weights**2 / sizes).sum())
            found[unit].append(noise_and_signal(*(float(value) for value in values)))
    return found


def error(found, truth):
    """Largest relative difference between two lists of (noise, signal)."""
    assert len(found) == len(truth) > 0
    return max(abs(a - b) / abs(b) for x, y in zip(found, truth, strict=True) for a, b in zip(x, y, strict=True))


class Quadratic(L.LightningModule):
    """Half the squared distance of a point to noisy ones, mean over rows of a mean over tokens; the point stays.

    A token's gradient is the true one (norm 1) and an error with covariance ``variances``, so that the noise scale is
    their sum, in tokens.
    """

    def __init__(self, noise_scale, dimensions=64):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        point = torch.randn(dimensions, generator=generator, dtype=torch.float64)
        self.point = nn.Parameter(point / point.norm())
        variances = torch.logspace(0, -2, dimensions, dtype=torch.float64)
        self.scatter = (variances * noise_scale / variances.sum()).sqrt()

    def training_step(self, batch, batch_idx):
        distances = (self.point - self.scatter * batch).square().sum(-1) / 2  # (rows, tokens)
        return {"loss": distances.mean(), "num_tokens": distances.numel()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def average_of(values, smoothing):
    average = NoiseScaleAverage(smoothing)
    for noise, signal in values:
        average.update(noise, signal)
    return average
