"""What callbacks share about an optimizer step: its micro-batches, what they hold, gradients, how far the run is."""
