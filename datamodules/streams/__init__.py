"""Documents that are read while they are trained on: shards, virtual streams, and a loader that resumes them."""
