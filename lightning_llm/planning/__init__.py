"""Which way of training a row of a given length fits into memory, found out before any weight is allocated."""
