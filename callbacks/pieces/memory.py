"""What an out-of-memory error looks like, how memory is given back, and how much of it there is."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import torch
from lightning.pytorch.utilities.memory import is_oom_error

_MESSAGES = re.compile(
    r"(CUDA|HIP|XPU|MPS backend) out of memory"
    r"|(CUDA|HIP|XPU) error: out of memory"
    r"|(CUBLAS|HIPBLAS|CUDNN|MIOPEN|CUSOLVER|CUSPARSE|CUFFT|ROCBLAS)_STATUS_(ALLOC_FAILED|NO_MEMORY|MEMORY_ERROR)"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|std::bad_alloc"
    r"|unable to mmap \d+ bytes .*Cannot allocate memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left.

    Recognised: torch's own type, Python's, and the messages of CUDA, HIP, XPU, MPS, their libraries, and the CPU's
    allocator.

    Args:
        error: As it was raised.

    Example:
        >>> is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"))
        True
        >>> is_out_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
        False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return is_oom_error(error) or _MESSAGES.search(str(error)) is not None


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
