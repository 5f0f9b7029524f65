"""Exported models: readable by safetensors alone, and by load_model like a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import model.export
import model.hub.files
from model.checkpoint import resolve_checkpoint
from model.export import export, main
from model.loading import load_model
from model.transformer import Transformer
from tests.model.test_checkpoint import CONFIG, save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_writes_what_load_model_reads(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = Transformer(CONFIG), tmp_path / "exported"
    save(tmp_path / "run", 10, model)
    assert main([str(tmp_path / "run"), str(output), "--dtype", dtype]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{output}: ") and f"step-00000010 (step 10) in {dtype}, 2 files, 0.0 MiB" in line
    wanted = {name: value.to(getattr(torch, dtype)) for name, value in model.state_dict().items()}
    written, loaded = load_file(output / "model.safetensors"), load_model(output)
    assert written.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(written[name], value) and torch.equal(loaded.model.state_dict()[name], value)
    assert (loaded.config, loaded.step, loaded.training_length) == (CONFIG, 10, 32)
    assert (loaded.tokenizer_path, loaded.tokenizer_fingerprint) == ("t.model", "abc")
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    assert loaded.model(torch.arange(5)[None]).dtype == getattr(torch, dtype)
    assert (output / "model.safetensors").stat().st_mode & 0o777 == output.stat().st_mode & 0o666


def test_large_models_are_cut_with_an_index(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    folder = save(tmp_path / "run", 10, model)
    export(folder, tmp_path / "exported", torch.float32, shard_size="4KB")
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert torch.equal(load_model(tmp_path / "exported").model.embedding.weight, model.embedding.weight)
    (tmp_path / "exported" / index["weight_map"]["norm.weight"]).unlink()
    with pytest.raises(ValueError, match="is missing"):
        resolve_checkpoint(tmp_path / "exported")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere", "out"], "nowhere: no such folder"),
        (["RUN", "RUN"], "is not empty: expected a new folder"),
        (["RUN", "RUN/file"], "RUN/file is a file: expected a new folder"),
        (["RUN", "RUN/../other/below"], "other/below cannot be written (Not a directory)"),
        (["RUN", "RUN/exported"], "is inside RUN, which belongs to training"),
        (["RUN/checkpoints/step-00000010", "RUN/exported"], "is inside RUN, which belongs to training"),
        (["RUN", "RUN/checkpoints/exported"], "is inside RUN, which belongs to training"),
        (["RUN", "RUN/checkpoints/step-00000010/exported"], "is inside RUN, which belongs to training"),
        (["RUN", "RUN/" + "x" * 300], "cannot be written (File name too long): choose another"),
        (["RUN", "/proc/none"], "No such file or directory"),
        (["RUN", "out", "--dtype", "float16"], "--dtype"),
        (["RUN"], "output"),
        (["RUN", "out", "--dtpye", "float32"], "--dtpye"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", 10, Transformer(CONFIG)).parents[1]
    for file in (run / "file", run / "config.yaml", run.parent / "other"):
        file.write_text("kept")
    before = sorted(run.rglob("*"))
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and part.replace("RUN", str(run)) in line and "\n" not in line
    assert sorted(run.rglob("*")) == before and (run / "file").read_text() == "kept"


def test_copied_checkpoints_may_lie_beside_the_export(tmp_path: Path) -> None:
    folder = save(tmp_path, 10, Transformer(CONFIG))
    assert main([str(folder), str(tmp_path / "exported")]) == 0 and (tmp_path / "exported").is_dir()


@pytest.mark.parametrize("stage", ["weights", "marker", "Ctrl-C"])
def test_a_full_disk_leaves_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_some(weights: object, folder: Path, **_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt if stage == "Ctrl-C" else SafetensorError("I/O error: No space left on device")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path / "run", 10, Transformer(CONFIG))
    if stage == "marker":
        monkeypatch.setattr(model.export, "write_complete", full)
    else:
        monkeypatch.setattr(model.hub.files, "save_torch_state_dict", save_some)
    assert main([str(tmp_path / "run"), str(tmp_path / "new" / "exported")]) == (130 if stage == "Ctrl-C" else 2)
    line = capsys.readouterr().err.strip()
    assert ("No space left on device" if stage != "Ctrl-C" else "nothing is written") in line and "\n" not in line
    assert not (tmp_path / "new").exists()


def test_a_folder_above_an_export_is_not_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "t.model").write_bytes(b"another")
    export(save(tmp_path / "run", 10, Transformer(CONFIG)), tmp_path / "models" / "mine", torch.float32)
    assert load_model(tmp_path / "models" / "mine").tokenizer_path == "t.model"
