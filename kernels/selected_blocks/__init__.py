"""Softmax attention of each query over blocks of keys of its own, forward and backward."""
