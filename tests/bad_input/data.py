"""data.prepare, and prepared corpora as the other commands read them."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import sentencepiece

from tests.bad_input.cases import TOO_LONG, Case, Place
from tests.hub_tokenizers import END, byte_level, save

Damage = Callable[[Place], object]


def prepare(*options: str, corpus: str = "TextFiles", paths: str = "[{tmp}/texts]") -> list[str]:
    """Prepare the files of {tmp}/texts into {tmp}/out."""
    reader = [f"--corpus=data.corpora.{corpus}", f"--corpus.paths={paths}"]
    return ["-m", "data.prepare", *reader, "--output={tmp}/out", "--workers=1", *options]


def some_texts(place: Place) -> None:
    (place.tmp / "texts").mkdir()
    for number in range(20):
        text = " ".join(f"word{number * step % 97} other{step % 13}" for step in range(200))
        (place.tmp / "texts" / f"{number}.txt").write_text(text)


def lines(*content: str | bytes, name: str = "a.jsonl") -> Damage:
    """A file of these lines in {tmp}/texts."""

    def write(place: Place) -> None:
        (place.tmp / "texts").mkdir()
        parts = [line if isinstance(line, bytes) else line.encode() for line in content]
        (place.tmp / "texts" / name).write_bytes(b"\n".join([*parts, b""]))

    return write


def cut_gzip(place: Place) -> None:
    lines("")(place)
    text = "".join(json.dumps({"text": str(number * 7919)}) + "\n" for number in range(9999))
    (place.tmp / "texts" / "a.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-40])
    (place.tmp / "texts" / "a.jsonl").unlink()


def table(column: object, name: str = "text", cut: int = 0) -> Damage:
    """A Parquet file with one column."""

    def write(place: Place) -> None:
        (place.tmp / "texts").mkdir()
        path = place.tmp / "texts" / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({name: column}), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])

    return write


def hub(content: str | None = None, **parts: object) -> Damage:
    """A tokenizer.json, by default one that keeps texts; with parts of its own it says bos and eos."""

    def write(place: Place) -> None:
        some_texts(place)
        own = json.dumps(json.loads(byte_level([END]).to_str()) | parts)
        save(place.tmp / "hub", content or own, **({"bos_token": END, "eos_token": END} if parts else {}))

    return write


def foreign_tokenizer(place: Place) -> None:
    """SentencePiece's defaults: a space before, runs of spaces and newlines joined."""
    some_texts(place)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of text"] * 50), model_prefix=str(place.tmp / "foreign"), vocab_size=290,
        byte_fallback=True, model_type="bpe", minloglevel=2,
    )  # fmt: skip


def written(name: str, content: str) -> Damage:
    """Some texts, and a file of this content."""

    def write(place: Place) -> None:
        some_texts(place)
        path = place.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


def changed(name: str, change: Callable[[dict[str, object]], object]) -> Damage:
    """A JSON file of the corpus with a change."""

    def damage(place: Place) -> None:
        path = place.corpus / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def first_shard(place: Place, ending: str) -> Path:
    return min((place.corpus / "train").glob(f"*{ending}"))


def cut(ending: str) -> Damage:
    """The first shard's file without its last bytes."""
    return lambda place: os.truncate(first_shard(place, ending), first_shard(place, ending).stat().st_size - 8)


def flipped(place: Place) -> None:
    path = first_shard(place, ".bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


TRAIN = ["train.py", "--config", "{tiny}", "--run_dir", "{tmp}/new", "--trainer.max_steps", "10"]
JSONL, HUB = {"corpus": "JsonLines"}, ["-m", "data.prepare", "--corpus=data.corpora.Hub", "--output={tmp}/out"]
HUB = [*HUB, "--corpus.path=json", "--corpus.data_files=[{tmp}/texts/a.jsonl]", "--workers=1"]
SAMPLING = ["training a tokenizer", "sampling text"]
GOOD = '{"text": "some words"}'
CASES = [
    Case("no files there", prepare(paths="[{tmp}/none]"), ["{tmp}/none"]),
    Case("heldout_fraction 2", prepare("--heldout_fraction=2"), ["heldout_fraction", "2"], some_texts),
    Case("heldout_fraction nan", prepare("--heldout_fraction=.nan"), ["heldout_fraction", "nan"], some_texts),
    Case("shard_bytes -1", prepare("--shard_bytes=-1"), ["shard_bytes is -1", "at least 1"], some_texts),
    Case("a hundred thousand workers", prepare("--workers=100000"), ["workers is 100000", "at most"], some_texts),
    Case("max_documents 0", prepare("--max_documents=0"), ["max_documents is 0", "at least 1"], some_texts),
    Case("vocab_size 3", prepare("--tokenizer.vocab_size=3"), ["vocab_size is 3", "at least 260"], some_texts),
    Case("vocab_size too small", prepare("--tokenizer.vocab_size=300"), ["300 is too small", "at least"], some_texts),
    Case("vocab_size too large", prepare("--tokenizer.vocab_size=99999"), ["99999 is too large"], some_texts),
    Case("scan_bytes 0", prepare("--tokenizer.scan_bytes=0"), ["scan_bytes is 0", "at least 1"], some_texts),
    Case("no tokenizer there", prepare("--tokenizer.path={tmp}/no.model"),
         ["tokenizer.path is {tmp}/no.model", "not exist", "SentencePiece model"], some_texts),
    Case("a tokenizer that is none", prepare("--tokenizer.path={tiny}"), ["{tiny}", "SentencePiece"], some_texts),
    Case("a tokenizer that changes text", prepare("--tokenizer.path={tmp}/foreign.model"),
         ["foreign.model changes text", "comes back as ' def"], foreign_tokenizer),
    Case("a tokenizer that is a folder", prepare("--tokenizer.path={tmp}/texts"),
         ["tokenizer.path is {tmp}/texts", "has none", "a folder with either"], some_texts),
    Case("a tokenizer.json cut short", prepare("--tokenizer.path={tmp}/hub"),
         ["{tmp}/hub/tokenizer.json is not valid JSON", "Hugging Face hub"], hub('{"model": {')),
    Case("a tokenizer.json of something else", prepare("--tokenizer.path={tmp}/hub"),
         ["{tmp}/hub/tokenizer.json lacks 'model'", "Hugging Face hub"], hub('{"a": 1}')),
    Case("a tokenizer.json without eos", prepare("--tokenizer.path={tmp}/hub", "--tokenizer.bos=<|endoftext|>"),
         ["has no eos: {tmp}/hub/tokenizer_config.json does not exist", "set tokenizer.eos"], hub()),
    Case("a bos that is no token", prepare("--tokenizer.path={tmp}/hub", "--tokenizer.bos=<s>"),
         ["tokenizer.bos is '<s>', which is no token of {tmp}/hub", "its special ones: '<|endoftext|>'"], hub()),
    Case("a tokenizer.json that changes text", prepare("--tokenizer.path={tmp}/hub"),
         ["tokenizer.json changes text: 'e", "set tokenizer.lossy: true"], hub(normalizer={"type": "NFC"})),
    Case("a tokenizer.bos without tokenizer", prepare("--tokenizer.bos=<s>"),
         ["tokenizer.bos is '<s>' without tokenizer.path", "leave it out"], some_texts),
    Case("sample_bytes 1", prepare("--tokenizer.sample_bytes=1"), ["sample_bytes is 1", "at least 16"], some_texts),
    Case("groups where there are none", prepare("--heldout_groups=[nope]"),
         ["'nope'", "TextFiles are in no groups", "heldout_fraction"], some_texts),
    Case("sources that are not there", ["-m", "data.prepare", "--config=configs/data/prepare_linux.yaml",
                                        "--output={tmp}/out"],
         ["source folder linux-source-6.1/kernel does not exist", "corpus.paths"]),
    Case("another reader without its paths", ["-m", "data.prepare", "--config=configs/data/prepare_linux.yaml",
                                              "--corpus=TextFiles", "--output={tmp}/out"],
         ["corpus lacks paths", "give corpus.paths"]),
    Case("nothing for a reader", ["-m", "data.prepare", "--config=configs/data/prepare_linux.yaml",
                                  "--corpus={}", "--output={tmp}/out"], ["corpus", "class_path"]),
    Case("output is a file", prepare("--output={tmp}/file"), ["--output {tmp}/file is a file", "expected a folder"],
         written("file", "")),
    Case("output below a file", prepare("--output={tmp}/file/x"), ["--output {tmp}/file/x cannot", "another folder"],
         written("file", "")),
    Case("output where nothing can be", prepare("--output=/proc/x"), ["--output /proc/x cannot", "another folder"],
         some_texts),
    Case("output too long", prepare("--output={tmp}/" + TOO_LONG), ["too long", "choose another folder"], some_texts),
    Case("output of something else", prepare(), ["holds files of something else"], written("out/mine.txt", "mine")),
    Case("no output", prepare("--output="), ["--output is empty"], some_texts),
    Case("another config", prepare("--tokenizer.vocab_size=390", "--output={corpus}"), ["another config"], some_texts),
    Case("an option that is none", prepare("--shard_bites=3"), ["--shard_bites"], some_texts),
    Case("a config that is no YAML", prepare("--config={tmp}/c.yaml"), ["{tmp}/c.yaml", "line "],
         written("c.yaml", "corpus: [x\n")),
    Case("a reader that is none", prepare(corpus="Nope"), ["Nope"], some_texts),
    Case("a text that is not UTF-8", prepare(), ["a.txt is not UTF-8", "undecodable"], lines(b"\xff", name="a.txt"),
         SAMPLING),
    Case("a broken line", prepare(**JSONL), ["a.jsonl:2 is not JSON"], lines(GOOD, '{"text": '), SAMPLING),
    Case("a line of latin-1", prepare(**JSONL), ["a.jsonl:2 is not UTF-8"], lines(GOOD, b'{"text": "\xe4"}'), SAMPLING),
    Case("a null text", prepare(**JSONL), [":2", "null", "missing_text"], lines(GOOD, '{"text": null}'), SAMPLING),
    Case("a number for a text", prepare(**JSONL), ["a.jsonl:2", "int"], lines(GOOD, '{"text": 7}'), SAMPLING),
    Case("no such field", prepare(**JSONL), ["a.jsonl:1", "title", "text_field"], lines('{"title": "x"}'), SAMPLING),
    Case("a gzip file cut short", prepare(**JSONL), ["a.jsonl.gz", "cut short"], cut_gzip, SAMPLING),
    Case("hub: a number for a text", HUB, ["a.jsonl:2", "int"], lines(GOOD, '{"text": 7}'), SAMPLING),
    Case("hub: no such field", HUB, ["a.jsonl:1", "title", "text_field"], lines('{"title": "x"}'), SAMPLING),
    Case("parquet: null", prepare(corpus="Parquet"), ["row 1", "null", "missing_text"], table(["a", None]), SAMPLING),
    Case("parquet: numbers", prepare(corpus="Parquet"), ["row 0", "int"], table([1, 2]), SAMPLING),
    Case("parquet: no column", prepare(corpus="Parquet"), ["a.parquet", "title"], table(["a"], "title"), SAMPLING),
    Case("parquet: cut", prepare(corpus="Parquet"), ["a.parquet", "Parquet"], table(["a"], cut=20), SAMPLING),
    Case("manifest without splits", TRAIN, ["manifest.json lacks 'splits'"],
         changed("manifest.json", lambda content: content.pop("splits"))),
    Case("manifest with a list", TRAIN, ["manifest.json", "a list as 'vocab_size'"],
         changed("manifest.json", lambda content: content.update(vocab_size=[]))),
    Case("shard record without files", TRAIN, ["000000.json lacks 'files'"],
         changed("train/000000.json", lambda content: content.pop("files"))),
    Case("shard cut short", TRAIN, ["000000.bin", "bytes, expected"], cut(".bin")),
    Case("index cut short", TRAIN, ["000000.idx.npy", "bytes, expected"], cut(".idx.npy")),
    Case("shard with a flipped bit", [*TRAIN, "--data.verify", "checksum"],
         ["000000.bin", "sha256", "damaged"], flipped),
]  # fmt: skip
