"""Evaluation metrics are ratios of sums."""

import math

import pytest
import torch

from lightning_llm.loss import TokenLoss
from lightning_llm.metrics import LanguageModelingMetrics


def test_metrics_do_not_depend_on_how_the_data_was_cut():
    nll = torch.rand(40, dtype=torch.float64) * 5
    num_bytes = torch.randint(1, 6, (40,)).double()
    results = []
    for sizes in ([40], [1] * 40, [3, 17, 20]):
        metrics = LanguageModelingMetrics()
        for part, part_bytes in zip(nll.split(sizes), num_bytes.split(sizes), strict=True):
            metrics.update(TokenLoss(part.sum(), torch.tensor(len(part))), part_bytes)
        results.append(metrics.compute())
    mean = nll.mean().item()
    for values in results:
        assert values["loss"].item() == pytest.approx(mean, rel=1e-14)
        assert values["perplexity"].item() == pytest.approx(math.exp(mean), rel=1e-13)
        assert values["bits_per_byte"].item() == pytest.approx(nll.sum().item() / math.log(2) / num_bytes.sum().item())


def test_bits_per_byte_is_reported_only_where_bytes_are_known():
    metrics = LanguageModelingMetrics()
    metrics.update(TokenLoss(torch.tensor(3.0), torch.tensor(2)))
    assert set(metrics.compute()) == {"loss", "perplexity"}


def test_sums_stay_exact_where_float32_would_stop_counting():
    metrics = LanguageModelingMetrics()
    metrics.update(TokenLoss(torch.tensor(2.0**24), torch.tensor(2**24)))
    metrics.update(TokenLoss(torch.tensor(1.0), torch.tensor(1)))
    assert metrics.num_tokens.item() == 2**24 + 1
    metrics.half()
    assert metrics.num_tokens.dtype == torch.float64


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_their_type_when_the_module_around_them_is_cast(cast):
    """Lightning casts the whole LightningModule for precision='bf16-true'."""
    module = torch.nn.ModuleDict({"metrics": LanguageModelingMetrics()})
    module.to(dtype=cast)
    for _ in range(3):
        module["metrics"].update(TokenLoss(torch.tensor(2.0**24 + 2), torch.tensor(2**24 + 1)))
        module["metrics"].to(dtype=cast)
    assert module["metrics"].num_tokens.dtype == torch.float64
    assert module["metrics"].num_tokens.item() == 3 * (2**24 + 1)
    module["metrics"].reset()
    assert module["metrics"].num_tokens.dtype == torch.float64
