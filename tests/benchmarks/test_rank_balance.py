"""benchmarks.analysis.rank_balance: what it packs and prints."""

import numpy as np
import pytest

from benchmarks.analysis.rank_balance import main, packed_documents


def test_documents_fill_sequences_and_go_on_in_the_next() -> None:
    sequences = packed_documents(50, shortest=100, longest=1000, seed=3)
    assert [int(lengths.sum()) for lengths in sequences] == [1000] * 50
    assert all((lengths > 0).all() for lengths in sequences)
    whole = np.concatenate([lengths[1:-1] for lengths in sequences])  # neither cut at the front nor at the back
    assert whole.min() >= 100 and 200 < np.median(whole) < 400  # log-uniform: 316 in the middle, fewer that fit


def test_sharing_out_halves_the_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "smoke", "--longest", "32768", "--steps", "20"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    before, after = ([float(word) for word in row.split() if word[0].isdigit()] for row in rows)
    assert rows[0].startswith("in their order") and rows[1].startswith("shared by cost")
    assert after[0] < before[0] / 2 and after[1] < before[1] / 2


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--shortest", "0", "--shortest is 0: expected 1 to --longest (131072)"),
        ("--seed", "-1", "--seed is -1: expected at least 0"),
        ("--ranks", "0", "--ranks is 0: expected at least 1"),
        ("--ranks", "5", "--global_batch_size is 32: expected a multiple of --ranks"),
    ],
)
def test_bad_input_is_one_line(option: str, value: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, value]) == 2
    assert line in capsys.readouterr().err
