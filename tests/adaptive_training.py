"""A callback that measures a planted noise scale, for tests and workers of AdaptiveAccumulation."""

import lightning as L


class Planted(L.Callback):
    """Says after each optimizer step what was planted for it: a noise scale that only its own state knows.

    ``curve`` is the noise scale by the number of steps that were measured; None stands for no estimate. ``forgets``
    leaves the number out of the checkpoint.
    """

    def __init__(self, curve, unit="sequences", spread=1.5, forgets=False):
        self.curve, self.spread, self.forgets = curve, spread, forgets
        self.measured = 0
        setattr(self, f"noise_scale_{unit}", None)
        setattr(self, f"interval_{unit}", None)
        self.unit = unit
        self.batches = []  # what the callback or data module calls the global batch, in each step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        from lightning_llm.callbacks.learning_rate_scaling import _source

        self.batches.append(_source(trainer).global_batch)
        self.measured += 1
        self._publish()

    def _publish(self):
        value = self.curve(self.measured) if self.measured else None
        interval = None if value is None else (value / self.spread**0.5, value * self.spread**0.5)
        setattr(self, f"noise_scale_{self.unit}", value)
        setattr(self, f"interval_{self.unit}", interval)

    def state_dict(self):
        return {"measured": 0 if self.forgets else self.measured, "some": 1}

    def load_state_dict(self, state):
        self.measured = state["measured"]
        self._publish()
