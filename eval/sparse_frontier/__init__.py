"""Sparse attention without training against the entmax twin: python -m eval.sparse_frontier."""
