"""Corpus to token shards to packed batches.

Reading order: tokenizer, store, corpora, encoding, prepare, packing, datamodule.
"""
