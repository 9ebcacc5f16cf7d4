"""Out-of-memory errors: which are recognised, and real ones of a process with too little address space."""

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.callbacks.pieces.memory import allocation_retries
from lightning_llm.out_of_memory import is_out_of_memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB (GPU 0; 7.79 GiB total capacity)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("HIP out of memory. Tried to allocate 256.00 MiB"),
    RuntimeError("XPU out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 15.00 GiB"),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.97 GB, other allocations: 160.00 KB, max allowed: 18.13)"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,) and data type float64"),
]
OTHERS = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("my table ran out of memory slots"),
    RuntimeError("shared memory manager timed out"),
    ValueError("CUDA out of memory"),
    KeyboardInterrupt(),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_every_device_s_error_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:30])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_devices_without_a_cache_retry_nothing():
    assert allocation_retries(torch.device("cpu")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_real_allocation_failures_do_not_change_the_training(tmp_path, where):
    """A process whose address space is cut to little more than it has: torch's own allocator fails."""
    worker = Path(__file__).parents[1] / "workers" / "address_space.py"
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), where], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failed"] >= 1
    assert result[f"in {where}"] >= 1
    assert result["unlimited fails"]
    assert result["difference"] < 1e-12
    assert result["steps"] == result["expected steps"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("find", ["run", "start"])
def test_real_errors_of_a_gpu_do_not_change_the_training(quiet_trainer, precision, find):
    """A share of the device's memory that a whole batch does not fit in."""

    class Wide(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(64, 4096), torch.nn.Tanh(), torch.nn.Linear(4096, 1))

        def training_step(self, batch, batch_idx):
            return self.layers(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    data = torch.utils.data.TensorDataset(torch.randn(2 * 65536, 64, generator=torch.Generator().manual_seed(0)))
    found = []
    for scaler in (None, DynamicBatchScaler(find=find)):
        if scaler is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
        module = Wide()
        try:
            trainer = quiet_trainer(
                accelerator="cuda", max_epochs=3, precision=precision, callbacks=[scaler] if scaler else []
            )
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=65536))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    limits = scaler.limits
    assert limits.num_failed > 0 or any(limit.limit for limit in limits.buckets.values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
