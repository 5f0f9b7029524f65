"""Softmax attention with a learned bias for each query and block of keys, forward and backward."""
