"""Find the largest piece before training: on the worst batch, with the optimizer's state in memory, without a trace."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from lightning_llm.callbacks.pieces.cutting import Piece
from lightning_llm.callbacks.pieces.memory import PeakMemory, release_memory
from lightning_llm.callbacks.pieces.merging import PieceLogs
from lightning_llm.callbacks.pieces.rows import count_rows, fresh, take_rows, tensors_in
from lightning_llm.callbacks.pieces.training import TrainingPieces, run_quietly
from lightning_llm.callbacks.pieces.undo import StateKeeper
from lightning_llm.callbacks.steps.gradients import parameters_of
from lightning_llm.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)


class WeightsCopy:
    """The parameters of an optimizer and its state, on the host.

    Args:
        optimizer: Its parameters may be shards.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._weights = [(p, _local(p).detach().to("cpu", copy=True)) for p in parameters_of(optimizer)]
        self._state = {p: _to_host(state) for p, state in optimizer.state.items()}
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Bit for bit; gradients are dropped."""
        for weight, value in self._weights:
            _local(weight).copy_(value)
            weight.grad = None
        for parameter in list(self._optimizer.state):
            if parameter in self._state:
                _put_back(self._optimizer.state[parameter], self._state[parameter])
            else:
                del self._optimizer.state[parameter]
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(values)


def longest_batch(trainer: L.Trainer, cost: Callable[[Any], int], num_batches: int) -> Any:
    """The costliest batch that the training loader tells of, or among its first ones; the loader is left as it was.

    Args:
        trainer: With its loaders set up.
        cost: Of a batch.
        num_batches: How many are looked at where the loader has no ``longest_batch()``.

    Raises:
        ValueError: If the loader can be iterated once only.
    """
    loader: Any = trainer.train_dataloader
    if hasattr(loader, "longest_batch"):
        return loader.longest_batch()
    if _is_read_once(loader):
        raise ValueError(
            f"What is tried before the first step needs a look at the data, but {type(loader).__name__} can be "
            f"iterated once only. Leave it out (DynamicBatchScaler(find='run'), SequenceLengthSchedule(reserve=False)) "
            f"or give the loader a `longest_batch()`."
        )
    is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    position = loader.state_dict() if is_stateful else None
    generators = [(generator, generator.get_state()) for generator in _generators(loader)]
    own = tree_map_only(DataLoader, _detached, loader)
    combined = CombinedLoader(own, "max_size_cycle" if isinstance(loader, (Mapping, list, tuple)) else "sequential")
    try:
        batches = (batch for batch, _, _ in islice(iter(combined), num_batches))
        longest = max(batches, key=cost, default=None)
    finally:
        combined.reset()
        for generator, state in generators:
            generator.set_state(state)
        if is_stateful:
            loader.load_state_dict(position)
    if longest is None:
        raise ValueError("Nothing can be tried before the first step: there is no batch in the training loader.")
    return longest


def whole_batch(trainer: L.Trainer, batch: Any) -> Any:
    """A loader's batch as Lightning moves it to the device, but in whole rows where a schedule would shorten them."""
    module: Any = trainer.strategy.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    return type(module)._on_before_batch_transfer(module, batch, dataloader_idx=0)  # not the instance's


def find_limit(runner: TrainingPieces, margin: float, num_batches: int, meter: PeakMemory | None = None) -> None:
    """Set the runner's limit to the largest piece that fits, on all ranks together.

    Where ranks are independent, pieces are tried until memory runs out; where they are not (FSDP2), the memory of
    small pieces is measured and that of larger ones predicted, so that nobody runs into the wall.

    Args:
        runner: Of the run that is about to start.
        margin: Share of the memory that is left free; not with ``split_fn``, whose batches cannot be made larger.
        num_batches: How many batches are looked at for the longest rows.
        meter: Measures memory where it is predicted.

    Raises:
        torch.OutOfMemoryError: If a single row, or the optimizer's state, does not fit.
    """
    trainer, module = runner.trainer, runner.module
    keeper = StateKeeper(module, runner.device)
    keeper.note()
    weights = WeightsCopy(trainer.optimizers[0])
    fx = module._current_fx_name
    logs = PieceLogs()
    try:
        with logs.hold_back(trainer._results):
            batch = longest_batch(trainer, lambda batch: runner.cutter.whole(batch).cost, num_batches)
            batch = whole_batch(trainer, batch)
            module._current_fx_name = "training_step"
            probe = _Probe(runner, batch)
            if runner.reduction.recovers:
                fitted = _by_trying(probe, margin)
            else:
                fitted = _by_measuring(probe, margin, meter or PeakMemory(runner.device))
            logs.discard()
    finally:
        module._current_fx_name = fx
        weights.restore()
        release_memory(runner.device)
        keeper.restore()
    everything = torch.iinfo(torch.int64).max
    mine = torch.tensor(everything if fitted is None else fitted, device=runner.device)
    cost = int(trainer.strategy.reduce(mine, reduce_op="min")) if trainer.world_size > 1 else int(mine)
    whole = probe.whole
    limit = runner.limits.of(whole.length)
    fits = cost == everything
    limit.good = limit.good_beside = whole.cost if fits else cost
    if fits:
        log.warning(
            "Search at the start: a whole batch of cost %d fits, with %.0f%% to spare.",
            *(whole.cost, 100 * margin if runner.cutter.split_fn is None else 0),
        )
    else:
        limit.limit = cost
        log.warning("Search at the start: pieces of cost %d fit; the longest batch has %d.", cost, whole.cost)


class _Probe:
    """Runs pieces of a batch with any number of rows, more than it has if need be."""

    def __init__(self, runner: TrainingPieces, batch: Any) -> None:
        self.runner = runner
        self.batch = batch
        self.whole = runner.cutter.whole(batch)
        self.num_rows = count_rows(batch) if runner.cutter.split_fn is None else 1

    def piece(self, num_rows: int) -> Piece:
        """Rows of the batch, from the first on and round again."""
        if self.runner.cutter.split_fn is not None or num_rows == self.num_rows:
            return self.whole
        rows = torch.arange(num_rows) % self.num_rows
        device = next(iter(tensors_in(self.batch)), rows).device
        return self.runner.cutter.whole(take_rows(self.batch, rows.to(device), self.num_rows))

    def run(self, piece: Piece) -> None:
        """Forward and backward, beside the gradients that are there."""
        self.loss = run_quietly(self.runner.trainer, self.runner.transfer.inner(fresh(piece.batch)))

    def step(self) -> None:
        """Let the optimizer make its state."""
        optimizer: Any = self.runner.trainer.optimizers[0]
        loss = torch.zeros(()) if self.loss is None else self.loss
        optimizer.step(lambda: loss)  # some cannot do without one

    def fits(self, piece: Piece) -> bool:
        """Try it."""
        self.runner.keeper.note()
        try:
            self.run(piece)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        release_memory(self.runner.device)
        self.runner.keeper.restore()
        return False


def _by_trying(probe: _Probe, margin: float) -> int | None:
    """Double until it fails, then bisect; None if the whole batch fits with the margin."""
    parts = [probe.piece(1)]
    while not probe.fits(parts[0]):
        parts = probe.runner.smaller(parts[0], torch.OutOfMemoryError("in the search at the start"))
    _step_or_explain(probe)
    if len(parts) > 1 or probe.runner.cutter.split_fn is not None:
        return None if parts[0].cost >= probe.whole.cost else parts[0].cost
    wanted = max(int(probe.num_rows * (1 + margin)), probe.num_rows)
    good, bad = 1, None
    while good < wanted and (bad is None or bad - good > max(1, good // 16)):
        number = min(2 * good, wanted) if bad is None else (good + bad) // 2
        if probe.fits(probe.piece(number)):
            good = number
        else:
            bad = number
    if bad is None:
        return None
    return probe.piece(max(int(good * (1 - margin)), 1)).cost


def _by_measuring(probe: _Probe, margin: float, meter: PeakMemory) -> int | None:
    """Double as long as the next piece is predicted to fit; all ranks in step."""
    strategy = probe.runner.trainer.strategy

    def over_ranks(value: float, op: str) -> float:
        mine = torch.tensor(value, dtype=torch.float64, device=strategy.root_device)
        return float(strategy.reduce(mine, reduce_op=op))

    probe.run(probe.piece(1))
    _step_or_explain(probe)
    wanted = int(over_ranks(probe.num_rows, "max"))
    budget = (1 - margin) * meter.capacity()
    meter.reset()
    resident = meter.peak()
    number = 1
    while True:
        meter.reset()
        probe.run(probe.piece(number))
        per_row = max(meter.peak() - resident, 1) / number  # what does not grow with the rows counts too: cautious
        most = int(over_ranks((budget - resident) / per_row, "min"))
        if number >= wanted or 2 * number > most:
            break
        number *= 2
    # Beyond twice what was measured nothing is predicted.
    rows = max(min(most, 2 * number), 1)
    return None if rows >= wanted else probe.piece(rows).cost


def _step_or_explain(probe: _Probe) -> None:
    try:
        probe.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(NO_ROOM_FOR_OPTIMIZER) from error


NO_ROOM_FOR_OPTIMIZER = (
    "Out of memory when the optimizer made its state, in its first step: that needs as much for any batch, so smaller "
    "pieces cannot help. The weights are as they were. Train fewer parameters (LoRA), use an optimizer with a smaller "
    "state (8-bit AdamW, SGD), lower precision (precision='bf16-true'), or ModelParallelStrategy (FSDP2), which shares "
    "the state out over the ranks."
)


def _is_read_once(loader: Any) -> bool:
    """Whether a look at its data would take it from the training."""
    if hasattr(loader, "__next__"):
        return True
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset)


def _detached(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same data without workers, so that those of the training, which may run already, are not met."""
    own = copy.copy(loader)
    own.__dict__.update(
        _iterator=None, num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0, worker_init_fn=None
    )
    return own


def _generators(loader: Any) -> list[torch.Generator]:
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def _local(parameter: nn.Parameter | Tensor) -> Tensor:
    """A shard of a DTensor, or the tensor itself."""
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    return local


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _local(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(entry) for key, entry in value.items()}
    return value


def _put_back(state: dict[str, Any], copy: dict[str, Any]) -> None:
    for key in list(state):
        if key not in copy:
            del state[key]
    for key, value in copy.items():
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
            _local(state[key]).copy_(value)
        elif isinstance(value, dict) and isinstance(state.get(key), dict):
            _put_back(state[key], value)
        else:
            state[key] = value
