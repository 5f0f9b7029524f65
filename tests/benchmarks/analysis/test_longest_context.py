"""The longest context by number of GPUs."""

import pytest

from benchmarks.analysis.longest_context import LENGTHS, MOST, cell, longest, main
from benchmarks.train_speed import network
from tests.training.conftest import ROOT
from training.throughput import GIB


def test_lengths_are_the_longest_that_fit() -> None:
    config = network("30m", "asentmax")
    found = {gpus: longest(config, gpus, 6 * GIB) for gpus in (1, 4)}
    alone, shared = found[1].tokens, found[4].tokens
    assert alone is not None and shared is not None and LENGTHS[0] < alone < shared <= 4 * 1.5 * alone
    assert found[1].gib <= 6 and found[4].gib <= 6
    less = longest(config, 1, 3 * GIB).tokens
    assert less is not None and alone / 4 <= less < alone
    assert longest(config, 1, 0.1 * GIB).tokens is None and cell(longest(config, 1, 0.1 * GIB)) == "-"
    assert cell(longest(config, 8, 500 * GIB)).startswith(f"at least {MOST:,} (stage 1")


def test_the_page_has_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["longest_context", "--models", "1b", "--gpus", "1", "8"])
    assert main() == 0
    page = (ROOT / "docs" / "many_gpus.md").read_text()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 and all(f"{row.removesuffix(' |')} | " in page for row in rows)


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"--gpus 3": "--gpus has 3: expected powers of two", "--gib 3": "--gib is 3.0 and --reserve 5.0"}
    for options, said in {**wrong, "--gib nan": "--gib is nan"}.items():
        monkeypatch.setattr("sys.argv", ["longest_context", *options.split()])
        with pytest.raises(ValueError, match=said):
            main()
