"""RULER, built for one tokenizer and frozen: python -m eval.ruler."""
