"""Dotted keys of a configuration: found, refused with what may have been meant, and set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

Path = list[str | int]


def find(config: dict[str, Any], key: str) -> Path:
    """Where a dotted key stands in a whole configuration, as ``lightning-llm fit --print_config`` shows it.

    ``init_args`` may be left out, and a list of classes is entered by a class's name, so that
    ``trainer.callbacks.LearningRateScaling.power`` is a key. Arguments that are mappings of the user's own
    (``model.model``, ``model.optimizer_options``) may get new keys; their owners refuse what they do not know.

    Args:
        config: All arguments with their values, nested.
        key: Such as ``model.learning_rate``.

    Raises:
        ValueError: For a key that is not there, with its nearest neighbours.

    Example:
        >>> config = {"model": {"learning_rate": 0.1, "optimizer_options": None}}
        >>> config["trainer"] = {"callbacks": [{"class_path": "a.b.Scaling", "init_args": {"power": 1.0}}]}
        >>> find(config, "trainer.callbacks.Scaling.power")
        ['trainer', 'callbacks', 0, 'init_args', 'power']
        >>> find(config, "model.optimizer_options.momentum")
        ['model', 'optimizer_options', 'momentum']
        >>> find(config, "model.learning_rat")
        Traceback (most recent call last):
        ValueError: The configuration has no key `model.learning_rat`. Did you mean `model.learning_rate`?
    """
    path: Path = []
    node: Any = config
    for part in key.split("."):
        if isinstance(node, list):
            index = next((i for i, item in enumerate(node) if _class_name(item) == part), None)
            if index is None:
                raise _unknown(config, key)
            path.append(index)
            node = node[index]
            continue
        if isinstance(node, dict) and part not in node and isinstance(node.get("init_args"), dict):
            path.append("init_args")
            node = node["init_args"]
        is_section = len(path) < 2 or path[-1] == "init_args"
        if not part or (not isinstance(node, dict) if node is not None else is_section):
            raise _unknown(config, key)
        if is_section and part not in node:
            raise _unknown(config, key)
        path.append(part)
        node = None if node is None else node.get(part)
    return path


def put(config: dict[str, Any], path: Path, value: Any) -> None:
    """Set the value at a path that :func:`find` gave, making mappings on the way where there are none."""
    node: Any = config
    for part in path[:-1]:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[path[-1]] = value


def differences(ours: Any, theirs: Any, key: str = "") -> Iterator[str]:
    """Dotted keys at which two configurations differ.

    Example:
        >>> list(differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1]}, "d": None}))
        ['a.b']
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for part in sorted({*ours, *theirs}, key=str):
            yield from differences(ours.get(part), theirs.get(part), f"{key}.{part}" if key else str(part))
    elif ours != theirs:
        yield key


def nearest(word: str, known: Sequence[str]) -> str:
    """`` Did you mean ...?`` with the nearest of the words that are known; nothing where none is near.

    Example:
        >>> nearest("log_unifrom", ["uniform", "log_uniform"])
        ' Did you mean `log_uniform` or `uniform`?'
    """
    close = get_close_matches(word, known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""


def _unknown(config: dict[str, Any], key: str) -> ValueError:
    hint = nearest(key, [*_keys(config)]) or " `lightning-llm fit --print_config` shows them all."
    return ValueError(f"The configuration has no key `{key}`.{hint}")


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """All keys in the form in which a user writes them."""
    if isinstance(node, dict) and "class_path" in node:
        node = node.get("init_args") or {}
    if isinstance(node, dict):
        for part, value in node.items():
            key = f"{prefix}{part}"
            yield key
            yield from _keys(value, f"{key}.")
    elif isinstance(node, list):
        for item in node:
            if name := _class_name(item):
                yield from _keys(item, f"{prefix}{name}.")


def _class_name(item: Any) -> str | None:
    return str(item["class_path"]).rpartition(".")[2] if isinstance(item, dict) and "class_path" in item else None
