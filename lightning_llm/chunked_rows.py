r"""A function of all rows of a batch, such as a contrastive loss, in the memory of some rows (gradient caching).

The rows are embedded chunk by chunk without a graph, and the loss is computed from all embeddings. Backward takes the
loss's gradient at the embeddings, runs each chunk once more, now with a graph and with the same random numbers, and
goes back through it. The gradient is that of the whole batch, to rounding; activations need the memory of a chunk.
Time: one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_llm.sequence_windows.head import Aliased
from lightning_llm.sequence_windows.random_states import RandomState
from lightning_llm.sequence_windows.sharded import is_sharded

Columns = Mapping[str, Tensor]
Embed = Callable[[nn.Module, Columns], Tensor]


def embed_in_chunks(
    model: nn.Module,
    embed: Embed,
    groups: Sequence[Columns],
    chunk_size: int,
    gradient_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Embed groups of rows, a few at a time; what is built on the embeddings has the gradient of the whole.

    One autograd node for all groups: each parameter gets its gradient once, as DistributedDataParallel expects. It is
    made in backward, so that gradient scalers and weights of batches count.

    Args:
        model: Whole on each rank.
        embed: ``(model, columns) -> (rows, dim)``, of each row by itself: no batch statistics.
        groups: Columns (rows, ...) of each, for instance of queries and of answers.
        chunk_size: Rows in a forward.
        gradient_dtype: Type in which gradients of half-precision parameters are summed over chunks.

    Returns:
        The embeddings of each group, (rows, dim).

    Raises:
        ValueError: For parameters that FSDP2 shards.

    Example:
        >>> model, rows = nn.Linear(2, 3), {"x": torch.randn(5, 2)}
        >>> (embeddings,) = embed_in_chunks(model, lambda model, columns: model(input=columns["x"]), [rows], 2)
        >>> embeddings.square().sum().backward()
        >>> model.weight.grad.shape
        torch.Size([3, 2])

    References:
        Gao et al., Scaling deep contrastive learning batch size under memory limited setup, 2021.
    """
    chunks = [_Chunk(number, part) for number, group in enumerate(groups) for part in _parts(group, chunk_size)]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not torch.is_grad_enabled() or not trained:
        return _by_group([embed(model, chunk.columns) for chunk in chunks], chunks, len(groups))
    if is_sharded(model):
        raise ValueError(
            "Embedding in chunks needs whole parameters on each rank, but FSDP2 shards them. Use DDP, or leave "
            "`chunk_size` out and use gradient_checkpointing=True."
        )
    run = _Run(model, embed, chunks, len(groups), gradient_dtype)
    return list(_Embeddings.apply(run, *trained.values()))  # type: ignore[no-untyped-call]


class _Chunk:
    """Some rows of a group; and the random numbers with which they were embedded."""

    def __init__(self, group: int, columns: Columns) -> None:
        self.group, self.columns = group, columns
        self.random: RandomState | None = None


class _Run:
    def __init__(
        self, model: nn.Module, embed: Embed, chunks: list[_Chunk], num_groups: int, gradient_dtype: torch.dtype
    ) -> None:
        self.model, self.embed, self.chunks, self.num_groups = model, embed, chunks, num_groups
        self.aliases = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
        for alias in self.aliases.values():
            if alias.dtype.itemsize < 4:
                alias.grad_dtype = gradient_dtype
        self.device = next(iter(self.aliases.values())).device
        kind = self.device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def forward(self) -> list[Tensor]:
        """Each chunk without a graph."""
        embeddings = []
        for chunk in self.chunks:
            chunk.random = RandomState(self.device)
            with torch.no_grad():
                embeddings.append(self.once(self.model, chunk))
        return embeddings

    def backward(self, chunk: _Chunk, grad: Tensor) -> None:
        """A chunk once more, and back."""
        assert chunk.random is not None
        with torch.enable_grad(), chunk.random.replayed():
            embeddings = self.once(Aliased(self.model, self.aliases), chunk)
        with torch.autocast(self.device.type, enabled=False):
            embeddings.backward(grad)  # type: ignore[no-untyped-call]

    def once(self, model: nn.Module, chunk: _Chunk) -> Tensor:
        """No weight cache: a weight cast without a graph would have no gradient in the second pass."""
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self.embed(model, chunk.columns)


class _Embeddings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The embeddings of each group."""
        ctx.run = run
        return tuple(_by_group(run.forward(), run.chunks, run.num_groups))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the chunks again, and return what they have summed."""
        run: _Run | None = ctx.run
        if run is None:
            raise RuntimeError("Chunks are run again in backward once; for a second backward, embed them again.")
        ctx.run = None
        done = [0] * run.num_groups
        for chunk in run.chunks:
            begin = done[chunk.group]
            done[chunk.group] += len(next(iter(chunk.columns.values())))
            run.backward(chunk, grads[chunk.group][begin : done[chunk.group]])
        return None, *(None if a.grad is None else a.grad.to(a.dtype) for a in run.aliases.values())


def _parts(columns: Columns, chunk_size: int) -> list[Columns]:
    rows = len(next(iter(columns.values())))
    return [{key: value[a : a + chunk_size] for key, value in columns.items()} for a in range(0, rows, chunk_size)]


def _by_group(embeddings: list[Tensor], chunks: list[_Chunk], num_groups: int) -> list[Tensor]:
    pairs = list(zip(embeddings, chunks, strict=True))
    return [torch.cat([part for part, chunk in pairs if chunk.group == number]) for number in range(num_groups)]
