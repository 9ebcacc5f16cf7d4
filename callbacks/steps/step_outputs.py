"""What ``training_step`` was given and returned, for callbacks: no hook before backward tells them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning as L

Listener = Callable[[Any, Any], None]


def listen_to_training_step(pl_module: L.LightningModule, listener: Listener) -> Callable[[], None]:
    """Call ``listener(batch, outputs)`` after each ``training_step`` that returned something.

    However many listen, the module's method is wrapped once, and is its own again when the last one leaves.

    Args:
        pl_module: Its ``training_step`` is wrapped.
        listener: Is told the batch and what was returned for it.

    Returns:
        A function that ends it; calling it again does nothing.
    """
    if not hasattr(pl_module.__dict__.get("training_step"), "listeners"):
        pl_module.__dict__["training_step"] = _wrap(pl_module)
    wrapped = pl_module.__dict__["training_step"]
    listeners: list[Listener] = wrapped.listeners
    before: dict[str, Any] = wrapped.own
    listeners.append(listener)

    def leave() -> None:
        if listener in listeners:
            listeners.remove(listener)
        if not listeners and pl_module.__dict__.get("training_step") is wrapped:
            del pl_module.__dict__["training_step"]
            pl_module.__dict__.update(before)

    return leave


def _wrap(pl_module: L.LightningModule) -> Any:
    inner: Any = pl_module.training_step
    listeners: list[Listener] = []

    @functools.wraps(inner)
    def training_step(*args: Any, **kwargs: Any) -> Any:  # its docstring is the wrapped one's
        outputs = inner(*args, **kwargs)
        if outputs is not None:
            batch = args[0] if args else next(iter(kwargs.values()), None)
            for listener in listeners:
                listener(batch, outputs)
        return outputs

    training_step.listeners = listeners  # type: ignore[attr-defined]
    own = {name: value for name, value in pl_module.__dict__.items() if name == "training_step"}
    training_step.own = own  # type: ignore[attr-defined]
    return training_step
