"""Preparing: the same bytes whatever happens on the way, refusals, and every corpus YAML."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data import encoding
from data.corpora import Document
from data.encoding import read_groups
from data.prepare import main
from data.store import TokenStore
from data.tokenizer import Tokenizer
from tests.data.conftest import contents

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "data"
PrepareTexts = Callable[..., Path]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_workers_and_output_folder_do_not_change_a_byte(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    again = prepare_texts(tmp_path / "again", "--heldout_fraction=0.2", "--workers=2")
    assert contents(again) == contents(prepared)
    assert len(list((again / "train").glob("*.bin"))) > 2
    assert not (again / "progress").exists()


def test_a_run_that_is_interrupted_after_any_group_continues_to_the_same_bytes(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json = encoding.write_json
    written: list[str] = []

    def fail_after_one(path: Path, record: Any, **options: Any) -> None:
        if written:
            raise KeyboardInterrupt
        write_json(path, record, **options)
        written.append(path.name)

    output = tmp_path / "interrupted"
    monkeypatch.setattr(encoding, "write_json", fail_after_one)
    order: list[str] = []
    for _ in range(20):
        try:
            prepare_texts(output, "--heldout_fraction=0.2")
            break
        except KeyboardInterrupt:
            with pytest.raises(FileNotFoundError, match="manifest.json does not exist"):
                TokenStore(output / "train")
        order += written
        written.clear()
    assert len(order) > 2 and order == sorted(set(order))  # each run did one group, none was done twice
    assert contents(output) == contents(prepared)


@pytest.mark.parametrize("delay", [0.0, 0.25])
def test_a_killed_run_continues_to_the_same_bytes(prepared: Path, texts: Path, tmp_path: Path, delay: float) -> None:
    output = tmp_path / "killed"
    arguments = ["--corpus=data.corpora.TextFiles", f"--corpus.paths=[{texts}]", f"--output={output}", "--workers=2"]
    arguments += ["--tokenizer.vocab_size=400", "--shard_bytes=40000", "--heldout_fraction=0.2"]
    process = subprocess.Popen([sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(output.glob("tokenizer.model*")) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (output / "manifest.json").exists()
    assert run(*arguments).returncode == 0
    assert contents(output) == contents(prepared)


def test_a_shard_is_finished_only_with_its_record(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "write_json", fail)
        prepare_texts(output, "--heldout_fraction=0.2")
    shard = output / "train" / "000000.bin"
    assert shard.exists()
    shard.write_bytes(b"half")
    (output / "train" / "000000.bin.1.tmp").write_bytes(b"left behind")
    prepare_texts(output, "--heldout_fraction=0.2")
    assert contents(output) == contents(prepared)


def test_a_second_run_says_that_it_is_done_within_two_seconds_of_work(prepared: Path, texts: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")}
    arguments = ["--corpus=data.corpora.TextFiles", f"--corpus.paths=[{texts}]", f"--output={prepared}"]
    arguments += ["--tokenizer.vocab_size=400", "--shard_bytes=40000", "--heldout_fraction=0.2"]
    start = os.times()
    result = run(*arguments)
    end = os.times()
    assert "is already prepared: heldout" in result.stdout and result.returncode == 0
    assert end.children_user + end.children_system - start.children_user - start.children_system < 2
    assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")}


def test_a_changed_config_is_refused_and_named(prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        prepare_texts(prepared, "--heldout_fraction=0.3", "--tokenizer.sample_bytes=1000")
    assert "heldout_fraction: 0.2 there, 0.3 now" in str(error.value)
    assert "tokenizer.sample_bytes: 33554432 there, 1000 now" in str(error.value)
    assert "choose another --output, or start over with --overwrite true" in str(error.value)


def test_a_changed_corpus_is_refused_and_overwrite_starts_over(tmp_path: Path) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    (corpus / "a.txt").write_text("some words of text\n" * 100)
    arguments = ["--corpus=data.corpora.TextFiles", f"--corpus.paths=[{corpus}]", f"--output={output}", "--workers=1"]
    arguments += ["--tokenizer.vocab_size=370"]
    main(arguments)
    (corpus / "b.txt").write_text("more words\n")
    with pytest.raises(ValueError, match="corpus_identity: .* there, .* now"):
        main(arguments)
    main([*arguments, "--overwrite=true"])
    assert TokenStore(output / "train").num_documents == 2


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))


@pytest.fixture
def lines(prepared: Path, tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A file of JSON lines, its lines, and the options that prepare it in groups of about 10 lines."""
    good = [json.dumps({"text": f"document {number} " + "abc " * 50}) for number in range(60)]
    path = tmp_path / "a.jsonl"
    options = ["--corpus=data.corpora.JsonLines", f"--corpus.paths=[{path}]", "--workers=1", "--shard_bytes=2000"]
    return path, good, [*options, f"--tokenizer.path={prepared / 'tokenizer.model'}"]


def test_a_mended_line_continues_to_the_bytes_of_a_run_without_it(
    lines: tuple[Path, list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good, options = lines
    stopped, whole = [*options, f"--output={tmp_path / 'stopped'}"], [*options, f"--output={tmp_path / 'whole'}"]
    write_lines(path, [*good[:40], '{"text": ', *good[41:]])
    with pytest.raises(ValueError, match="a.jsonl:41 is not JSON"):
        main(stopped)
    finished = list((tmp_path / "stopped" / "progress").glob("[0-9]*.json"))
    assert len(finished) > 2
    write_lines(path, good)
    main(stopped)
    assert f"continuing {tmp_path / 'stopped'}: {len(finished)} groups" in capsys.readouterr().out
    main(whole)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_change_in_what_is_finished_is_refused(lines: tuple[Path, list[str], list[str]], tmp_path: Path) -> None:
    path, good, options = lines
    write_lines(path, [*good[:40], "{"])
    with pytest.raises(ValueError, match="a.jsonl:41 is not JSON"):
        main([*options, f"--output={tmp_path / 'out'}"])
    write_lines(path, ['{"text": "another"}', *good[1:]])
    with pytest.raises(ValueError, match="corpus_identity: .* there, .* now"):
        main([*options, f"--output={tmp_path / 'out'}"])


def test_leaving_out_records_without_text_continues_and_counts_them(
    lines: tuple[Path, list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good, options = lines
    options = [*options, f"--output={tmp_path / 'out'}"]
    write_lines(path, [*good[:40], '{"text": null}', *good[41:], '{"text": null}'])
    with pytest.raises(ValueError, match="a.jsonl:41: field 'text' is null, .* set corpus.missing_text: skip"):
        main(options)
    main([*options, "--corpus.missing_text=skip"])
    out = capsys.readouterr().out
    assert "groups of documents are finished" in out and "left out 2 documents without text" in out
    assert TokenStore(tmp_path / "out" / "train").num_documents == 59
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["documents_without_text"] == 2
    with pytest.raises(ValueError, match="missing_text: 'skip' there, 'error' now"):
        main(options)


def test_a_corpus_prepared_before_readers_had_these_options_is_still_the_same(
    prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    output = prepare_texts(tmp_path / "out")
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["config"]["corpus"]["init_args"]["hidden"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    before = contents(output)
    prepare_texts(output)
    assert contents(output) == before


def test_settings_that_made_nothing_yet_can_be_mended(prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 99999 is too large"):
        prepare_texts(tmp_path / "out", "--tokenizer.vocab_size=99999")
    prepare_texts(tmp_path / "out")


def test_a_tokenizer_that_changes_text_is_refused_before_anything_is_encoded(
    prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of text"] * 50), model_prefix=str(tmp_path / "foreign"), vocab_size=290,
        byte_fallback=True, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="foreign.model changes text: 'def f.* comes back as ' def f"):
        prepare_texts(tmp_path / "out", f"--tokenizer.path={tmp_path / 'foreign.model'}")
    assert not (tmp_path / "out" / "train").exists()


def any_process_of_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_with_one_line_and_leaves_no_worker(prepared: Path, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    write_lines(lines, [json.dumps({"text": f"document {number}"}) for number in range(1500)])
    arguments = ["--corpus=data.corpora.JsonLines", f"--corpus.paths=[{lines}]", f"--output={tmp_path / 'out'}"]
    arguments += [f"--tokenizer.path={prepared / 'tokenizer.model'}", "--workers=2", "--shard_bytes=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list((tmp_path / "out" / "progress").glob("[0-9]*.json")) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "stopped by Ctrl-C; the same command continues"
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 30  # multiprocessing's own helper ends a moment later
    while time.monotonic() < deadline and any_process_of_group(process.pid):
        time.sleep(0.05)
    assert not any_process_of_group(process.pid)


def test_a_run_killed_behind_its_manifest_is_done(prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    output = prepare_texts(tmp_path / "out")
    before = contents(output)
    (output / "progress").mkdir()
    (output / "progress" / "000000.json").write_text("{}")
    prepare_texts(output)
    assert contents(output) == before


def test_foreign_files_are_never_touched(prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("precious")
    for options in ([], ["--overwrite=true"]):
        with pytest.raises(ValueError, match="holds files of something else"):
            prepare_texts(tmp_path, *options)
    assert (tmp_path / "train" / "mine.txt").exists()


def test_two_runs_do_not_share_a_folder(prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    code = (
        f"import common.locks as c, pathlib\nwith c.folder_lock(pathlib.Path({str(tmp_path)!r}), ''): print(1); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline()
    with pytest.raises(ValueError, match="another run is preparing"):
        prepare_texts(tmp_path)
    holder.communicate(b"\n")
    prepare_texts(tmp_path)


def test_groups_hold_bounded_text_and_are_read_as_they_are_needed() -> None:
    read = []

    def documents() -> object:
        for number in range(1000):
            read.append(number)
            yield Document(None if number % 10 == 0 else "x" * 100)

    groups = read_groups(documents(), lambda _: False, shard_bytes=1000, first=0, skip=0)  # type: ignore[arg-type]
    group = next(groups)
    assert group.num_bytes == 1000 and len(read) == group.end == 12 and group.undecodable == 2
    assert sum(len(g.texts["train"]) for g in groups) + 10 == 900


def test_heldout_documents_are_chosen_by_their_text(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    counts = json.loads((prepared / "manifest.json").read_text())["splits"]
    assert 0.05 < counts["heldout"]["documents"] / 60 < 0.4
    other = prepare_texts(tmp_path / "b", "--heldout_fraction=0.2", "--shard_bytes=7000", "--max_documents=30")
    tokenizers = [Tokenizer(folder / "tokenizer.model") for folder in (prepared, other)]

    def heldout_texts(folder: Path, tokenizer: Tokenizer) -> set[str]:
        store = TokenStore(folder / "heldout")
        return {tokenizer.decode(store.document(i).tolist()) for i in range(store.num_documents)}

    many, few = heldout_texts(prepared, tokenizers[0]), heldout_texts(other, tokenizers[1])
    assert few < many and {text for text in many if int(text.split()[1]) < 30} == few


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heldout_fraction=1.5"], r"heldout_fraction is 1.5, expected a number in \[0, 1\)"),
        (["--heldout_fraction=0.1", "--heldout_groups=[a]"], "both set"),
        (["--heldout_groups=[asyncioo]"], "names 'asyncioo', but the documents of TextFiles are in no groups"),
        (["--workers=0"], "workers is 0, expected at least 1"),
        (["--workers=100000"], "workers is 100000, expected at least 1 and at most"),
        (["--heldout_fraction=.nan"], "heldout_fraction is nan, expected a number in"),
        (["--shard_bytes=-1"], "shard_bytes is -1, expected at least 1"),
        (["--tokenizer.vocab_size=3"], "tokenizer.vocab_size is 3, expected at least 260"),
        (["--tokenizer.scan_bytes=0"], "tokenizer.scan_bytes is 0, expected at least 1"),
        (["--output="], "output is empty"),
        (["--tokenizer.sample_bytes=1"], "tokenizer.sample_bytes is 1, .* expected at least 16384"),
        (["--tokenizer.vocab_size=99999"], "vocab_size 99999 is too large for a sample of"),
        (["--tokenizer.path=/nowhere/t.model"], "tokenizer.path is /nowhere/t.model, which does not exist"),
        (["--corpus.paths=[/nowhere/*.txt]"], "no file matches corpus path '/nowhere/"),
        (["--max_documents=1", "--heldout_fraction=0.999999"], "training split"),
    ],
)
def test_bad_settings_are_named(prepare_texts: PrepareTexts, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_texts(tmp_path / "out", *options)
    assert "training split" in message or not list(tmp_path.iterdir()), "nothing is left of what is refused"


def test_the_command_line_ends_with_one_error_line(tmp_path: Path) -> None:
    result = run("--corpus=data.corpora.TextFiles", "--corpus.paths=[/nowhere]", f"--output={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: no file matches corpus path '/nowhere'; expected a file, a folder or a glob pattern"
    ]
    result = run("--config", str(CONFIGS / "prepare_stdlib.yaml"), "--shard_bites=3")
    assert result.returncode == 2 and "shard_bites" in result.stderr


def test_stdlib_yaml_holds_out_packages_with_long_documents(tmp_path: Path) -> None:
    output = tmp_path / "stdlib"
    main([f"--config={CONFIGS / 'prepare_stdlib.yaml'}", f"--output={output}", "--workers=1"])
    train, heldout = TokenStore(output / "train"), TokenStore(output / "heldout")
    assert heldout.vocab_size == 4096
    assert 0.07 < heldout.num_bytes.sum() / (train.num_bytes.sum() + heldout.num_bytes.sum()) < 0.11
    assert (heldout.lengths >= 4096).sum() >= 10 and (heldout.lengths > 8192).sum() >= 5
    assert train.num_bytes.sum() / train.num_tokens > 3.3


def test_source_tree_yaml_with_one_package(tmp_path: Path) -> None:
    settings = ["--corpus.packages=[networkx]", "--corpus.exclude=[tests, algorithms]"]
    settings += ["--heldout_groups=[networkx/drawing]", "--tokenizer.vocab_size=1000", "--workers=1"]
    main([f"--config={CONFIGS / 'prepare_source_tree.yaml'}", f"--output={tmp_path / 'tree'}", *settings])
    assert TokenStore(tmp_path / "tree" / "heldout").num_documents > 2


def test_linux_yaml_on_a_stand_in(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((CONFIGS / "prepare_linux.yaml").read_text())
    by_name = {Path(path).name: path for path in config["corpus"]["init_args"]["paths"]}
    groups = ["/".join((by_name[group.split("/")[0]], group.split("/")[1])) for group in config["heldout_groups"]]
    for folder in [*groups, *(f"{path}/other" for path in by_name.values())]:
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.c", "b.h", "Makefile"):
            (tmp_path / folder / name).write_text(f"/* {folder} {name} */\nint x;\n")
    monkeypatch.chdir(tmp_path)
    settings = [f"--tokenizer.path={prepared / 'tokenizer.model'}", "--output=out", "--workers=1"]
    main([f"--config={CONFIGS / 'prepare_linux.yaml'}", *settings])
    tokenizer, heldout = Tokenizer(tmp_path / "out" / "tokenizer.model"), TokenStore(tmp_path / "out" / "heldout")
    texts = {tokenizer.decode(heldout.document(i).tolist()) for i in range(heldout.num_documents)}
    assert texts == {"".join(f"/* {one} {name} */\nint x;\n" for name in ("a.c", "b.h")) for one in groups}
    assert TokenStore(tmp_path / "out" / "train").num_documents == len(by_name)


def write_hub_folder(folder: Path, file_name: str, rows: list[dict[str, object]], config: str) -> None:
    """A folder that datasets.load_dataset reads like a hub repository."""
    import pyarrow
    import pyarrow.parquet

    path = folder / file_name
    path.parent.mkdir(parents=True)
    if file_name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {file_name}\n---\n"
    )


FINEWEB_ROW: dict[str, object] = {"text": "", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2024-10"}
FINEWEB_ROW |= {"url": "https://a.example", "file_path": "s3://x"}
FINEWEB_ROW |= {"language": "en", "language_score": 0.9, "token_count": 100, "score": 3.1, "int_score": 3}
DCLM_ROW: dict[str, object] = {"text": "", "language_id_whole_page_fasttext": {"en": 0.9}}
DCLM_ROW |= {"bff_contained_ngram_count_before_dedupe": 0}
DCLM_ROW |= {"metadata": {"Content-Length": "5"}, "previous_word_count": 5, "url": "https://a.example", "warcinfo": "w"}
DCLM_ROW |= {"fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.1}


@pytest.mark.parametrize(
    ("name", "file_name", "config", "row"),
    [
        ("fineweb_edu", "sample/10BT/000.parquet", "sample-10BT", FINEWEB_ROW),
        ("dclm", "global-shard_01/shard_0.jsonl", "default", DCLM_ROW),
    ],
)
def test_hub_yamls_on_a_stand_in_of_the_same_schema(
    prepared: Path, tmp_path: Path, name: str, file_name: str, config: str, row: dict[str, object]
) -> None:
    texts = [f"web page {i}: \u2581 naïve\r\n" + "word " * i for i in range(1, 40)]
    write_hub_folder(tmp_path / "hub", file_name, [row | {"text": text} for text in texts], config)
    settings = [f"--config={CONFIGS / f'prepare_{name}.yaml'}", f"--corpus.path={tmp_path / 'hub'}", "--workers=1"]
    settings += [f"--tokenizer.path={prepared / 'tokenizer.model'}", "--shard_bytes=500", "--max_documents=30"]
    main([*settings, f"--output={tmp_path / 'out'}", "--heldout_fraction=0.1"])
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.model")
    stores = [TokenStore(tmp_path / "out" / split) for split in ("train", "heldout")]
    found = {tokenizer.decode(store.document(i).tolist()) for store in stores for i in range(store.num_documents)}
    assert found == set(texts[:30])
    assert stores[0].fingerprint_of_tokenizer == TokenStore(prepared / "train").fingerprint_of_tokenizer
    text = (CONFIGS / f"prepare_{name}.yaml").read_text()
    assert re.search(r"path: (HuggingFaceFW/fineweb-edu|mlfoundations/dclm-baseline-1.0)\n", text)
