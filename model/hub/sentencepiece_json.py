"""A SentencePiece model of data.prepare as a tokenizer.json of the hub, which gives the same ids."""

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from common.errors import UsageError
from data.tokenizer import Tokenizer
from data.tokenizers.interface import CHUNK_CHARACTERS, PROBES, SPACE_MARK


def tokenizer_json(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """The content of tokenizer.json, which puts bos first as documents have it, and the texts of bos and eos.

    A U+2581 of a text, which tokenizer.json has no way to tell from a space, becomes a space there. Texts of more than
    CHUNK_CHARACTERS are encoded whole there, so that ids may differ where they are cut here.

    Raises UsageError where ids differ: the model is not one that data.prepare trains.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.path.read_bytes())
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    silent = {*special, *(i for i in range(len(pieces)) if model.is_byte(i))}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = _merges([(piece, i) for i, piece in enumerate(pieces) if i not in silent], vocabulary)
    unknown = model.id_to_piece(model.unk_id())
    bpe = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(bpe)
    library.normalizer = normalizers.Replace(" ", SPACE_MARK)
    library.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken(pieces[i], special=True) for i in special])
    bos = pieces[tokenizer.bos_id]
    library.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    _check(tokenizer, library)
    return library.to_str(pretty=True), bos, pieces[tokenizer.eos_id]


def _merges(pieces: list[tuple[str, int]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, in the order in which SentencePiece's BPE merges: by the id of what they make,
    and for each by the ids of the parts."""
    pairs = []
    for piece, made in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((made, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


def _check(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(library.to_str())
    library.encode_special_tokens = True
    for probe in PROBES:
        text = probe.replace(SPACE_MARK, "")[:CHUNK_CHARACTERS]
        found, expected = library.encode(text, add_special_tokens=False).ids, tokenizer.encode(text)
        if found != expected:
            same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
            raise UsageError(
                f"tokenizer {tokenizer.path} cannot be written as tokenizer.json: {text[:30]!r} has ids "
                f"{expected[same : same + 5]} at {same}, there {found[same : same + 5]}; expected one that "
                "data.prepare trains"
            )
