"""Examples to fine-tune on, row by row: from jsonl, csv, parquet and `datasets` to batches of each task."""
