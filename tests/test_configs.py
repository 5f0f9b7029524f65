"""Every YAML that train.py takes is accepted, and what it sets arrives."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("prepare_"))
BASE = ["models/smoke.yaml", "attention/asentmax.yaml", "data/stdlib.yaml", "smoke.yaml"]


def leaves(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {name: leaf for key, value in nested.items() for name, leaf in leaves(value, f"{prefix}.{key}").items()}


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_train_takes_every_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for name in BASE for option in ("--config", str(CONFIGS / name))]
    arguments = ["train.py", *options, "--config", str(file), "--run_dir", "x", "--print_config"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert not end.value.code
    printed = leaves(yaml.safe_load(capsys.readouterr().out))
    for key, value in leaves(yaml.safe_load(file.read_text())).items():
        if key == ".data.sources":
            assert printed[key][0].items() >= value[0].items()
        else:
            assert printed[key] == value, key


def test_folders_are_the_ones_that_readme_lists() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {
        "models",
        "attention",
        "data",
        "stages",
        "cluster",
        "smoke.yaml",
    }
