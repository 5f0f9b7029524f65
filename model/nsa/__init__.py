"""Native Sparse Attention (arXiv:2502.11089), trained as the model's own attention: compression, selection, window."""
