"""Dynamic Memory Sparsification (arXiv 2506.05345): each KV head learns which tokens to forget, with a delay."""
