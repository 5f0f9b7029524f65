"""What happens beside the steps: metrics, progress, traces, checkpoints."""
