"""Seesaw: a larger batch in place of a part of the learning rate's decay."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from lightning_llm.decay import DECAYS, Decay
from lightning_llm.duration import Duration
from lightning_llm.schedule import Progress, Schedule


@dataclass(frozen=True)
class Seesaw:
    r"""Where a schedule would divide the learning rate by a, divide it by :math:`\sqrt a` and multiply the batch by a.

    Let f be the decay of a usual schedule at a constant batch :math:`B_0`, as a function of the tokens. With Adam and
    its kin, whose updates are as large as the noise lets them be, what a token moves the weights by is
    :math:`\eta / \sqrt B`. At every token this is what the usual schedule has if

    .. math:: \eta(t) = \eta_0 f(t) \sqrt{B(t) / B_0},

    whatever the batch. So the learning rate needs no schedule of its own: it is the usual one *by tokens*, times
    ``LearningRateScaling(power=0.5)``, also where B is rounded or bounded. Here B is the staircase
    :math:`B_0 a^k` from where :math:`f = a^{-k}`; between two stairs the learning rate falls as f does, and in the
    limit of low stairs B is :math:`B_0 / f` and the rate :math:`\eta_0 \sqrt f`. A run of T tokens takes
    :math:`\int dt / B` steps: in that limit a share mean(f) of :math:`T / B_0`, so that 1/2 of the steps are saved
    under a half cosine, and :math:`1 - 2/\pi` under the paper's quarter cosine.

    This holds as long as the noise dominates the gradient: below the critical batch, which ``max_growth`` is to
    respect. In the paper the rate is constant on each stair, too; its usual schedule is then the staircase
    :math:`a^{-k}`.

    Args:
        start: The batch that the learning rate was tuned for, in sequences or tokens.
        length: Of the run: ``"2B tokens"``, ``"10M samples"``, ``"3 epochs"``; not in steps, as these get fewer.
        decay: ``cosine`` (a half period, as transformers has it), ``quarter_cosine``, ``linear``.
        stair: a, by which the batch grows at once, above 1.
        warmup: Length before the decay, in the unit of ``length`` or as a share of it; the batch is constant there.
        floor: Where the decay ends, as a share of the peak (transformers' ``min_lr_rate``).
        max_growth: How many times its start the batch may become.

    Raises:
        ValueError: For an unknown decay, a length in steps, and numbers out of range.

    Example:
        >>> seesaw = Seesaw(start=100_000, length="1B tokens", max_growth=4)
        >>> seesaw.batch
        Schedule({'0 tokens': 100000.0, '500000000 tokens': 200000.0, '666666666.666667 tokens': 400000.0},
        interpolation='step')
        >>> round(seesaw.learning_rate(Progress(tokens=5e8)), 4)  # 1 / sqrt(2)
        0.7071
        >>> f"{seesaw.steps_saved:.1%} of at most {seesaw.most_saved:.1%}"
        '33.3% of at most 50.0%'

    References:
        Meterez et al., Seesaw: accelerating training by balancing learning rate and batch size scheduling (2025),
        arXiv 2510.14717.
    """

    start: float
    length: str
    decay: str = "cosine"
    stair: float = 2.0
    warmup: str = "0%"
    floor: float = 0.0
    max_growth: float = 16.0

    def __post_init__(self) -> None:
        """Refuse what makes no plan."""
        if self.decay not in DECAYS:
            raise ValueError(f"`decay` must be one of {', '.join(DECAYS)}, but got {self.decay!r}.")
        if self._length.unit in ("steps", "run") or not self._length.value:
            raise ValueError(
                f"`length` is given in tokens, samples or epochs, which the batch does not change, but got "
                f"{self.length!r}."
            )
        warmup = Duration.parse(self.warmup)
        if warmup.value and warmup.unit not in (self._length.unit, "run"):
            raise ValueError(
                f"`warmup` is given in {self._length.unit}, as `length` is, or as a share of it ('5%'), but got "
                f"'{warmup}'."
            )
        if self._warmup >= self._length.value:
            raise ValueError(f"`warmup` is shorter than `length`, but got {self.warmup!r} and {self.length!r}.")
        if not (self.start > 0 and self.stair > 1 and 0 <= self.floor < 1 and self.max_growth >= 1):
            raise ValueError(
                f"A seesaw needs start > 0, stair > 1, 0 <= floor < 1 and max_growth >= 1, but got start={self.start}, "
                f"stair={self.stair}, floor={self.floor}, max_growth={self.max_growth}."
            )

    @property
    def batch(self) -> Schedule:
        """The global batch, for ``AccumulationSchedule`` or ``TextDataModule(global_batch_tokens=...)``."""
        milestones, growth = {f"0 {self._length.unit}": self.start}, self.stair
        while growth <= self.max_growth * (1 + 1e-12) and 1 / growth > self.floor:
            share = self._shape.share_at((1 / growth - self.floor) / (1 - self.floor))
            at = self._warmup + share * (self._length.value - self._warmup)
            milestones[str(Duration(at, self._length.unit))] = self.start * growth
            growth *= self.stair
        return Schedule(milestones)

    def usual(self, progress: Progress) -> float:
        """f: what the schedule that is replaced multiplies the peak learning rate by, its warm-up included."""
        done = min(progress.of(self._length.unit), self._length.value)
        if done < self._warmup:
            return done / self._warmup
        share = (done - self._warmup) / (self._length.value - self._warmup)
        return self.floor + (1 - self.floor) * self._shape.factor(share)

    def learning_rate(self, progress: Progress) -> float:
        """What to multiply the peak learning rate by, where ``LearningRateScaling`` does not."""
        return float(self.usual(progress) * (self.batch(progress) / self.start) ** 0.5)

    @property
    def steps_saved(self) -> float:
        """Share of the optimizer steps of a constant batch that this one saves at equal tokens."""
        times = [*((at.value, value) for at, value in self.batch.milestones), (self._length.value, 0.0)]
        steps = sum((end - begin) / value for (begin, value), (end, _) in pairwise(times))
        return 1 - steps * self.start / self._length.value

    @property
    def most_saved(self) -> float:
        """The limit of :attr:`steps_saved` for ever lower stairs and an unbounded batch: 1 - mean(f) of the decay."""
        return (1 - self._warmup / self._length.value) * (1 - self.floor) * (1 - self._shape.mean)

    @property
    def _shape(self) -> Decay:
        return DECAYS[self.decay]

    @property
    def _length(self) -> Duration:
        return Duration.parse(self.length)

    @property
    def _warmup(self) -> float:
        warmup = Duration.parse(self.warmup)
        return warmup.value * self._length.value if warmup.unit == "run" else warmup.value


def seesaw(
    start: float,
    length: str,
    decay: str = "cosine",
    stair: float = 2.0,
    warmup: str = "0%",
    floor: float = 0.0,
    max_growth: float = 16.0,
) -> Schedule:
    """The batch of a :class:`Seesaw`, for YAML; beside it go ``LearningRateScaling(0.5)`` and a decay by tokens.

    Args:
        start: The batch that the learning rate was tuned for, in sequences or tokens.
        length: Of the run, in tokens, samples or epochs.
        decay: ``cosine``, ``quarter_cosine``, ``linear``: that of the learning rate.
        stair: By which the batch grows at once.
        warmup: Length before the decay.
        floor: Where the decay ends, as a share of the peak.
        max_growth: How many times its start the batch may become.
    """
    return Seesaw(start, length, decay, stair, warmup, floor, max_growth).batch
