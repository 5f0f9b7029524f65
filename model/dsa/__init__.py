"""DeepSeek Sparse Attention (DeepSeek-V3.2-Exp), trained as the model's own attention: an indexer chooses tokens."""
