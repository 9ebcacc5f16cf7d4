"""A search over the arguments of ``lightning-llm fit``: the space, the study, its trials, their table and picture."""
