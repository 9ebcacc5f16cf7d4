"""Preferences: of two answers to a prompt, which is better (DPO and its kin)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.compatibility import check_length
from lightning_llm.head_loss import LossKernel, causal_lm_token_nll
from lightning_llm.loss import IGNORE_INDEX, TokenLoss, shift_labels, token_nll
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.causal_lm import decoder_inputs
from lightning_llm.tasks.metrics import Means, TaskMetrics
from lightning_llm.tasks.pair_losses import PairLogps, PairLoss, pair_losses
from lightning_llm.tasks.reference import Reference

ReferenceSource = Literal["model", "batch", "none"]

_SIDES = ("chosen", "rejected")
_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
_REF = ("ref_chosen_logps", "ref_rejected_logps")
_DETAILS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)  # TRL's names


class DPO(Task):
    """Prefer chosen answers to rejected ones, compared with a reference model.

    A batch has one row per pair, and for each side prompt and answer together, padded on the right to a length of its
    own: ``chosen_input_ids``, ``chosen_attention_mask``, ``chosen_labels`` (pairs, chosen_seq), and the same three
    ``rejected_...`` (pairs, rejected_seq). Labels are unshifted, -100 on the prompt and on padding. With
    ``reference="batch"`` also ``ref_chosen_logps`` and ``ref_rejected_logps`` (pairs,), in nats, which ``predict`` with
    the original model and ``reference="none"`` gives as ``chosen_logps`` and ``rejected_logps``.

    The loss is a mean over pairs, and pairs are its weight; see :func:`~lightning_llm.tasks.pair_losses.pair_losses`.
    Both sides run in one forward. Logits are never in memory, unless ``loss_kernel="plain"``.

    Args:
        loss_kernel: ``chunked`` or ``plain``.
        loss_type: ``sigmoid``, ``robust``, ``hinge``, ``ipo`` or ``sigmoid_norm``.
        beta: How strongly the model is held to the reference.
        label_smoothing: The share of preferences that may be flipped.
        margin: Target margin of the rewards, as in SimPO.
        sft_weight: Weight of the chosen answer's mean loss per token, as in RPO.
        reference: ``model``: a frozen copy of the model as it is built or, with peft, the model without its adapter.
            ``batch``: the batch's columns. ``none``: no reference.

    Raises:
        ValueError: For an option out of its range.
    """

    name = "dpo"
    auto_class = "AutoModelForCausalLM"
    generates = True

    def __init__(
        self,
        loss_kernel: LossKernel = "chunked",
        *,
        loss_type: PairLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        sft_weight: float = 0.0,
        reference: ReferenceSource = "model",
    ) -> None:
        super().__init__(loss_kernel)
        _check_options(loss_type, beta, label_smoothing, margin, sft_weight, reference)
        self.beta = beta
        self.options: dict[str, Any] = {
            "loss_type": loss_type,
            "beta": beta,
            "label_smoothing": label_smoothing,
            "margin": margin,
            "sft_weight": sft_weight,
        }
        self.reference_source = reference
        self.reference = Reference()

    def built(self, model: nn.Module, copy: Callable[[], nn.Module]) -> None:
        """Keep the model as it is, if it is the reference."""
        if self.reference_source == "model":
            self.reference.keep(model, copy)

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse batches that are no pairs, pairs with one answer only, and rows that are too long."""
        wanted = [f"{side}_{name}" for side in _SIDES for name in ("input_ids", "labels")]
        if not all(isinstance(batch.get(name), Tensor) for name in wanted):
            raise KeyError(
                f"A dpo batch needs {', '.join(f'`{name}`' for name in wanted)} (with `chosen_attention_mask` and "
                f"`rejected_attention_mask` where rows are padded), one row per pair, but got the keys {sorted(batch)}."
            )
        shapes = {name: tuple(batch[name].shape) for name in wanted}
        for side in _SIDES:
            if shapes[f"{side}_input_ids"] != shapes[f"{side}_labels"]:
                raise ValueError(f"`{side}_labels` must have the shape of `{side}_input_ids`, but got {shapes}.")
            check_length(config, shapes[f"{side}_input_ids"][-1], f"a batch of {side} answers")
        if shapes["chosen_labels"][0] != shapes["rejected_labels"][0]:
            raise ValueError(f"A pair has one row on either side, but got the shapes {shapes}.")
        has_columns = all(isinstance(batch.get(name), Tensor) for name in _REF)
        if has_columns != (self.reference_source == "batch"):
            raise ValueError(
                f"This dpo batch has the reference's log-probabilities ({', '.join(_REF)}), which are only used with "
                f"task_options={{'reference': 'batch'}}. Set it, or leave the columns out."
                if has_columns
                else f"task_options={{'reference': 'batch'}} needs the columns {' and '.join(_REF)} (pairs,): predict "
                f"with the original model gives them as chosen_logps and rejected_logps."
            )
        _check_answers(batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the loss over the pairs."""
        return self._loss(self._logps(model, batch))

    def loss_and_details(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[TokenLoss, dict[str, TokenLoss]]:
        """The loss, with rewards and log-probabilities to be logged in training."""
        logps = self._logps(model, batch)
        return self._loss(logps), self._details(logps)

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Pairs with a label token on both sides."""
        has = [(shift_labels(batch[f"{side}_labels"]) != IGNORE_INDEX).any(1) for side in _SIDES]
        return (has[0] & has[1]).sum()

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """For each pair ``chosen_logps`` and ``rejected_logps`` in nats, and with a reference the rewards, (pairs,)."""
        logps = self._logps(model, batch)
        scores = {"chosen_logps": logps.chosen, "rejected_logps": logps.rejected}
        scores["chosen_rewards"], scores["rejected_rewards"] = logps.rewards(self.beta)
        return scores

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits of both sides, chosen ones first, (2 * pairs, seq, vocab)."""
        logits: Tensor = model(**decoder_inputs(model, joined(batch)), use_cache=False).logits
        return logits

    def token_nll(self, model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
        """Nats of each label token of :func:`joined` rows, (rows, seq), 0 elsewhere."""
        inputs = {**decoder_inputs(model, rows), "use_cache": False}
        if self.loss_kernel == "plain":
            return token_nll(model(**inputs).logits, rows["labels"])
        return causal_lm_token_nll(model, inputs, rows["labels"])

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """The loss, and means over pairs of rewards, their margin, how often it is right, and log-probabilities."""
        return TaskMetrics({"means": Means(["loss", *_DETAILS])})

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        logps = self._logps(model, batch)
        metrics.update(means={"loss": self._loss(logps), **self._details(logps)})

    def state_dict(self) -> dict[str, Any]:
        """Which reference it is."""
        return self.reference.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Whether it still is."""
        self.reference.load_state_dict(state)

    # ---- details -------------------------------------------------------------------------------------------------

    def _loss(self, logps: PairLogps) -> TokenLoss:
        losses = pair_losses(logps, **self.options)
        return TokenLoss(losses.where(logps.is_pair, 0.0).sum(), logps.is_pair.sum())

    def _details(self, logps: PairLogps) -> dict[str, TokenLoss]:
        chosen, rejected = (reward.detach() for reward in logps.rewards(self.beta))
        values = (chosen, rejected, (chosen > rejected).to(chosen), chosen - rejected, logps.chosen, logps.rejected)
        number = logps.is_pair.sum()
        return {
            name: TokenLoss(value.detach().where(logps.is_pair, 0.0).sum(), number)
            for name, value in zip(_DETAILS, values, strict=True)
        }

    def _logps(self, model: nn.Module, batch: Mapping[str, Any]) -> PairLogps:
        rows = joined(batch)
        chosen, rejected = self._row_logps(model, rows).chunk(2)
        if self.reference_source == "batch":
            ref_chosen, ref_rejected = (batch[name].to(chosen) for name in _REF)
        elif self.reference_source == "none":
            ref_chosen, ref_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
        else:
            ref_chosen, ref_rejected = self.reference.run(model, lambda ref: self._row_logps(ref, rows)).chunk(2)
        tokens = (shift_labels(rows["labels"]) != IGNORE_INDEX).sum(1)
        return PairLogps(chosen, rejected, ref_chosen, ref_rejected, *tokens.chunk(2))

    def _row_logps(self, model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
        """Of each row's label tokens, summed; (rows,)."""
        return -self.token_nll(model, rows).sum(1)


def joined(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Both sides of the pairs as one batch, (2 * pairs, seq): all chosen answers, then all rejected ones.

    Example:
        >>> one, two = torch.ones(1, 1).long(), torch.ones(1, 2).long()
        >>> rows = joined({"chosen_input_ids": one, "chosen_labels": one, "rejected_input_ids": two,
        ...     "rejected_labels": two, "rejected_attention_mask": two})
        >>> rows["labels"].tolist(), rows["attention_mask"].tolist()
        ([[1, -100], [1, 1]], [[1, 0], [1, 1]])
    """
    width = max(batch[f"{side}_input_ids"].shape[1] for side in _SIDES)
    rows = {}
    for name, padding in _PADDING.items():
        if all(batch.get(f"{side}_{name}") is None for side in _SIDES):
            continue  # without masks, what stands behind a row's end is not seen from within
        values = [batch.get(f"{side}_{name}", torch.ones_like(batch[f"{side}_input_ids"])) for side in _SIDES]
        rows[name] = torch.cat([F.pad(side, (0, width - side.shape[1]), value=padding) for side in values])
    return rows


def _check_answers(batch: Mapping[str, Any]) -> None:
    """On the host only: a pair of which one answer has no label token would be won or lost by default."""
    labels = [batch[f"{side}_labels"] for side in _SIDES]
    if any(side.device.type != "cpu" for side in labels):
        return
    chosen, rejected = ((shift_labels(side) != IGNORE_INDEX).any(1) for side in labels)
    if bool((chosen != rejected).any()):
        row = int((chosen != rejected).nonzero()[0])
        ids = batch.get("row_ids")
        name = f"row {row} of the batch" + ("" if ids is None else f" (row_id {int(ids[row])})")
        side = _SIDES[int(chosen[row])]
        raise ValueError(
            f"A pair has two answers, but the {side} one of {name} has no label token. Is the prompt so long that its "
            f"answer was cut off? Leave out such pairs, or cut prompts at their beginning."
        )


def _check_options(
    loss_type: Any, beta: float, label_smoothing: float, margin: float, sft_weight: float, reference: Any
) -> None:
    if loss_type not in get_args(PairLoss):
        raise ValueError(f"`loss_type` must be one of {', '.join(get_args(PairLoss))}, but got {loss_type!r}.")
    if reference not in get_args(ReferenceSource):
        raise ValueError(f"`reference` must be 'model', 'batch' or 'none', but got {reference!r}.")
    if beta <= 0:
        raise ValueError(f"`beta` must be above 0, but got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` is a share from 0 to below 0.5, but got {label_smoothing}.")
    if sft_weight < 0:
        raise ValueError(f"`sft_weight` must be 0 or more, but got {sft_weight}.")
    if loss_type in ("hinge", "ipo") and (label_smoothing or margin):
        raise ValueError(f"`label_smoothing` and `margin` have no meaning for loss_type={loss_type!r}: leave them out.")
