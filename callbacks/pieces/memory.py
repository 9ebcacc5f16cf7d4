"""How memory is given back, and how much of it there is."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch


def without_frames(error: BaseException) -> BaseException:
    """The error and those behind it without their tracebacks, whose frames would keep activations alive."""
    behind: BaseException | None = error
    while behind is not None and behind.__traceback__ is not None:
        behind.__traceback__ = None
        behind = behind.__cause__ or behind.__context__
    return error


def release_memory(device: torch.device, thorough: bool = True) -> None:
    """Collect reference cycles, and return what the device's caching allocator holds unused.

    Args:
        device: Whose allocator.
        thorough: Look at all objects, which takes some tenths of a second; else at recent ones only.
    """
    gc.collect(2 if thorough else 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def allocation_retries(device: torch.device) -> int:
    """How often CUDA's allocator had to give back all of its cache to serve a request; 0 on other devices."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


class PeakMemory:
    """Measures the most memory that something took: device memory on CUDA, resident memory of the process on Linux.

    Args:
        device: Where the model is.

    Raises:
        ValueError: On devices that do not tell.
    """

    def __init__(self, device: torch.device) -> None:
        on_linux = device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK)
        if device.type != "cuda" and not on_linux:
            raise ValueError(
                f"Peak memory cannot be measured on {device.type}. Pass DynamicBatchScaler(max_piece=...), the most "
                f"tokens that fit on one rank at once."
            )
        self.device = device

    def reset(self) -> None:
        """Start a new measurement."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the resident set's high-water mark

    def peak(self) -> int:
        """Bytes in use at the worst moment since ``reset``."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.device))
        return _process_bytes("VmHWM")

    def capacity(self) -> int:
        """Bytes that this process could use in all: what it holds, and what is free."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(free + torch.cuda.memory_reserved(self.device))
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(free + _process_bytes("VmRSS"))


def _process_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
