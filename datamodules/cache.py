"""Folders that are built once, appear whole or not at all, and are then shared by all processes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def default_cache_dir() -> Path:
    """``$LIGHTNING_LLM_CACHE``, else ``~/.cache/lightning_llm``."""
    return Path(os.environ.get("LIGHTNING_LLM_CACHE") or Path.home() / ".cache" / "lightning_llm")


def fingerprint(parts: Iterable[str]) -> str:
    """Name content by everything that decides it; 32 hexadecimal digits."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make sure that ``folder`` exists with what ``build`` writes.

    It is built beside its place and renamed when it is whole, so a killed run leaves nothing that is later believed.
    One process builds; others wait for it.

    Args:
        folder: Where the result belongs, named after a fingerprint of everything that decides the content.
        build: Writes the content into the empty folder that it is given.

    Returns:
        ``folder``.

    Raises:
        OSError: If the disk is full, with what to do; what was written is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run: we hold its lock
        unfinished.mkdir()
        try:
            build(unfinished)
            unfinished.rename(folder)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            written = sum(file.stat().st_size for file in unfinished.glob("*"))
            raise OSError(
                error.errno,
                f"No space left for the cache in {folder.parent}: {written / 1e6:.1f} MB were written when it failed "
                f"({os.strerror(error.errno)}). They are removed again. Free some space (a token takes 2 bytes, 4 "
                f"with a vocabulary over 65,536), or pass cache_dir=... on another disk",
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
