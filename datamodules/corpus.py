"""The corpus that every Python brings along: the source of its standard library and the text of its manual."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def stdlib_files() -> list[Path]:
    """The standard library's ``.py`` files without its tests, sorted; empty where a Python has no sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS]  # not walked: site-packages may be large
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if path.is_file())


def manual_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference's topics, as ``help()`` shows them."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())
