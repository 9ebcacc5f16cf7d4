"""Memory of a device or, on a CPU, of this process: in use, and at its highest."""

from __future__ import annotations

from pathlib import Path

import torch


def memory_bytes(device: torch.device, key: str) -> int:
    """Bytes in use (``VmRSS``) or their high-water mark (``VmHWM``): of the process, or of torch's CUDA allocator."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak(device: torch.device) -> None:
    """Start a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
