"""The two kinds of tokenizers behind data.tokenizer: SentencePiece models and tokenizer.json files of the hub."""
