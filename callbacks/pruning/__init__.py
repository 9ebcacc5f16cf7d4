"""Parts of :class:`~lightning_llm.callbacks.MagnitudePruning`."""
