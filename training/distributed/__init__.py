"""Several processes: DDP, ZeRO, shared sequences, and checkpoints that do not depend on their number."""
