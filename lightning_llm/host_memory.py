"""Copies between a device and host memory, beside the device's other work where it can do both at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Done = torch.cuda.Event | None


class Transfers:
    """On CUDA: pinned host memory, and a stream of its own, on which all copies run in the order they are given in.

    Elsewhere host memory is ordinary memory and copies are finished when the call returns; also from a CPU's memory to
    itself, so that the same code runs there.

    No tensor may be freed while the stream reads or fills it. Tensors are allocated for the current stream, which waits
    for the copies before a tensor goes; ``record_stream`` would do too, but lets a host that runs ahead of the device
    pile up memory.

    Args:
        device: Of the tensors that are copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._held: Sequence[Tensor] = ()
        self._held_until: Done = None

    def on_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised host memory."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self._stream is not None)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, work begins after what the current stream has been given so far, and runs beside what comes next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def done(self) -> Done:
        """The moment at which all copies given so far are finished."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, done: Done) -> None:
        """Have the current stream wait for that moment; the host goes on."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def fetch(self, host: Tensor, to: Tensor) -> Done:
        """Copy to the device, into a tensor of the current stream."""
        with self.apart():
            to.copy_(host, non_blocking=True)
        return self.done()

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Keep tensors that are being copied until the next call; then their copies are waited for."""
        self.wait(self._held_until)
        self._held, self._held_until = tensors, self.done()
