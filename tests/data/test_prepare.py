"""Preparing: the same bytes whatever happens on the way, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data import encoding
from data.corpora import Document
from data.encoding import read_groups
from data.prepare import main
from data.store import TokenStore
from data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import PrepareTexts, contents, write_lines

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "data"


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
    tokenizers = [load_tokenizer(folder / "tokenizer.model") for folder in (prepared, other)]

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
