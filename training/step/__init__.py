"""One optimizer step: loss, optimizer and schedules, what the forward pass keeps, CUDA graphs."""
