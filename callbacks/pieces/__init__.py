"""How a loader batch is run in pieces that fit in memory; the parts that ``DynamicBatchScaler`` is made of."""
