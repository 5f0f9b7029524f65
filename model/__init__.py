"""The decoder-only model: kernels below it, training and evaluation above."""
