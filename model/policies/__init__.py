"""Sparse attention without training: policies that choose which keys each query of a softmax model sees."""
