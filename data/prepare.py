"""Turn a corpus into token shards: python -m data.prepare --config configs/data/prepare_stdlib.yaml

The corpus is read once, in order, in groups of documents of bounded size; each group is encoded by one of the worker
processes and gives at most one shard per split. A group is finished when its record in OUTPUT/progress exists, which is
written after its shards. A run that was killed continues behind the finished groups and ends with the same bytes as an
undisturbed one. The manifest comes last; a corpus without it is unfinished.
"""

from __future__ import annotations

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.command_line import CommandParser
from common.errors import user_errors, without_debug
from common.files import check_keys, write_json
from common.locks import LOCK, folder_lock
from common.nested import flatten
from common.outputs import check_writable
from data.encoding import map_groups, read_groups, shard_name
from data.prepare_settings import PrepareConfig, TokenizerConfig, check_heldout_groups, is_heldout, read_documents
from data.replacement import (
    MANIFEST,
    NEXT,
    PROGRESS,
    TEMPORARY,
    check_replaceable,
    has_earlier_run,
    move_into_place,
)
from data.store import COUNT_KEYS, FORMAT, SPLITS, read_manifest, read_record
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizers.copying import copy_tokenizer, digests
from data.tokenizers.special_tokens import SETTINGS, TOKENIZER_FILES
from data.tokenizers.training import train_tokenizer

GROUP_KEYS = {"end": int, "undecodable": int, "splits": dict}
WAY_OUT = "choose another --output, or start over with --overwrite true"


def finished_groups(output: Path) -> dict[int, dict[str, Any]]:
    records = sorted((output / PROGRESS).glob("[0-9]*.json"))
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
    settings = config.tokenizer
    if any((output / name).exists() for name in TOKENIZER_FILES):
        return load_tokenizer(output)
    (output / SETTINGS).unlink(missing_ok=True)  # of a run that was killed between it and its tokenizer
    if settings.path is not None:
        copy_tokenizer(configured_tokenizer(settings), output)
    else:
        path = output / "tokenizer.model"
        print(f"training a tokenizer of {settings.vocab_size} pieces", flush=True)
        train_tokenizer(
            training_texts(config),
            settings.vocab_size,
            path,
            sample_bytes=settings.sample_bytes,
            scan_bytes=settings.scan_bytes,
            split_by_unicode_script=settings.split_by_unicode_script,
        )
    return load_tokenizer(output)


def configured_tokenizer(settings: TokenizerConfig) -> Tokenizer:
    """The tokenizer of tokenizer.path, which is not None. Raises as load_tokenizer."""
    assert settings.path is not None
    # Without tokenizer.lossy what stands beside it counts: another corpus's tokenizer has been allowed there
    return load_tokenizer(settings.path, bos=settings.bos, eos=settings.eos, lossy=settings.lossy or None)


def training_texts(config: PrepareConfig) -> Iterator[str]:
    """Texts of the training split: held-out text must not shape the vocabulary."""
    with tqdm(desc="sampling text for the tokenizer", unit="B", unit_scale=True, delay=5) as bar:
        for document in read_documents(config, 0):
            if document.text and not is_heldout(config, document):
                bar.update(len(document.text))
                yield document.text


def describe(config: PrepareConfig, corpus_settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the output: the config but for `output`, `workers` and `overwrite`, and the corpus itself."""
    ignored = ("corpus", "output", "workers", "overwrite")
    decisive = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ignored}
    of_existing = ("bos", "eos", "lossy")
    decisive["tokenizer"] = {k: v for k, v in dataclasses.asdict(config.tokenizer).items() if k not in of_existing}
    if config.tokenizer.path is not None:  # what it encodes counts, not where it lies
        tokenizer = configured_tokenizer(config.tokenizer)
        decisive["tokenizer"] = {"fingerprint": tokenizer.fingerprint} | ({"lossy": True} if tokenizer.lossy else {})
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
    if not has_begun(output):
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
    manifest["tokenizer_files"] = digests(output)
    manifest["undecodable_documents"] = sum(record["undecodable"] for record in groups.values())
    manifest["documents_without_text"] = sum(record.get("missing", 0) for record in groups.values())
    write_json(output / MANIFEST, manifest, sort_keys=True)


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
    check_writable(output)
    taken = f"another run is preparing {output}; wait for it or choose another --output"
    with folder_lock(output, taken):
        replaced = move_into_place(output, WAY_OUT)  # where an earlier run was killed at it
        wanted = describe(config, corpus_settings)
        if (replaced or not config.overwrite) and (output / MANIFEST).exists():
            stored = read_record(output / MANIFEST, WAY_OUT, {"config": dict})["config"]
            differing = differences(stored, wanted)
            if not config.overwrite:
                refuse_other_config(differing, output)
            if not differing:
                shutil.rmtree(output / PROGRESS, ignore_errors=True)  # left when a run was killed after its manifest
                unfinished = f"; {output / NEXT} is what --overwrite has not finished" * (output / NEXT).exists()
                print(f"{output} is already prepared: {summary(output)}{unfinished}")
                return
        if config.overwrite and has_earlier_run(output):
            replace(output, config, wanted)
        else:
            prepare_in(output, config, wanted)
        print(f"prepared {output}: {summary(output)}")


def replace(output: Path, config: PrepareConfig, wanted: dict[str, Any]) -> None:
    """Prepare a corpus aside, or go on with what an earlier --overwrite has begun, and put it into the place of the
    earlier one."""
    check_replaceable(output)
    new = output / NEXT
    if new.exists():
        check_replaceable(new)
        try:
            stored = read_record(new / PROGRESS / "config.json", WAY_OUT, {"config": dict})["config"]
            check_unfinished(config, stored, wanted, new)
        except (ValueError, FileNotFoundError):  # of other settings, or damaged
            shutil.rmtree(new)
    print(f"{output} stays as it is until {new} is complete: both take room meanwhile", flush=True)
    prepare_in(new, config, wanted)
    move_into_place(output, WAY_OUT)


def prepare_in(folder: Path, config: PrepareConfig, wanted: dict[str, Any]) -> None:
    """Prepare the corpus in a folder that may hold what an earlier run of it has finished. Where nothing of it comes
    to be, nothing is left."""
    progress = folder / PROGRESS
    config_file = progress / "config.json"
    if config_file.exists():
        check_unfinished(config, read_record(config_file, WAY_OUT, {"config": dict})["config"], wanted, folder)
    elif folder.exists() and any(path.name not in (LOCK, PROGRESS) for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files of something else; choose another --output")
    check_heldout_groups(config)
    progress.mkdir(parents=True, exist_ok=True)
    try:
        write_json(config_file, {"format": FORMAT, "config": wanted}, sort_keys=True)
        tokenizer = make_tokenizer(config, folder)
        groups = encode_corpus(config, folder, tokenizer)
    except BaseException:
        if not has_begun(folder):
            shutil.rmtree(progress, ignore_errors=True)
            (folder / SETTINGS).unlink(missing_ok=True)  # where its tokenizer could not be written
            with contextlib.suppress(OSError):
                folder.rmdir()  # not OUTPUT, which has its lock
        raise
    write_manifest(folder, tokenizer, wanted, groups)
    for leftover in (*folder.glob(TEMPORARY), *folder.glob(f"*/{TEMPORARY}")):  # of a killed run
        leftover.unlink()
    shutil.rmtree(progress)


def has_begun(folder: Path) -> bool:
    """Whether something is there that took work, or may be what is left of it."""
    records = (folder / PROGRESS).glob("[0-9]*.json")
    return any(records) or any((folder / name).exists() for name in (*TOKENIZER_FILES, *SPLITS))


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m data.prepare", description="Prepare a corpus as token shards.")
    parser.add_argument("--config", action="config", help="YAML file, e.g. configs/data/prepare_stdlib.yaml")
    parser.add_class_arguments(PrepareConfig)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    settings = parser.parse_args(without_debug(sys.argv[1:] if arguments is None else arguments))
    corpus_settings = settings.corpus.as_dict()
    config = PrepareConfig(**{k: v for k, v in parser.instantiate(settings).items() if k != "config"})
    prepare(config, corpus_settings)


if __name__ == "__main__":
    with user_errors(RuntimeError, stopped="stopped by Ctrl-C; the same command continues"):
        main()
