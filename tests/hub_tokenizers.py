"""Small tokenizers as those of the hub, trained here."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

PYTHON = "def f(x):\n\tif x:\n        return x + 12345\n\n\nclass A:\n    def g(self):\n        return 'größer'\n"
END = "<|endoftext|>"
LINES = [PYTHON, "Hello world, größer 漢字 abc def 12345 <tool> ", "The quick brown Fox"] * 20


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """As GPT-2's, with a template that adds special tokens."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(LINES, trainer)
    found.add_tokens(["<tool>"])
    found.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return found


def llama_2() -> tokenizers.Tokenizer:
    """Byte fallback, spaces as U+2581, one of them put before every text."""
    found = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    found.train_from_iterator(
        ["abc def", *LINES], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    content = json.loads(found.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["pre_tokenizer"] = None
    found = tokenizers.Tokenizer.from_str(json.dumps(content))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return found


def bert() -> tokenizers.Tokenizer:
    """Lower-cased word pieces."""
    found = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    found.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return found


def save(folder: Path, content: str | tokenizers.Tokenizer, **said: object) -> Path:
    """The folder, with a tokenizer.json and, where anything is said in it, a tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content if isinstance(content, str) else content.to_str())
    if said:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder
