"""The lightning indexer of DeepSeek Sparse Attention: what it chooses, attention to that, its loss."""
