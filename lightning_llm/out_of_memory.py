"""What an out-of-memory error looks like."""

from __future__ import annotations

import re

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
