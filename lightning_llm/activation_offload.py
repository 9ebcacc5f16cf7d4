"""What a forward saves for its backward goes to host memory, and comes back when the backward asks for it."""

from __future__ import annotations

import warnings
from collections import deque
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_llm.host_memory import Done, Transfers

_MAX_LEAVING = 4  # storages that may be on their way at once, before the device waits for the first of them


class ActivationOffload:
    """Inside, tensors that autograd saves on a model's device are kept in host memory; the gradient is the same.

    The unit is the storage: tensors that share one (views, an input that several layers save) are copied once, and
    fetched once in backward. Parameters, buffers, their views, and the copies of parameters that autocast makes stay.
    Checkpointed layers (``use_reentrant=False``) save their inputs only, which go the same way.

    On CUDA host memory is pinned, copies run on a stream of their own, and backward asks for the next storage while it
    works on one. Enter it around the forward; backward may run outside.

    Args:
        model: Whose parameters and buffers stay on the device.
        min_bytes: Storages that are smaller stay on the device.

    Raises:
        ValueError: If the model has no parameter, or ``min_bytes`` is negative.
        RuntimeError: In backward, if a saved tensor was changed in place where that would change the gradient.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> states = torch.randn(8, 4)
        >>> with ActivationOffload(layer, min_bytes=0) as offload:
        ...     loss = layer(states).square().sum()
        >>> loss.backward()
        >>> offload.num_bytes  # of `states`, and of the output that `square` saves
        256

    References:
        ``torch.autograd.graph.save_on_cpu``; torchtune's ``OffloadActivations``, for the stream of its own.
    """

    def __init__(self, model: nn.Module, *, min_bytes: int = 2**20) -> None:
        device = next((parameter.device for parameter in model.parameters()), None)
        if device is None:
            raise ValueError("`model` has no parameters, so that it is on no device from which to offload.")
        if min_bytes < 0:
            raise ValueError(f"`min_bytes` must be a number of bytes, at least 0, but got {min_bytes}.")
        self.num_bytes = 0  # copied to host memory so far
        self._model, self._device, self._min_bytes = model, device, min_bytes
        self._transfers = Transfers(device)
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._staying: set[int] = set()
        self._copies: WeakValueDictionary[int, _HostCopy] = WeakValueDictionary()
        self._leaving: deque[_HostCopy] = deque()
        self._last: _HostCopy | None = None

    def __enter__(self) -> ActivationOffload:
        """Begin to offload what is saved."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._staying = {_address(tensor) for tensor in tensors if type(tensor) in (Tensor, nn.Parameter)}
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What is still on its way is waited for, on the device; what is saved from now on stays where it is."""
        self._hooks.__exit__(kind, error, traceback)
        while self._leaving:
            self._leaving.popleft().leave()
        self._last = None

    def _pack(self, tensor: Tensor) -> _Packed:
        if not self._is_activation(tensor):
            return _Packed(tensor, tensor._version, None)
        storage = tensor.untyped_storage()
        copy = self._copies.get(storage._cdata)
        if copy is None or copy.version != tensor._version:
            copy = _HostCopy(self._transfers, tensor, self._last)
            self.num_bytes += storage.nbytes()
            self._copies[storage._cdata] = self._last = copy
            self._leaving.append(copy)
            while len(self._leaving) > _MAX_LEAVING:
                self._leaving.popleft().leave()
        return _Packed(_Layout.of(tensor), tensor._version, copy)

    @staticmethod
    def _unpack(packed: _Packed) -> Tensor:
        what, version, copy = packed
        if copy is not None:
            assert isinstance(what, _Layout)
            return what.view(copy.fetch())
        assert isinstance(what, Tensor)
        if what._version != version:  # hooks switch autograd's own check off
            raise _changed(what.shape, version, what._version)
        return what

    def _is_activation(self, tensor: Tensor) -> bool:
        is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_conj()
        if not is_plain or tensor.device != self._device or tensor.untyped_storage().nbytes() < self._min_bytes:
            return False
        origin = tensor if tensor._base is None else tensor._base
        is_leaf = isinstance(origin, nn.Parameter) or (origin.is_leaf and origin.requires_grad)
        return not (is_leaf or _is_cast_leaf(origin) or _address(tensor) in self._staying)


class _Layout(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        """Of a tensor."""
        return cls(tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def view(self, storage: Tensor) -> Tensor:
        """The tensor in another storage, given as bytes."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage.untyped_storage(), self.offset, self.shape, self.stride)


class _Packed(NamedTuple):
    """What autograd keeps: a tensor that stays, or a layout and the copy of its storage, which it keeps alive."""

    what: Tensor | _Layout
    version: int
    copy: _HostCopy | None


class _HostCopy:
    """A storage in host memory.

    It lives as long as autograd keeps a tensor of it; after its first use in backward its bytes are on the device, as
    they would be without offload.

    Args:
        transfers: To and from the device.
        tensor: One that lies in the storage.
        previous: The copy made before it, which backward will ask for next.
    """

    def __init__(self, transfers: Transfers, tensor: Tensor, previous: _HostCopy | None) -> None:
        self.version = tensor._version
        self._transfers = transfers
        self._previous = (lambda: None) if previous is None else ref(previous)
        # As long as this is there, no other storage has the number by which copies are found.
        self._weak = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self._host = transfers.on_host(storage.shape, torch.uint8)
        self._source: Tensor | None = tensor.detach()  # shares the version
        with transfers.apart():
            self._host.copy_(storage, non_blocking=True)
        self._left = transfers.done()
        self._changed_to: int | None = None
        self._bytes: Tensor | None = None
        self._arrived: Done = None

    def leave(self) -> None:
        """Let the storage go, once it is copied."""
        if self._source is None:
            return
        self._transfers.wait(self._left)
        if self._left is not None and self._source._version != self.version:  # half of the copy may be of later values
            self._changed_to = self._source._version
        self._shape, self._source = self._source.shape, None

    def fetch(self) -> Tensor:
        """The storage's bytes on the device."""
        self.leave()
        if self._changed_to is not None:
            raise _changed(self._shape, self.version, self._changed_to)
        self.expect()
        previous = self._previous()
        if previous is not None:
            previous.expect()
        self._wait()
        assert self._bytes is not None
        return self._bytes

    def expect(self) -> None:
        """Begin to fetch."""
        if self._bytes is None:
            self._bytes = torch.empty(self._host.shape, dtype=torch.uint8, device=self._transfers.device)
            self._arrived = self._transfers.fetch(self._host, self._bytes)

    def _wait(self) -> None:
        self._transfers.wait(self._arrived)
        self._arrived = None

    def __del__(self) -> None:
        if getattr(self, "_arrived", None) is not None:  # asked for and not used: no one may have its memory yet
            self._wait()


def warn_if_on_host(device: torch.device) -> None:
    """Say that offload has no use where the device's memory is the host's."""
    if device.type == "cpu":
        warnings.warn(
            "`offload=True` has no use on a CPU, whose memory is the host's: tensors are copied for nothing. Leave it "
            "out, or train on an accelerator.",
            stacklevel=2,
        )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_cast_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter in another type, as autocast makes and keeps it."""
    node: Any = tensor.grad_fn
    return node is not None and node.name() == "ToCopyBackward0" and hasattr(node.next_functions[0][0], "variable")


def _changed(shape: torch.Size, saved: int, found: int) -> RuntimeError:
    return RuntimeError(
        f"A tensor of shape {tuple(shape)}, saved for the backward at version {saved}, has since been changed in place "
        f"(version {found}): its gradient would be wrong. Change a copy instead."
    )
