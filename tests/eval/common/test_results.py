"""Kept results: what is read again, and what makes them stale."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from eval.common import results
from eval.common.results import ROOT, result_key, reuse, source_files


@dataclass
class Kept:
    value: float


def test_a_result_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, calls = tmp_path / "results" / "x.json", []

    def measure() -> Kept:
        calls.append(1)
        return Kept(0.5)

    assert reuse(path, Kept, measure) == reuse(path, Kept, measure) == Kept(0.5)
    assert len(calls) == 1 and f"reusing {path}" in capsys.readouterr().err
    path.write_text('{"value": "a"}')
    with pytest.raises(ValueError, match="x.json: value"):
        reuse(path, Kept, measure)


def test_code_that_measures_is_what_its_modules_import() -> None:
    held_out = {str(path.relative_to(ROOT)) for path in source_files(("eval.held_out.measurement",))}
    assert {
        "eval/held_out/measurement.py", "eval/held_out/needle.py", "eval/common/scoring.py", "model/transformer.py",
        "kernels/alpha_entmax/operator.py", "data/store.py", "model/__init__.py",
    } <= held_out  # fmt: skip
    assert not {"eval/held_out/report.py", "eval/held_out/figures.py", "eval/run.py", "training/cli.py"} & held_out
    lengths = {str(path.relative_to(ROOT)) for path in source_files(("eval.length_generalisation.measure",))}
    assert "data/length_generalisation.py" in lengths and "eval/length_generalisation/report.py" not in lengths
    with pytest.raises(FileNotFoundError, match="no module eval.nothing"):
        source_files(("eval.nothing",))


def test_the_key_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, checkpoint = tmp_path / "project", tmp_path / "step-1"
    checkpoint.mkdir()
    (project / "pack").mkdir(parents=True)
    files = {
        "pack/__init__.py": "",
        "pack/a.py": "def f():\n    from pack import b\n",
        "pack/b.py": "",
        "pack/c.py": "",
    }
    for name, text in files.items():
        (project / name).write_text(text)
    monkeypatch.setattr(results, "ROOT", project)

    def key() -> str:
        results._code_hash.cache_clear()
        return result_key(checkpoint, "data", Kept(1), 64, "cpu", ("pack.a",))

    first = key()
    (project / "pack/c.py").write_text("changed = 1")
    assert key() == first
    (project / "pack/b.py").write_text("changed = 1")
    assert key() != first
    results._code_hash.cache_clear()
