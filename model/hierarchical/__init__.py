"""Hierarchical entmax: entmax over summaries of blocks says which are read, softmax weighs the tokens inside."""
