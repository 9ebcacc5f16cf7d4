"""Losses of pairs of answers, of which one was preferred, from the log-probabilities of both."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"]


class PairLogps(NamedTuple):
    """Log-probabilities of answers, in nats, summed over their tokens; (pairs,) each.

    Attributes:
        chosen: Of the preferred answers, under the model.
        rejected: Of the others.
        ref_chosen: Of the preferred ones, under the reference; 0 without one.
        ref_rejected: Of the others.
        chosen_tokens: Label tokens of the preferred answers.
        rejected_tokens: Of the others.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def is_pair(self) -> Tensor:
        """Pairs with a label token on both sides, (pairs,) bool; others fill up a batch and count nothing."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Implicit rewards of both answers, beta times the logarithm of model over reference."""
        return beta * (self.chosen - self.ref_chosen), beta * (self.rejected - self.ref_rejected)


def pair_losses(
    logps: PairLogps,
    loss_type: PairLoss = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    r"""The loss of each pair, (pairs,).

    With the margin of log-ratios :math:`\Delta = (\log \pi_c - \log \rho_c) - (\log \pi_r - \log \rho_r)` of model
    :math:`\pi` and reference :math:`\rho`, :math:`\bar\Delta` the same of means over tokens, a target margin
    :math:`\gamma` and :math:`\ell(x) = -\log \sigma(x)`:

    - ``sigmoid``: :math:`(1-\varepsilon)\, \ell(\beta\Delta - \gamma) + \varepsilon\, \ell(\gamma - \beta\Delta)`: DPO,
      and with smoothing conservative DPO;
    - ``robust``: :math:`((1-\varepsilon)\, \ell(\beta\Delta-\gamma) - \varepsilon\, \ell(\gamma-\beta\Delta)) /
      (1 - 2\varepsilon)`, unbiased if a share :math:`\varepsilon` of preferences is flipped;
    - ``hinge``: :math:`\max(0, 1 - \beta\Delta)` (SLiC);
    - ``ipo``: :math:`(\bar\Delta - 1 / 2\beta)^2`;
    - ``sigmoid_norm``: as ``sigmoid``, of :math:`\bar\Delta`; without a reference, this is SimPO.

    ``sft_weight`` adds the mean nats per token of the pair's preferred answer, as RPO does: a mean within each pair, so
    that pairs remain the one weight of all terms.

    Args:
        logps: Of the model and the reference.
        loss_type: As above.
        beta: How strongly the model is held to the reference.
        label_smoothing: :math:`\varepsilon`, of ``sigmoid``, ``sigmoid_norm`` and ``robust``.
        margin: :math:`\gamma`, of the same.
        sft_weight: Weight of the preferred answer's own loss.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> logps = PairLogps(-one, -2 * one, zero, zero, one, one)
        >>> [round(pair_losses(logps, kind, beta=1.0).item(), 4) for kind in ("sigmoid", "hinge", "ipo")]
        [0.3133, 0.0, 0.25]

    References:
        Rafailov et al., Direct preference optimization, 2023. Mitchell, A note on DPO with noisy preferences, 2023.
        Chowdhury et al., Provably robust DPO, 2024. Zhao et al., SLiC-HF, 2023. Azar et al., A general theoretical
        paradigm to understand learning from human preferences, 2023. Meng et al., SimPO, 2024. Pang et al., Iterative
        reasoning preference optimization, 2024.
    """
    chosen, rejected = logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected
    chosen_tokens, rejected_tokens = logps.chosen_tokens.clamp(min=1), logps.rejected_tokens.clamp(min=1)
    if loss_type in ("ipo", "sigmoid_norm"):
        chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens
    difference = chosen - rejected
    if loss_type == "hinge":
        losses = torch.relu(1 - beta * difference)
    elif loss_type == "ipo":
        losses = (difference - 1 / (2 * beta)).square()
    else:
        logits = beta * difference - margin
        right, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        if loss_type == "robust":
            losses = ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)
        else:
            losses = (1 - label_smoothing) * right + label_smoothing * flipped
    if sft_weight:
        losses = losses - sft_weight * logps.chosen / chosen_tokens
    return losses
