"""Which rows of a table stand in which micro-batch: plans, pure functions of what was trained before."""
