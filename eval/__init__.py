"""Comparison of trained checkpoints: perplexity, needles, attention sparsity, and a report with intervals."""
