"""The lightning indexer of DeepSeek Sparse Attention: what it chooses, its loss and gradients."""
