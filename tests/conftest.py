"""Shared fixtures: tiny models, tiny data, and several processes with a time limit."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import TINY_GPT2, TINY_LLAMA

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LIGHTNING_LLM_CACHE"] = tempfile.mkdtemp(prefix="lightning-llm-tests-")
atexit.register(shutil.rmtree, os.environ["LIGHTNING_LLM_CACHE"], ignore_errors=True)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forget_global_seed() -> Iterator[None]:
    """``seed_everything`` leaves its seed in the environment, from which strategies of several ranks seed anew."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def unwrap_loaders() -> Iterator[None]:
    """Lightning wraps the classes of loaders while it asks for one, and leaves them so if that raises."""
    yield
    if "torch" not in sys.modules:
        return
    from torch.utils.data import BatchSampler, DataLoader

    classes = [DataLoader, BatchSampler]
    while classes:
        loader: Any = classes.pop()
        classes += loader.__subclasses__()
        for name in ("__init__", "__setattr__", "__delattr__"):
            if f"__old{name}" in vars(loader):
                setattr(loader, name, vars(loader)[f"__old{name}"])
                delattr(loader, f"__old{name}")


@pytest.fixture
def tiny_gpt2() -> dict[str, Any]:
    return dict(TINY_GPT2)


@pytest.fixture
def tiny_llama() -> dict[str, Any]:
    return dict(TINY_LLAMA)


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Make a Trainer that writes nothing outside the test's folder."""
    import lightning as L

    def make(**options: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        return L.Trainer(**{**defaults, **options})

    return make


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run ``tests/workers/<script>.py`` in several processes under torchrun; return what each rank wrote.

    A worker gets a folder and options, and writes ``rank<N>.json``. All processes are killed at the time limit.
    """

    def run(script: str, world_size: int, time_limit: float = 120, **options: Any) -> list[dict[str, Any]]:
        folder = tmp_path / f"{script}-{world_size}"
        folder.mkdir(exist_ok=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        worker = [str(ROOT / "tests" / "workers" / f"{script}.py"), str(folder), json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen(
            [sys.executable, *torchrun, *worker],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{script} with {world_size} ranks hung for {time_limit} s:\n{output[-4000:]}")
        assert process.returncode == 0, f"{script} failed:\n{output[-6000:]}"
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]

    return run
