"""A cache folder appears whole or not at all."""

import errno
import resource
import signal
import threading
import time
from multiprocessing import get_context

import pytest

from lightning_llm.datamodules.cache import build_once, fingerprint


def test_folder_is_built_once_and_reused(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "file").write_text("content")

    for _ in range(2):
        folder = build_once(tmp_path / "cache" / "name", build)
    assert (folder / "file").read_text() == "content"
    assert len(calls) == 1
    assert not list(folder.parent.glob("*.unfinished"))


def test_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise KeyError("broken")

    with pytest.raises(KeyError):
        build_once(tmp_path / "name", build)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["name.lock"])


def build_half(folder, is_half):
    def build(unfinished):
        (unfinished / "tokens").write_text("half")
        is_half.set()
        time.sleep(60)

    build_once(folder, build)


def test_killed_build_is_not_believed(tmp_path):
    """SIGKILL in the middle of writing; the next run builds anew."""
    context = get_context("fork")
    is_half = context.Event()
    process = context.Process(target=build_half, args=(tmp_path / "name", is_half))
    process.start()
    assert is_half.wait(timeout=60)
    process.kill()
    process.join(timeout=30)
    assert (tmp_path / "name.unfinished" / "tokens").exists()
    assert not (tmp_path / "name").exists()
    folder = build_once(tmp_path / "name", lambda path: (path / "tokens").write_text("whole"))
    assert (folder / "tokens").read_text() == "whole"
    assert not (tmp_path / "name.unfinished").exists()


def test_processes_that_come_at_once_build_once(tmp_path):
    calls, folders = [], []

    def build(folder):
        calls.append(1)
        time.sleep(0.2)
        (folder / "file").write_text("x")

    threads = [threading.Thread(target=lambda: folders.append(build_once(tmp_path / "n", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(calls) == 1
    assert len(folders) == 4


def test_full_disk_says_what_to_do_and_cleans_up(tmp_path):
    """A real write failure: the process may write files of 10 kB at most."""

    def build(folder):
        with (folder / "tokens.bin").open("wb") as file:
            file.write(b"x" * 1_000_000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"No space left for the cache in .*Free some space .*cache_dir=") as error:
            build_once(tmp_path / "name", build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert error.value.errno == errno.EFBIG
    assert not (tmp_path / "name").exists()
    assert not (tmp_path / "name.unfinished").exists()


def test_device_that_is_full_is_recognised(tmp_path):
    def build(folder):
        (folder / "tokens.bin").symlink_to("/dev/full")
        with (folder / "tokens.bin").open("wb") as file:
            file.write(b"x")

    with pytest.raises(OSError, match="No space left for the cache") as error:
        build_once(tmp_path / "name", build)
    assert error.value.errno == errno.ENOSPC


def test_other_errors_of_the_disk_are_not_renamed(tmp_path):
    def build(folder):
        raise PermissionError(errno.EACCES, "not yours")

    with pytest.raises(PermissionError, match="not yours"):
        build_once(tmp_path / "name", build)


def test_fingerprint_separates_its_parts():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert len(fingerprint(["x"])) == 32
