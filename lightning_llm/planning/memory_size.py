"""How much memory there is, and sizes in words."""

from __future__ import annotations

import os
import re

import torch

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(size: str | float) -> int:
    """Read a number of bytes: ``16GB`` is 16e9, ``80GiB`` is 80 * 2**30.

    Raises:
        ValueError: For anything else, and for sizes of 0 and less.

    Example:
        >>> parse_size("16GB"), parse_size("1.5 GiB"), parse_size(1024)
        (16000000000, 1610612736, 1024)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"`memory` must be a size such as '16GB' or '80GiB', above 0, but got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


def format_size(size: float) -> str:
    """A number of bytes in GB, or MB where there are few.

    Example:
        >>> format_size(23.1e9), format_size(4.4e6)
        ('23.1 GB', '4.4 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_memory(device: torch.device) -> int:
    """Bytes that a model could take on a device: free ones, and those that torch's allocator holds unused.

    Args:
        device: A CUDA device, or the CPU.

    Raises:
        ValueError: For devices that do not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        return _free_host_memory()
    raise ValueError(f"A {device.type} device does not tell how much memory is free. Pass `memory`, such as '16GB'.")


def _free_host_memory() -> int:
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("MemAvailable:"):  # the page cache can be given up
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
