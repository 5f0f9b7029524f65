"""Scores of queries with the mean key of each block of their document, forward and backward."""
