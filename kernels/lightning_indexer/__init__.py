"""The lightning indexer of DeepSeek Sparse Attention: its loss and gradients, without scores in memory."""
