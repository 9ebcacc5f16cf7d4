"""How much memory a computation would take: the computation itself runs, on tensors without data.

Inside :class:`LiveMemory` every tensor that is made is a :class:`Hollow`: to the code it is a tensor on the CPU, to
autograd and autocast too, but its storage is on the meta device, where it has a size and no bytes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_META = torch.device("meta")


class Hollow(Tensor):
    """A tensor that has everything but data; operations on it need a :class:`LiveMemory` around them.

    Args:
        inside: The same on the meta device.
    """

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Hollow:
        """Shape and type of ``inside``, on the CPU."""
        made: Hollow = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=torch.device("cpu"),
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Outside of a :class:`LiveMemory`: nobody counts."""
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Hollow({tuple(self.shape)}, {self.dtype})"


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that live tensors hold, by kind, and remembers the worst moment.

    A storage counts once, however many views there are of it. What is inside a kernel is not seen.

    Attributes:
        live: Bytes by kind, now; what :meth:`mark` was not told of is ``other``.
        peak: Bytes by kind, when their sum was largest.

    Args:
        model: Its parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._kinds: dict[int, str] = {}
        self._total = self._highest = 0
        self._ignored = {_storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation without data, and count what is new."""
        result = _run(func, args, kwargs or {})
        _map(lambda leaf: self._count(leaf) if isinstance(leaf, Tensor) else None, result)
        # Autograd sums two gradients of one tensor in place, but not of tensors like these: the sum is not yet a peak,
        # as one of them goes at once.
        is_sum = func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1
        if self._total > self._highest and not is_sum:
            self._highest, self.peak = self._total, dict(self.live)
        return result

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is."""
        self._count(tensor)
        storage = _storage(tensor)
        if storage._cdata in self._kinds:
            self._add(self._kinds[storage._cdata], -storage.nbytes())
            self._kinds[storage._cdata] = kind
            self._add(kind, storage.nbytes())

    def _count(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._kinds and key not in self._ignored:
            self._kinds[key] = "other"
            self._add("other", size)
            weakref.finalize(storage, self._forget, key, size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] = self.live.get(kind, 0) + size
        self._total += size

    def _forget(self, key: int, size: int) -> None:
        self._add(self._kinds.pop(key), -size)


def hollow_copy(model: nn.Module) -> nn.Module:
    """A model of the same structure, whose parameters and buffers are hollow.

    Args:
        model: On any device, the meta device as well; its weights are not copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = Hollow(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META))
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.inside if isinstance(tensor, Hollow) else tensor).untyped_storage()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the meta device; what changes a tensor in place returns that tensor."""
    if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
        return True  # what models ask of tensors is whether all is as usual: no padding, one document
    outside: dict[int, Tensor] = {}

    def take_in(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            inside = leaf.inside if isinstance(leaf, Hollow) else leaf.to(_META)
            outside[id(inside)] = leaf
            return inside
        return _META if isinstance(leaf, torch.device) else leaf

    def bring_out(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return outside[id(leaf)] if id(leaf) in outside else Hollow(leaf)

    inner_args, inner_kwargs = _map(take_in, args), _map(take_in, kwargs)
    if "device" in inner_kwargs or not outside:
        inner_kwargs["device"] = _META
    return _map(bring_out, func(*inner_args, **inner_kwargs))


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """As ``torch.utils._pytree.tree_map``, for what operations take and return, in a fifth of its time."""
    if isinstance(tree, (list, tuple)):
        changed = [_map(change, leaf) for leaf in tree]
        return changed if isinstance(tree, list) else tuple(changed)
    return {key: _map(change, leaf) for key, leaf in tree.items()} if isinstance(tree, dict) else change(tree)
