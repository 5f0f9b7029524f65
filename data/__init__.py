"""Corpus to token shards to packed batches.

Reading order: tokenizers, tokenizer, store, files, records, documents, hub_formats, corpora, encoding, prepare,
packing, mixture, length_generalisation, datamodule.
"""
