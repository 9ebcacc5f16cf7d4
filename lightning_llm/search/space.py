"""What a search may draw: ranges and choices for dotted keys of a configuration, read from YAML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lightning_llm.search.keys import nearest

KINDS = ("uniform", "log_uniform", "int", "choice")
_OPTIONS = {"uniform": {"step"}, "log_uniform": set(), "int": {"log", "step"}, "choice": set()}
_FORMS = "{uniform: [0, 0.1]}, {log_uniform: [1e-5, 1e-2]}, {int: [4, 64], log: true} or {choice: [a, b]}"


class Draws(Protocol):
    """What draws values: an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """A number within bounds."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """A whole number within bounds, both included."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of these."""


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Args:
        key: Dotted key of the configuration.
        low: Least value.
        high: Largest value.
        whole: Whether only whole numbers are drawn.
        log: Whether the logarithm is uniform, not the number.
        step: Distance of the values; None: 1 for whole numbers, any number else.
    """

    key: str
    low: float
    high: float
    whole: bool = False
    log: bool = False
    step: float | None = None

    def draw(self, trial: Draws) -> float:
        """A value for a trial."""
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def value_of(self, label: Any) -> Any:
        """The value that a study keeps as ``label``: itself."""
        return label

    def examples(self) -> list[Any]:
        """The bounds."""
        return [int(end) if self.whole else float(end) for end in (self.low, self.high)]

    def spec(self) -> dict[str, Any]:
        """As it is written in YAML."""
        kind = "int" if self.whole else "log_uniform" if self.log else "uniform"
        options = {"log": True} if self.whole and self.log else {}
        return {kind: self.examples(), **options, **({"step": self.step} if self.step else {})}


@dataclass(frozen=True)
class Choice:
    """One of several values of any kind: words, numbers, lists, mappings, null.

    Args:
        key: Dotted key of the configuration.
        choices: The values.
    """

    key: str
    choices: tuple[Any, ...]

    @property
    def labels(self) -> list[Any]:
        """The values as a study keeps them: lists and mappings as JSON."""
        return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in self.choices]

    def draw(self, trial: Draws) -> Any:
        """A value for a trial."""
        return self.value_of(trial.suggest_categorical(self.key, self.labels))

    def value_of(self, label: Any) -> Any:
        """The value that a study keeps as ``label``."""
        return self.choices[[json.dumps(each) for each in self.labels].index(json.dumps(label))]

    def examples(self) -> list[Any]:
        """All of them."""
        return list(self.choices)

    def spec(self) -> dict[str, Any]:
        """As it is written in YAML."""
        return {"choice": list(self.choices)}


Parameter = Range | Choice


def read_parameter(key: str, spec: Any) -> Parameter:
    """What may be drawn for a key.

    Args:
        key: Dotted key of the configuration.
        spec: ``{uniform: [low, high], step: s}``, ``{log_uniform: [low, high]}``, ``{int: [low, high], step: s}`` or
            ``{int: [low, high], log: true}``, ``{choice: [...]}``.

    Raises:
        ValueError: For any other form, bounds in the wrong order, and the logarithm of 0.

    Example:
        >>> read_parameter("model.learning_rate", {"log_uniform": [1e-5, 1e-2]})
        Range(key='model.learning_rate', low=1e-05, high=0.01, whole=False, log=True, step=None)
        >>> read_parameter("model.warmup", {"choice": ["2%", "10%"]}).examples()
        ['2%', '10%']
    """
    kinds = [kind for kind in KINDS if isinstance(spec, Mapping) and kind in spec]
    if len(kinds) != 1:
        words = [str(word) for word in spec] if isinstance(spec, Mapping) else []
        hint = next((text for word in words if (text := nearest(word, KINDS))), "")
        raise ValueError(f"`{key}` is searched by {_FORMS}, but got {spec!r}.{hint}")
    (kind,) = kinds
    values, options = spec[kind], {name: value for name, value in spec.items() if name != kind}
    if unknown := sorted(str(name) for name in options.keys() - _OPTIONS[kind]):
        allowed = " and ".join(f"`{name}`" for name in sorted(_OPTIONS[kind])) or "nothing"
        raise ValueError(f"`{key}`: beside `{kind}` there may be {allowed}, but got `{unknown[0]}`.")
    if kind == "choice":
        return _choice(key, values)
    return _range(key, kind, values, **options)


def read_space(settings: Any) -> list[Parameter]:
    """A search space from a mapping: keys with dots, or nested as in a configuration, or both.

    Raises:
        ValueError: If it is no mapping, is empty, or holds a key or a form that cannot be read.

    Example:
        >>> space = read_space({"model": {"warmup": {"int": [0, 50]}}, "data.max_length": {"choice": [64, 128]}})
        >>> [parameter.key for parameter in space]
        ['model.warmup', 'data.max_length']
    """
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError(f"A search space maps keys of the configuration to {_FORMS}, but got {settings!r}.")
    space = list(_flat(settings, ""))
    if len({parameter.key for parameter in space}) < len(space):
        raise ValueError("A key stands twice in the search space: once with dots, once nested.")
    return space


def load_yaml(text: str, what: str) -> Any:
    """Read YAML in which ``1e-5`` is a number, as in jsonargparse's (PyYAML's own takes it for a word).

    Args:
        text: YAML.
        what: Whose text it is, for the error.

    Raises:
        ValueError: If it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML: {error}") from error


def read_space_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, for :func:`read_space`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    settings = load_yaml(path.read_text(), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must map keys of the configuration to {_FORMS}, but holds {settings!r}.")
    return settings


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Knows numbers such as 1e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _flat(settings: Mapping[str, Any], prefix: str) -> Any:
    for name, spec in settings.items():
        key = f"{prefix}{name}"
        nested = isinstance(spec, Mapping) and spec and all(isinstance(value, Mapping) for value in spec.values())
        if nested:
            yield from _flat(spec, f"{key}.")
        else:
            yield read_parameter(key, spec)


def _choice(key: str, values: Any) -> Choice:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"`{key}`: `choice` takes a list of values, but got {values!r}.")
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError(f"`{key}`: a value stands twice among the choices {values!r}.")
    return Choice(key, tuple(values))


def _range(key: str, kind: str, ends: Any, step: Any = None, log: Any = False) -> Range:
    is_pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    if not is_pair or not all(_is_number(end, whole=kind == "int") for end in ends):
        what = "whole numbers" if kind == "int" else "numbers"
        raise ValueError(f"`{key}`: `{kind}` takes two {what}, [low, high], but got {ends!r}.")
    low, high = ends
    log = log or kind == "log_uniform"
    if not low < high:
        raise ValueError(f"`{key}`: `{kind}` takes [low, high] with low < high, but got {ends!r}.")
    if log and low <= 0:
        raise ValueError(f"`{key}`: on a logarithmic scale both bounds lie above 0, but got {ends!r}.")
    if not isinstance(log, bool):
        raise ValueError(f"`{key}`: `log` is true or false, but got {log!r}.")
    if step is not None and (log or not _is_number(step, whole=kind == "int") or step <= 0):
        rule = "cannot go with a logarithmic scale" if log else "is a positive number, whole for `int`"
        raise ValueError(f"`{key}`: `step` {rule}, but got {step!r}.")
    return Range(key, low, high, whole=kind == "int", log=log, step=step)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) if whole else math.isfinite(value)
