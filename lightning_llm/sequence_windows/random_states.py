"""The state of the random number generators, taken before a window's forward and set again for its replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """What the host's and one device's generators hold at the moment of construction.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: Tensor = torch.get_rng_state()
        self._accelerator: Tensor | None = None
        if device.type != "cpu":
            self._accelerator = _backend(device).get_rng_state(device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers again inside; outside, the generators are as if nothing had been drawn."""
        on_host = self._accelerator is None
        devices = [] if on_host else [self._device]
        with torch.random.fork_rng(devices, device_type="cuda" if on_host else self._device.type):
            torch.set_rng_state(self._host)
            if self._accelerator is not None:
                _backend(self._device).set_rng_state(self._accelerator, self._device)
            yield


def _backend(device: torch.device):  # type: ignore[no-untyped-def]
    return torch.get_device_module(device)
