"""--overwrite: the old corpus stays until the new one is complete, however a run ends."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data import encoding
from data.store import TokenStore
from tests.data.conftest import PrepareTexts, contents
from tests.hub_tokenizers import END, byte_level, save


def stop_after(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once a run has finished so many groups."""
    write_json, left = encoding.write_json, [groups]

    def write_or_stop(path: Path, record: Any, **options: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write_json(path, record, **options)

    monkeypatch.setattr(encoding, "write_json", write_or_stop)


def test_an_overwrite_that_is_stopped_keeps_the_old_corpus_and_continues(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = prepare_texts(tmp_path / "out")
    before = contents(output)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        prepare_texts(output, "--heldout_fraction=0.2", "--overwrite=true")
    assert {name: content for name, content in contents(output).items() if not name.startswith(".repl")} == before
    assert TokenStore(output / "train").num_documents == 60
    prepare_texts(output)  # the old one is still what it was
    assert ".replacement is what --overwrite has not finished" in capsys.readouterr().out
    prepare_texts(output, "--heldout_fraction=0.2", "--overwrite=true")
    out = capsys.readouterr().out
    assert f"{output} stays as it is until {output / '.replacement'} is complete" in out
    assert f"continuing {output / '.replacement'}: 2 groups of documents are finished" in out
    assert contents(output) == contents(prepared)


def test_an_overwrite_of_other_settings_starts_anew(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = prepare_texts(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        prepare_texts(output, "--tokenizer.vocab_size=390", "--overwrite=true")
    prepare_texts(output, "--heldout_fraction=0.2", "--overwrite=true")
    assert contents(output) == contents(prepared)


def test_an_overwrite_that_is_refused_changes_nothing(prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    output = prepare_texts(tmp_path / "out")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes(b"\xff")
    before = contents(output)
    for options in (
        [f"--corpus.paths=[{tmp_path / 'latin'}]"],
        ["--corpus.paths=[/nowhere]"],
        ["--tokenizer.vocab_size=99999"],
        ["--heldout_groups=[nope]"],
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            prepare_texts(output, "--overwrite=true", *options)
        assert contents(output) == before and not (output / ".replacement").exists(), options


def kill_before(step: int, run: Callable[[], object], output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until a corpus takes the place of the one in `output`, and stops before the rename or removal `step`."""
    done = [0]

    def stopped(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*given: Any, **options: Any) -> Any:
            if ".replacement" in str(given[0]) or Path(given[0]).parent == output:
                if done[0] == step:
                    raise KeyboardInterrupt
                done[0] += not (output / ".replacement" / "progress").exists()
            return call(*given, **options)

        return instead

    with monkeypatch.context() as patch:
        for place, name in ((shutil, "rmtree"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(place, name, stopped(getattr(place, name)))
        with suppress(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("step", range(9))
def test_a_run_killed_while_a_corpus_takes_the_place_of_another_is_ended(
    step: int, prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each rename and removal; the documents held out differ, in one direction not any is."""
    output = prepare_texts(tmp_path / "out", *["--heldout_fraction=0.3"] * (step % 2))
    options = ["--heldout_fraction=0.2", "--overwrite=true"]
    kill_before(step, lambda: prepare_texts(output, *options), output, monkeypatch)
    prepare_texts(output, *options)
    assert contents(output) == contents(prepared)


@pytest.mark.parametrize("step", range(9))
def test_a_run_killed_while_the_kind_of_tokenizer_changes_is_ended(
    step: int, prepare_texts: PrepareTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = save(tmp_path / "hub", byte_level([END]), bos_token=END, eos_token=END)
    options = [f"--tokenizer.path={hub}", "--overwrite=true"]
    wanted = contents(prepare_texts(tmp_path / "wanted", *options))
    output = prepare_texts(tmp_path / "out")
    kill_before(step, lambda: prepare_texts(output, *options), output, monkeypatch)
    prepare_texts(output, *options)
    assert contents(output) == wanted


def test_overwrite_removes_nothing_beside_files_of_somebody_else(prepare_texts: PrepareTexts, tmp_path: Path) -> None:
    output = prepare_texts(tmp_path / "out")
    (output / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds notes.txt, which data.prepare did not write.*nothing is removed"):
        prepare_texts(output, "--overwrite=true")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
