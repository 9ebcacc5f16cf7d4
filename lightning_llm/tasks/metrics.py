"""The metrics of tasks: several torchmetrics as one, means of sums, and F1 of tagged spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_llm.loss import TokenLoss
from lightning_llm.metrics import moves_only


class TaskMetrics(MetricCollection):
    """Several metrics that are updated by name, each with what its ``update`` takes.

    Their sums keep their type when the module is cast. A metric of several outputs is shown by its mean.

    Args:
        metrics: By the name under which they are logged; those that compute a mapping bring their own names.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        # Without groups, which would share states: a piece that fails is taken back metric by metric.
        super().__init__(dict(metrics), compute_groups=False)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch; of one whose rows are none of the data's, the means alone, as some metrics need a row."""
        if "preds" in kwargs and not len(kwargs["preds"]):
            for metric in self.values(copy_state=False):
                if isinstance(metric, Means):
                    metric.update(kwargs["means"])
            return
        super().update(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The value of each name, the same on every rank."""
        return {name: value.mean() if value.ndim else value for name, value in super().compute().items()}

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._apply(moves_only(fn), *args, **kwargs)  # type: ignore[no-untyped-call]


class Means(Metric):
    """Means over a whole data set, each a sum and a count, added in float64 over batches and ranks.

    Args:
        names: Of the means.
        perplexity: Whether the exponential of ``loss`` is given too.
        **kwargs: As for every torchmetrics metric.

    Example:
        >>> means = Means(["loss"], perplexity=True)
        >>> means.update({"loss": TokenLoss(torch.tensor(3.0), torch.tensor(2))})
        >>> means.update({"loss": TokenLoss(torch.tensor(0.0), torch.tensor(1))})
        >>> {name: round(value.item(), 4) for name, value in means.compute().items()}
        {'loss': 1.0, 'perplexity': 2.7183}
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str], perplexity: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self.perplexity = perplexity
        self.add_state("sums", torch.zeros((len(names), 2), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, means: Mapping[str, TokenLoss]) -> None:
        """Add sums and counts, of shape () each, by name; a name may be left out."""
        for row, name in enumerate(self.names):
            if name in means:
                self.sums[row] += torch.stack([value.detach().to(self.sums) for value in means[name]])

    def compute(self) -> dict[str, Tensor]:
        """Divide; what has no count is left out."""
        values = {name: total / count for name, (total, count) in zip(self.names, self.sums, strict=True) if count > 0}
        return values | ({"perplexity": values["loss"].exp()} if self.perplexity and "loss" in values else {})


class SpanMetrics(Metric):
    """Precision, recall and F1 of spans that tags mark (``B-PER I-PER O``): kind, begin and end must be right.

    Counted over all kinds together, as the entity F1 of CoNLL 2003 is.

    Args:
        tags: The name of each class; ``B-``, ``I-``, ``E-``, ``S-`` and ``L-``, ``U-`` stand before the kind of a span.
        **kwargs: As for every torchmetrics metric.

    References:
        Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 Shared Task, 2003.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, tags: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tags = list(tags)
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add rows of classes, (batch, seq) each; positions whose target is below 0 are left out."""
        self.counts += self._counted(preds, target)

    def compute(self) -> dict[str, Tensor]:
        """``span_precision``, ``span_recall``, ``span_f1``; 0 where there is nothing to divide by."""
        return span_rates(self.counts)

    def _counted(self, preds: Tensor, target: Tensor) -> Tensor:
        """Spans that are right, that were found, and that there are, (3,)."""
        counts = torch.zeros_like(self.counts)
        for predicted, true in zip(preds.tolist(), target.tolist(), strict=True):
            pairs = [(self.tags[p], self.tags[t]) for p, t in zip(predicted, true, strict=True) if t >= 0]
            found, wanted = (set(spans_of(tags)) for tags in ([p for p, _ in pairs], [t for _, t in pairs]))
            counts += counts.new_tensor([len(found & wanted), len(found), len(wanted)])
        return counts


def span_rates(counts: Tensor) -> dict[str, Tensor]:
    """``span_precision``, ``span_recall`` and ``span_f1`` of how many spans are right, were found, and there are."""
    right, found, wanted = counts.double()
    return {
        "span_precision": right / found.clamp(min=1),
        "span_recall": right / wanted.clamp(min=1),
        "span_f1": 2 * right / (found + wanted).clamp(min=1),
    }


def marks_spans(tags: Sequence[str]) -> bool:
    """Whether classes are tags of spans: ``O``, and some that begin with ``B-`` or ``I-``."""
    return any(tag[:2] in ("B-", "I-") for tag in tags)


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans that tags mark, as (kind, begin, end), the end excluded.

    A span begins with ``B-``, ``S-`` or ``U-``, with another kind, or after ``E-``, ``L-``, ``S-``, ``U-`` or ``O``; so
    an ``I-`` without a beginning begins one, as in CoNLL's own evaluation.

    Example:
        >>> spans_of(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"])
        [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5), ('ORG', 5, 6)]
    """
    spans: list[tuple[str, int, int]] = []
    before, begin = ("O", ""), 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-") if tag != "O" else ("O", "", "")
        is_same = mark in "IEL" and before[0] in "BI" and kind == before[1]
        if not is_same:
            if before[0] != "O":
                spans.append((before[1], begin, place))
            begin = place
        before = (mark, kind)
    return spans
