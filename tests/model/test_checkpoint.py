import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data.tokenizer import Tokenizer
from model.checkpoint import (
    Unreadable,
    checkpoint_folder,
    find_checkpoints,
    readable,
    resolve_checkpoint,
    write_complete,
)
from model.config import ModelConfig
from model.export import export
from model.loading import load_model
from model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=50, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24)


def save(run, step: int, model: Transformer, complete: bool = True, tokenizer: Tokenizer | None = None):
    folder = checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    save_file({f"weight/{k}": v for k, v in model.state_dict().items()}, folder / "state-00000.safetensors")
    (folder / "trainer.ckpt").write_bytes(b"loops")
    meta = dict(
        step=step,
        samples=step,
        tokens=step,
        model=dataclasses.asdict(model.config),
        tokenizer=dict(path="t.model", fingerprint="abc"),
        sequence_length=32,
    )
    if tokenizer is not None:
        meta["tokenizer"] = dict(path=str(tokenizer.path), fingerprint=tokenizer.fingerprint)
    if complete:
        write_complete(folder, meta)
    return folder


def test_newest_complete_checkpoint_is_loaded(tmp_path) -> None:
    old, new = Transformer(CONFIG), Transformer(CONFIG)
    save(tmp_path, 10, old)
    save(tmp_path, 20, new)
    save(tmp_path, 30, new, complete=False)
    loaded = load_model(tmp_path)
    assert (loaded.step, loaded.training_length, loaded.tokenizer_fingerprint) == (20, 32, "abc")
    x = torch.arange(20)[None]
    assert torch.equal(loaded.model(x), new(x)) and not loaded.model.training
    assert loaded.model.head_weight is loaded.model.embedding.weight
    assert torch.equal(load_model(checkpoint_folder(tmp_path, 10)).model(x), old(x))
    complete, incomplete = find_checkpoints(tmp_path)
    assert [c.step for c in complete] == [10, 20] and "step-00000030" in incomplete[0]


def test_truncated_missing_and_garbled_checkpoints_are_refused(tmp_path) -> None:
    folder = save(tmp_path, 10, Transformer(CONFIG))
    state = folder / "trainer.ckpt"
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"has {len(content) - 1} bytes, expected {len(content)}"):
        resolve_checkpoint(folder)
    state.unlink()
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint.*trainer\.ckpt is missing"):
        resolve_checkpoint(tmp_path)
    (folder / "complete.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_an_older_format_is_refused(tmp_path) -> None:
    folder = save(tmp_path, 10, Transformer(CONFIG))
    meta = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(ValueError, match="has format 1, expected 2: written by another version"):
        load_model(folder)


def test_one_from_before_checksums_loads(tmp_path) -> None:
    marker = save(tmp_path, 10, Transformer(CONFIG)) / "complete.json"
    meta = json.loads(marker.read_text())
    files = {name: {"bytes": entry["bytes"]} for name, entry in meta["files"].items()}
    del meta["checksums"], meta["checksum"]
    marker.write_text(json.dumps({**meta, "files": files}))
    assert load_model(tmp_path).step == 10


@pytest.mark.parametrize("exported", [False, True])
def test_a_flipped_byte_is_named_by_file_and_tensor(tmp_path, exported) -> None:
    model = Transformer(CONFIG)
    torch.nn.init.normal_(model.norm.weight)
    folder = save(tmp_path, 10, model)
    if exported:
        export(folder, tmp_path / "exported", torch.float32)
        folder = tmp_path / "exported"
    (state,) = folder.glob("*.safetensors")
    content = bytearray(state.read_bytes())
    content[content.index(model.norm.weight.detach().numpy().tobytes())] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{state} is damaged: (weight/)?norm.weight has checksum \w+, expected \w+"):
        load_model(folder)
    assert load_model(folder, verify="size").step == 10


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", ["step", "checksums", "d_ff", "sequence_length", "path"])
def test_a_flipped_bit_in_the_marker_is_named(tmp_path, exported, name) -> None:
    folder = save(tmp_path, 10, Transformer(CONFIG))
    if exported:
        export(folder, tmp_path / "exported", torch.float32)
        folder = tmp_path / "exported"
    marker = folder / ("config.json" if exported else "complete.json")
    content = bytearray(marker.read_bytes())
    value = content.index(f'"{name}": '.encode()) + len(f'"{name}": ')
    content[value + next(i for i, byte in enumerate(content[value:]) if chr(byte).isalnum())] ^= 4
    marker.write_bytes(content)
    way_out = "model.export" if exported else "its run stands for the one before"
    with pytest.raises(ValueError, match=f"{marker} is damaged: its content has checksum .*{way_out}"):
        load_model(folder)
    with pytest.raises(ValueError, match=f"{marker} is damaged"):
        export(folder, tmp_path / "new", torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value) -> None:
    model = Transformer(CONFIG)
    torch.nn.init.constant_(model.norm.weight[3:4], value)
    folder = save(tmp_path, 10, model)
    with pytest.raises(ValueError, match=f"{folder}/state-00000.safetensors: weight/norm.weight is not finite"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "10"}, "has a string as 'step', expected a whole number"),
        ({"files": []}, "has a list as 'files', expected an object"),
        ({"files": {"trainer.ckpt": 5}}, "files, trainer.ckpt in .* holds a whole number, expected an object"),
        ({"tensors": None}, "has null as 'tensors'"),
        ({"tensors": {"weight/a": "elsewhere"}}, "tensors, weight/a in .* is 'elsewhere', expected one of files"),
        ({"checksums": 3}, "has a whole number as 'checksums'"),
        ({"model": None}, "has null as 'model'"),
        ({"model": {"n_layers": "two"}}, "model in .* is no architecture"),
        ({"model": {"attention": 3}}, "model in .* is no architecture"),
        ({"tokenizer": {"path": "x"}}, "tokenizer in .* lacks 'fingerprint', expected a string"),
        ({"sequence_length": True}, "has true or false as 'sequence_length'"),
    ],
)
def test_markers_with_other_content_are_one_line(tmp_path, change, message) -> None:
    marker = save(tmp_path, 10, Transformer(CONFIG)) / "complete.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(marker.parent)
    assert str(marker) in str(caught.value) and "choose another" in str(caught.value)


def test_a_run_folder_may_be_named_like_a_checkpoint(tmp_path) -> None:
    for name in ("step-by-step", "step-00000004"):
        save(tmp_path / name, 10, Transformer(CONFIG))
        assert resolve_checkpoint(tmp_path / name).step == 10


def test_a_damaged_file_is_named(tmp_path) -> None:
    folder = save(tmp_path, 10, Transformer(CONFIG))
    state = folder / "state-00000.safetensors"
    state.write_bytes(b"\xff" * state.stat().st_size)
    with pytest.raises(ValueError, match="state-00000.safetensors cannot be read .*: choose another checkpoint"):
        load_model(folder)


def test_what_cannot_be_opened_is_told_apart_from_what_is_gone(tmp_path) -> None:
    path = tmp_path / "state-00000.safetensors"
    with pytest.raises(ValueError, match=f"{path} is missing: choose another checkpoint"), readable(path):
        safe_open(path, framework="pt")
    path.symlink_to(path)  # safetensors says of this, too, that there is no such file
    with (
        pytest.raises(Unreadable, match=f"{path} cannot be read .Too many levels .*same command again"),
        readable(path),
    ):
        safe_open(path, framework="pt")


def test_weights_of_another_architecture_are_refused(tmp_path) -> None:
    other = Transformer(dataclasses.replace(CONFIG, d_ff=32))
    other.config = CONFIG  # what is recorded
    folder = save(tmp_path, 10, other)
    with pytest.raises(ValueError, match="weights do not fit"):
        load_model(folder)


def test_marker_lists_every_file(tmp_path) -> None:
    folder = save(tmp_path, 10, Transformer(CONFIG))
    meta = json.loads((folder / "complete.json").read_text())
    names = ("state-00000.safetensors", "trainer.ckpt")
    assert {name: entry["bytes"] for name, entry in meta["files"].items()} == {
        name: (folder / name).stat().st_size for name in names
    }
    assert meta["checksums"].keys() == meta["tensors"].keys()
    assert meta["tensors"]["weight/embedding.weight"] == "state-00000.safetensors"
    assert {path.name for path in folder.iterdir()} == {*names, "complete.json"}
