"""Corpora that were mended after a run had stopped at a bad record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.prepare import main
from data.store import TokenStore
from tests.data.conftest import contents, write_lines


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
