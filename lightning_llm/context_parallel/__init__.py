"""Context parallelism: one row's tokens spread over ranks, and the loss and gradient of the whole row."""
