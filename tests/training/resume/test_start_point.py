"""Choosing the checkpoint that a session starts from, and what it may not differ in."""

import errno
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from common.errors import error_line
from model.checkpoint import (
    EXPORT_CONFIG,
    MARKER,
    TRAINER_STATE,
    CheckpointInfo,
    checkpoint_folder,
    resolve_checkpoint,
    write_complete,
)
from model.config import AttentionConfig, ModelConfig
from model.dsa.config import DSAConfig
from tests.training.checkpoints import make_checkpoint, remove_old
from training.resume.start_point import check_architecture, check_tokenizer, choose_start, read_data_state
from training.resume.transfer import check_transfer


def test_a_new_run_starts_at_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for resume in ("none", "auto"):
        start = choose_start(tmp_path / "new", resume)
        assert (start.step, start.samples, start.tokens, start.trainer_state) == (0, 0, 0, None)
    assert "has no complete checkpoint, starting from step 0" in capsys.readouterr().err


def test_auto_takes_the_newest_complete_one_and_names_those_it_passes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 15, complete=False)
    (make_checkpoint(tmp_path, 20) / TRAINER_STATE).write_bytes(b"cut")
    start = choose_start(tmp_path, "auto")
    assert (start.step, start.samples, start.tokens) == (10, 40, 640)
    assert start.trainer_state == checkpoint_folder(tmp_path, 10) / TRAINER_STATE
    printed = capsys.readouterr().err
    assert "resuming from" in printed and "step-00000010 (step 10)" in printed
    passed_over = [line for line in printed.splitlines() if line.startswith("passing over")]
    assert len(passed_over) == 2 and "step-00000015" in passed_over[0] and "step-00000020" in passed_over[1]


def of_another_format(run_dir: Path, step: int) -> Path:
    marker = make_checkpoint(run_dir, step) / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 3}))
    return marker.parent


def test_a_newest_one_of_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    newest = of_another_format(tmp_path, 10)
    with pytest.raises(ValueError, match=rf"{newest}/{MARKER} has format 3, expected 2: .* takes --resume .*00000005"):
        choose_start(tmp_path, "auto")
    with pytest.raises(ValueError, match="format 3"):
        resolve_checkpoint(tmp_path)
    assert choose_start(tmp_path, str(checkpoint_folder(tmp_path, 5))).step == 5
    remove_old(tmp_path)
    assert newest.exists()
    shutil.rmtree(checkpoint_folder(tmp_path, 5))
    for resume in ("auto", "none"):
        with pytest.raises(ValueError, match="format 3.* another --run_dir"):
            choose_start(tmp_path, resume)
    make_checkpoint(tmp_path, 15)  # an older one is in nobody's way
    assert choose_start(tmp_path, "auto").step == resolve_checkpoint(tmp_path).step == 15


def test_where_all_are_damaged_no_run_starts_over(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, 5) / MARKER).write_text("{}")
    (make_checkpoint(tmp_path, 10) / TRAINER_STATE).write_bytes(b"cut")
    for resume in ("auto", "none", str(make_checkpoint(tmp_path / "other", 3))):
        with pytest.raises(ValueError, match="trainer.ckpt has 3 bytes, expected 10.* another --run_dir"):
            choose_start(tmp_path, resume)


def test_starting_over_existing_checkpoints_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=rf"{tmp_path} already has .* step 5: .*--resume auto, or choose another"):
        choose_start(tmp_path, "none")


def test_paths(tmp_path: Path) -> None:
    old, new = make_checkpoint(tmp_path / "a", 5), make_checkpoint(tmp_path / "a", 10)
    broken = make_checkpoint(tmp_path / "a", 15, complete=False)
    assert choose_start(tmp_path / "b", str(old)).step == 5
    assert choose_start(tmp_path / "b", str(tmp_path / "a")).step == 10
    assert choose_start(tmp_path / "a", str(new)).step == 10
    with pytest.raises(ValueError, match="step-00000005 is not the newest .* step-00000010"):
        choose_start(tmp_path / "a", str(old))
    with pytest.raises(ValueError, match=f"no complete checkpoint.*{MARKER}"):
        choose_start(tmp_path / "b", str(broken))
    with pytest.raises(FileNotFoundError, match="missing"):
        choose_start(tmp_path / "b", str(tmp_path / "missing"))


def test_another_architecture_lists_the_differing_keys() -> None:
    saved = {"n_layers": 2, "d_model": 8, "attention": {"kind": "softmax", "backend": "torch"}}
    checkpoint = CheckpointInfo(Path("x"), 1, {"model": saved})
    check_architecture(checkpoint, {**saved, "attention": {"kind": "softmax", "backend": "auto"}})
    other = {"n_layers": 3, "d_model": 8, "attention": {"kind": "entmax", "backend": "auto"}, "new": 1}
    with pytest.raises(ValueError) as caught:
        check_architecture(checkpoint, other)
    message = str(caught.value)
    assert "attention.kind 'softmax' (config: 'entmax'), n_layers 2 (config: 3), new None (config: 1);" in message
    assert "d_model" not in message and "backend" not in message


def test_the_next_stage_of_training_starts_a_new_run() -> None:
    """As warm-up does that goes on sparsely: it is the same architecture, whose weights --init_from takes."""
    warmup = ModelConfig(attention=AttentionConfig(kind="dsa", dsa=DSAConfig(stage="warmup")))
    checkpoint = CheckpointInfo(Path("runs/warmup/x"), 1, {"model": asdict(warmup)})
    sparse = replace(warmup, attention=replace(warmup.attention, dsa=DSAConfig(stage="sparse")))
    check_transfer(checkpoint, sparse)
    with pytest.raises(ValueError) as caught:
        check_architecture(checkpoint, asdict(sparse))
    message = str(caught.value)
    assert "was trained with model.network.attention.dsa.stage 'warmup' (config: 'sparse')," in message
    assert "--init_from runs/warmup/x with another --run_dir" in message and "architecture" not in message
    with pytest.raises(ValueError, match=r"another architecture: .*dsa.stage 'warmup' \(config: 'sparse'\), n_layers"):
        check_architecture(checkpoint, asdict(replace(sparse, n_layers=3)))


def test_keys_that_are_newer_than_a_checkpoint_have_their_defaults() -> None:
    architecture = asdict(ModelConfig())
    old = {**architecture, "attention": {k: v for k, v in architecture["attention"].items() if k != "anneal_steps"}}
    check_architecture(CheckpointInfo(Path("x"), 1, {"model": old}), architecture)
    architecture["attention"] = {**architecture["attention"], "anneal_steps": 5}
    with pytest.raises(ValueError, match=r"attention.anneal_steps 0 \(config: 5\)"):
        check_architecture(CheckpointInfo(Path("x"), 1, {"model": old}), architecture)


def test_another_tokenizer() -> None:
    checkpoint = CheckpointInfo(Path("x"), 1, {"tokenizer": {"path": "a.model", "fingerprint": "1" * 64}})
    check_tokenizer(checkpoint, "elsewhere.model", "1" * 64)
    with pytest.raises(ValueError, match="a.model.*the data has b.model"):
        check_tokenizer(checkpoint, "b.model", "2" * 64)


def test_a_marker_without_the_trainers_state_is_one_line(tmp_path: Path) -> None:
    marker = make_checkpoint(tmp_path, 5) / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "files": {}}))
    with pytest.raises(ValueError, match=f"step-00000005 has no {TRAINER_STATE} among its files; choose another"):
        choose_start(tmp_path, "auto")


def test_an_exported_model_is_no_checkpoint(tmp_path: Path) -> None:
    write_complete(tmp_path, {"step": 5}, marker=EXPORT_CONFIG)
    with pytest.raises(ValueError, match="is an exported model: it has weights only"):
        choose_start(tmp_path / "run", str(tmp_path))


REFUSED = OSError(errno.EIO, os.strerror(errno.EIO))  # of a read, which names no file


def refused(*_: object, **__: object) -> NoReturn:
    raise REFUSED


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("pathlib.Path.read_bytes", MARKER),
        ("model.loading.file_checksum", TRAINER_STATE),
        ("model.loading.safe_open", "state-00000.safetensors"),
    ],
)
def test_what_cannot_be_read_is_not_called_damaged_and_stays(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        folder = make_checkpoint(tmp_path, step, complete=False)
        save_file({"weight/a": torch.zeros(3)}, folder / "state-00000.safetensors")
        write_complete(folder, {"step": step, "samples": 4 * step, "tokens": 64 * step})
    assert choose_start(tmp_path, "auto", "checksum").step == 10
    monkeypatch.setattr(place, refused)
    with pytest.raises(OSError) as caught:
        choose_start(tmp_path, "auto", "checksum")
    line = error_line(caught.value)
    assert f"/{name}" in line and "Input/output error" in line and "is damaged" not in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no archive", "cannot be read"),
        ([1], "holds a list, expected an object"),
        ({}, "lacks 'Data', expected an object"),
        ({"Data": {}, "global_step": "5"}, "has a string as 'global_step', expected a whole number"),
    ],
)
def test_a_trainer_state_without_what_a_run_needs_is_named(content: object, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5, complete=False)
    if isinstance(content, bytes):
        (folder / TRAINER_STATE).write_bytes(content)
    else:
        torch.save(content, folder / TRAINER_STATE)
    write_complete(folder, {"step": 5, "samples": 20, "tokens": 320})
    with pytest.raises(ValueError, match=f"{folder / TRAINER_STATE} {message}.*; choose another checkpoint"):
        read_data_state(resolve_checkpoint(folder), "Data")
