"""Turn a corpus into token shards: python -m data.prepare --config configs/data/prepare_stdlib.yaml

The corpus is read once, in order, in groups of documents of bounded size; each group is encoded by one of the worker
processes and gives at most one shard per split. A group is finished when its record in OUTPUT/progress exists, which is
written after its shards. A run that was killed continues behind the finished groups and ends with the same bytes as an
undisturbed one. The manifest comes last; a corpus without it is unfinished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.command_line import CommandParser
from common.errors import user_errors
from common.files import check_keys, write_file, write_json
from common.locks import folder_lock
from common.nested import flatten
from data.corpora import Corpus, Document
from data.encoding import map_groups, read_groups, shard_name
from data.store import COUNT_KEYS, FORMAT, SPLITS, read_manifest, read_record
from data.tokenizer import LEAST_VOCABULARY, Tokenizer, train_tokenizer

UNFINISHED_OVERWRITE = {"overwrite": "unfinished"}
GROUP_KEYS = {"end": int, "undecodable": int, "splits": dict}
WAY_OUT = "choose another --output, or start over with --overwrite true"


@dataclasses.dataclass
class TokenizerConfig:
    """Tokenizer of the corpus: an existing model file, or one trained on a sample of the training split.

    Args:
        path: existing SentencePiece model; None trains one. Corpora that are mixed must share one tokenizer
        vocab_size: vocabulary of the trained tokenizer, bos, eos, unk and 256 byte pieces included
        sample_bytes: text the training sees at most
        scan_bytes: text read at most to draw the sample from
        split_by_unicode_script: False lets a piece join letters and punctuation: better for code, unusual for prose
    """

    path: str | None = None
    vocab_size: int = 32000
    sample_bytes: int = 32 * 2**20
    scan_bytes: int = 2 * 2**30
    split_by_unicode_script: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size < LEAST_VOCABULARY:
            raise ValueError(f"tokenizer.vocab_size is {self.vocab_size}, expected at least {LEAST_VOCABULARY}")
        for name in ("sample_bytes", "scan_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"tokenizer.{name} is {value}, expected at least 1")


@dataclasses.dataclass
class PrepareConfig:
    """What to prepare, and where.

    Args:
        corpus: reader of the documents
        output: folder of the prepared corpus
        tokenizer: tokenizer to use or to train
        heldout_groups: groups (packages) whose documents are held out; "torch" covers "torch/nn"
        heldout_fraction: share of the documents to hold out, chosen by a hash of their text, when no groups are named
        max_documents: read no more documents than this; None for all
        shard_bytes: text of a group of documents, so at most about this much per shard; a worker holds a few times it
        workers: processes that encode; None takes one per usable core
        overwrite: remove what an earlier run left in the output folder
    """

    corpus: Corpus
    output: str
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    heldout_groups: list[str] = dataclasses.field(default_factory=list)
    heldout_fraction: float = 0.0
    max_documents: int | None = None
    shard_bytes: int = 64 * 2**20
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; name a folder")
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction is {self.heldout_fraction}, expected a number in [0, 1)")
        if self.heldout_groups and self.heldout_fraction:
            raise ValueError("heldout_groups and heldout_fraction are both set; set one of them")
        limits = {"max_documents": 2**62, "shard_bytes": 2**34, "workers": max(64, 4 * (os.cpu_count() or 1))}
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} is {value}, expected at least 1 and at most {most}")


def in_group(group: str, name: str) -> bool:
    return group == name or group.startswith(name + "/")


def is_heldout(config: PrepareConfig, document: Document) -> bool:
    """By group, or by a hash of the text, so that equal documents are on one side."""
    if config.heldout_groups:
        return any(in_group(document.group, name) for name in config.heldout_groups)
    digest = hashlib.blake2b((document.text or "").encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < config.heldout_fraction * 2**64


def read_documents(config: PrepareConfig, skip: int) -> Iterator[Document]:
    stop = None if config.max_documents is None else max(config.max_documents - skip, 0)
    return itertools.islice(config.corpus.documents(skip), stop)


def finished_groups(output: Path) -> dict[int, dict[str, Any]]:
    records = sorted((output / "progress").glob("[0-9]*.json"))
    groups = {int(path.stem): read_record(path, WAY_OUT, GROUP_KEYS) for path in records}
    for path, group in zip(records, groups.values(), strict=True):
        for split, counts in group["splits"].items():
            check_keys(counts, COUNT_KEYS, f"{path}, split {split},", WAY_OUT)
    return groups


def encode_corpus(config: PrepareConfig, output: Path, tokenizer: Tokenizer) -> dict[int, dict[str, Any]]:
    """Encode the groups that are not finished yet. Returns the record of every group."""
    done = finished_groups(output)
    first = next(index for index in range(len(done) + 1) if index not in done)
    skip = done[first - 1]["end"] if first else 0
    if done:
        print(f"continuing {output}: {len(done)} groups of documents are finished")
    documents = read_documents(config, skip)
    groups = read_groups(documents, functools.partial(is_heldout, config), config.shard_bytes, first, skip)
    groups = (group for group in groups if group.index not in done)
    workers = config.workers or len(os.sched_getaffinity(0))
    finished = map_groups(groups, output, tokenizer, workers)
    with tqdm(desc="encoding", unit="B", unit_scale=True) as bar, contextlib.closing(finished):
        for group_index, num_bytes, record in finished:
            done[group_index] = record
            bar.update(num_bytes)
    return done


def make_tokenizer(config: PrepareConfig, output: Path) -> Tokenizer:
    """The corpus's tokenizer: the one an earlier run left, a copy of the configured one, or a new one."""
    path = output / "tokenizer.model"
    settings = config.tokenizer
    if not path.exists() and settings.path is not None:
        write_file(path, Tokenizer(settings.path).path.read_bytes())
    elif not path.exists():
        print(f"training a tokenizer of {settings.vocab_size} pieces", flush=True)
        train_tokenizer(
            training_texts(config),
            settings.vocab_size,
            path,
            sample_bytes=settings.sample_bytes,
            scan_bytes=settings.scan_bytes,
            split_by_unicode_script=settings.split_by_unicode_script,
        )
    return Tokenizer(path)


def training_texts(config: PrepareConfig) -> Iterator[str]:
    """Texts of the training split: held-out text must not shape the vocabulary."""
    with tqdm(desc="sampling text for the tokenizer", unit="B", unit_scale=True, delay=5) as bar:
        for document in read_documents(config, 0):
            if document.text and not is_heldout(config, document):
                bar.update(len(document.text))
                yield document.text


def check_heldout_groups(config: PrepareConfig) -> None:
    known = config.corpus.groups() if config.heldout_groups else set()
    for name in config.heldout_groups:
        if not any(in_group(group, name) for group in known):
            examples = ", ".join(sorted(known)[:5]) or "none"
            raise ValueError(f"heldout_groups names {name!r}, which the corpus does not have (it has: {examples}, ...)")


def describe(config: PrepareConfig, corpus_settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the output: the config but for `output`, `workers` and `overwrite`, and the corpus itself."""
    ignored = ("corpus", "output", "workers", "overwrite")
    decisive = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ignored}
    decisive["tokenizer"] = dataclasses.asdict(config.tokenizer)
    if config.tokenizer.path is not None:  # the model itself counts, not where it lies
        decisive["tokenizer"] = {"fingerprint": Tokenizer(config.tokenizer.path).fingerprint}
    return {"corpus": corpus_settings, "corpus_identity": config.corpus.identity(), **decisive}


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """Key -> "OLD there, NEW now" of what would give other shards."""
    old, new = flatten(stored), flatten(wanted)
    for config in (old, new):  # readers' later options, at what they did before there were such
        config.setdefault("corpus.init_args.missing_text", "error")
        config.pop("corpus.init_args.hidden", None)  # which files there are is in the identity
    for key in ("corpus.init_args.missing_text", "corpus.init_args.undecodable"):
        if old.get(key) == "error":  # nothing has been left out so far, whatever happens now
            new[key] = "error"
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return {key: f"{old.get(key)!r} there, {new.get(key)!r} now" for key in differing}


def refuse_other_config(differing: dict[str, str], output: Path) -> None:
    """Raises ValueError where anything differs."""
    if differing:
        changes = "; ".join(f"{key}: {change}" for key, change in differing.items())
        raise ValueError(f"{output} was prepared with another config ({changes}); {WAY_OUT}")


def check_unfinished(config: PrepareConfig, stored: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Raises ValueError unless a run of `wanted` may continue what one of `stored` began: nothing but its settings, or
    documents that are the same still; those that come later may have been mended."""
    made = (output / "tokenizer.model").exists() or any((output / split).exists() for split in SPLITS)
    if not made and stored != UNFINISHED_OVERWRITE:
        return
    differing = differences(stored, wanted)
    if differing.keys() - {"corpus_identity"}:
        refuse_other_config(differing, output)
    if differing and (done := finished_groups(output)):
        print(f"the corpus has changed; comparing the documents that {output} has already", flush=True)
        last = max(done)
        holds_out = functools.partial(is_heldout, config)
        found = {}
        for group in read_groups(read_documents(config, 0), holds_out, config.shard_bytes, 0, 0):
            found[group.index] = group.digest
            if group.index >= last:
                break
        if any(found.get(index) != record.get("digest", "none") for index, record in done.items()):
            refuse_other_config(differing, output)


def remove_earlier_run(output: Path) -> None:
    """Remove what a run wrote. Killed on the way, it leaves a config that no run accepts without --overwrite."""
    config_file = output / "progress" / "config.json"
    if not config_file.exists() and not (output / "manifest.json").exists():
        return
    written = {".lock", "progress", "manifest.json", "tokenizer.model", *SPLITS}
    foreign = sorted(path.name for path in output.iterdir() if path.name not in written and path.suffix != ".tmp")
    if foreign:
        raise ValueError(
            f"{output} holds {', '.join(foreign[:3])}, which data.prepare did not write: move that away, or choose "
            "another --output; nothing is removed"
        )
    config_file.parent.mkdir(exist_ok=True)
    write_json(config_file, {"format": FORMAT, "config": UNFINISHED_OVERWRITE}, sort_keys=True)
    for path in (output / "manifest.json", output / "tokenizer.model", *output.glob("*.tmp")):
        path.unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    shutil.rmtree(config_file.parent)


def write_manifest(
    output: Path, tokenizer: Tokenizer, config: dict[str, Any], groups: dict[int, dict[str, Any]]
) -> None:
    splits: dict[str, Any] = {}
    for split in SPLITS:
        counts = {index: groups[index]["splits"][split] for index in sorted(groups) if split in groups[index]["splits"]}
        splits[split] = {key: sum(c[key] for c in counts.values()) for key in ("documents", "tokens", "bytes")}
        splits[split]["shards"] = [shard_name(index) for index in counts]
    if not splits["train"]["documents"]:
        raise ValueError(f"the training split of {output} would be empty; give more text or hold out less")
    manifest = {"format": FORMAT, "config": config, "splits": splits}
    manifest |= {"tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    manifest["undecodable_documents"] = sum(record["undecodable"] for record in groups.values())
    manifest["documents_without_text"] = sum(record.get("missing", 0) for record in groups.values())
    write_json(output / "manifest.json", manifest, sort_keys=True)


def summary(output: Path) -> str:
    manifest = read_manifest(output, WAY_OUT)
    parts = [
        f"{split} {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes"
        for split, counts in manifest["splits"].items()
    ]
    for count, why in (("undecodable_documents", "that are not UTF-8"), ("documents_without_text", "without text")):
        parts += [f"left out {manifest[count]:,} documents {why}"] * bool(manifest.get(count))
    return "; ".join(parts)


def prepare(config: PrepareConfig, corpus_settings: dict[str, Any]) -> None:
    """Prepare the corpus in `config.output`, or find it done. corpus_settings: the corpus part of the config as data.

    Raises ValueError when the folder holds something else: a corpus of another config, or foreign files.
    """
    output = Path(config.output)
    taken = f"another run is preparing {output}; wait for it or choose another --output"
    with folder_lock(output, taken):
        wanted = describe(config, corpus_settings)
        progress = output / "progress"
        config_file = progress / "config.json"
        if config.overwrite:
            remove_earlier_run(output)
        if (output / "manifest.json").exists():
            stored = read_record(output / "manifest.json", WAY_OUT, {"config": dict})["config"]
            refuse_other_config(differences(stored, wanted), output)
            shutil.rmtree(progress, ignore_errors=True)  # left when a run was killed after its manifest
            print(f"{output} is already prepared: {summary(output)}")
            return
        if config_file.exists():
            check_unfinished(config, read_record(config_file, WAY_OUT, {"config": dict})["config"], wanted, output)
        elif any(path.name not in (".lock", "progress") for path in output.iterdir()):
            raise ValueError(f"{output} holds files of something else; choose another --output")
        check_heldout_groups(config)
        progress.mkdir(exist_ok=True)
        write_json(config_file, {"format": FORMAT, "config": wanted}, sort_keys=True)
        tokenizer = make_tokenizer(config, output)
        groups = encode_corpus(config, output, tokenizer)
        write_manifest(output, tokenizer, wanted, groups)
        for leftover in (*output.glob("*.tmp"), *output.glob("*/*.tmp")):  # of a killed run
            leftover.unlink()
        shutil.rmtree(progress)
        print(f"prepared {output}: {summary(output)}")


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m data.prepare", description="Prepare a corpus as token shards.")
    parser.add_argument("--config", action="config", help="YAML file, e.g. configs/data/prepare_stdlib.yaml")
    parser.add_class_arguments(PrepareConfig)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    settings = parser.parse_args(arguments)
    corpus_settings = settings.corpus.as_dict()
    config = PrepareConfig(**{k: v for k, v in parser.instantiate(settings).items() if k != "config"})
    prepare(config, corpus_settings)


if __name__ == "__main__":
    with user_errors(RuntimeError, stopped="stopped by Ctrl-C; the same command continues"):
        main()
