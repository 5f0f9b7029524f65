"""train.py as users meet it: merged configs, and one error line for each mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import train as train_script
from tests.training.conftest import ROOT, command, corpus, other_corpus, run_train, tiny_config

__all__ = ["corpus", "other_corpus", "tiny_config"]  # fixtures
Refused = Callable[..., str]


@pytest.fixture
def main(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run train.py's main in this process with the tiny config and return its exit code."""

    def run(*options: object) -> int:
        monkeypatch.setattr(sys, "argv", command("--config", tiny_config, *options)[1:])
        monkeypatch.chdir(ROOT)
        try:
            train_script.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def refused(main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run with options that must fail, and return the one line on stderr."""

    def run(*options: object) -> str:
        options = options if "--run_dir" in options else (*options, "--run_dir", tmp_path / "run")
        capsys.readouterr()
        assert main(*options) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), lines
        return lines[-1]

    return run


def printed_config(*options: object) -> dict:
    printed = run_train(*options, "--run_dir", "x", "--print_config")
    assert printed.returncode == 0, printed.stderr
    return yaml.safe_load(printed.stdout)


def test_several_configs_merge_key_by_key_and_the_command_line_wins(tiny_config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {network: {attention: {alpha_max: 1.9, alpha: 1.6}}, optimizer: {lr: 0.5, eps: 1.0e-6}}")
    second.write_text("model: {network: {attention: {kind: entmax}}, optimizer: {lr: 0.25}}")
    config = printed_config(
        "--config",
        tiny_config,
        "--config",
        first,
        "--config",
        second,
        "--model.network.attention.alpha",
        "1.7",
    )
    attention, optimizer = config["model"]["network"]["attention"], config["model"]["optimizer"]
    assert (attention["alpha_max"], attention["alpha"], attention["kind"]) == (1.9, 1.7, "entmax")
    assert (optimizer["lr"], optimizer["eps"]) == (0.25, 1e-6)
    assert config["model"]["network"]["d_model"] == 16


def test_the_run_folder_keeps_the_resolved_config_and_a_finished_run_ends_at_once(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--run_dir", tmp_path / "run", "--trainer.max_steps", 2)
    assert main(*options) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2 and config["model"]["network"]["d_model"] == 16
    assert (tmp_path / "run" / "code_version.txt").read_text().startswith("step-00000000 ")
    assert main(*options, "--resume", "auto") == 0
    assert "already at step 2 of trainer.max_steps 2: nothing to train" in capsys.readouterr().err
    assert main(*options, "--resume", "auto", "--trainer.max_steps", 3) == 0
    assert (tmp_path / "run" / "config.step-00000002.yaml").exists()
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "complete.json").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.network.n_layerz", 3], ["--model.network.n_layerz", "--help"]),
        (["--model.network.n_layers", "three"], ["model.network.n_layers", "int", "three"]),
        (["--model.network.attention.kind", "flash"], ["model.network.attention.kind", "flash", "softmax"]),
        (["--model.network.attention.alpha", 2.5], ["alpha", "2.5", "[1.0001, 2]"]),
        (["--model.network.n_kv_heads", 3], ["n_kv_heads", "3", "n_heads = 2"]),
        (["--model.optimizer.lr", -1], ["model.optimizer.lr is -1", "above 0"]),
        (["--model.network.vocab_size", 100], ["vocab_size is 100", "384", "at least"]),
        (["--model.loss_backend", "fast"], ["loss_backend is 'fast'", "auto, liger or chunked"]),
        (["--config", "missing.yaml"], ["missing.yaml", "not exist"]),
        (["--checkpoint.keep_last", 1], ["keep_last is 1", "at least 2"]),
        (["--trainer.max_steps", -1], ["max_steps is -1", "at least 1"]),
        (["--trainer.accumulate_grad_batches", 7], ["accumulate_grad_batches is 7", "2 on 1 data-parallel ranks"]),
        (["--trainer.val_check_interval", 7], ["val_check_interval is 7", "validation.every_n_steps"]),
        (["--trainer.gradient_clip_algorithm", "value"], ["gradient_clip_algorithm is 'value'"]),
        (["--data.micro_batch_size", 3], ["global_batch_size 4", "micro_batch_size 3"]),
        (["--data.sources", "[{path: nowhere}]"], ["nowhere", "data.prepare"]),
        (["--validation.every_n_steps", 5, "--data.val_sequences", 0], ["val_sequences is 0"]),
        (["--validation.every_n_steps", 5, "--data.val_sequences", 4000], ["val_sequences", "4000"]),
        (["--validation.every_n_steps", 5, "--data.val_sequences", 3], ["val_sequences 3", "micro_batch_size 2"]),
        (["--resume", "nowhere"], ["nowhere", "no such folder"]),
        (["--wandb.mode", "on"], ["wandb.mode", "offline", "on"]),
        (["--guard.max_skipped", 500], ["guard.max_skipped is 500", "guard.window 128"]),
        (["--watchdog.minutes", -1], ["watchdog.minutes is -1", "at least 0 (0: never)"]),
        (["--profile.steps", -1], ["profile.steps is -1", "at least 0"]),
    ],
)  # fmt: skip
def test_one_line_for_each_mistake(options: list[object], parts: list[str], refused: Refused, tmp_path: Path) -> None:
    line = refused(*options)
    for part in parts:
        assert part in line, line
    # who is refused leaves nothing; the lock goes with the process
    assert [path.name for path in tmp_path.glob("run/**/*") if path.name != ".lock"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("options", [["--trainer.accelerator", "gpu"], ["--config", "configs/cluster/one_gpu.yaml"]])
def test_no_cuda(options: list[object], refused: Refused) -> None:
    line = refused(*options)
    assert "trainer.accelerator is 'gpu'" in line and "no CUDA device" in line and "configs/cluster/cpu.yaml" in line


def test_unknown_key_in_a_file(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: {network: {attention: {kindd: entmax}}}")
    assert "network.attention.kindd" in refused("--config", path)


def test_checkpoints_that_do_not_fit(
    main: Callable[..., int], refused: Refused, other_corpus: Path, tmp_path: Path
) -> None:
    run = ("--run_dir", tmp_path / "run", "--trainer.max_steps", 2)
    assert main(*run) == 0
    assert "already has checkpoints, the newest at step 2" in refused(*run)
    again = (*run, "--resume", "auto", "--trainer.max_steps", 4)
    assert "n_layers 2 (config: 3)" in refused(*again, "--model.network.n_layers", 3)
    assert "tokenizer" in refused(*again, "--data.sources", f"[{{path: {other_corpus}}}]")
    assert "data.seed 0" in refused(*again, "--data.seed", 9)


def test_a_run_is_extended_with_leave(
    main: Callable[..., int], refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--run_dir", tmp_path / "run", "--resume", "auto", "--checkpoint.every_n_steps", 2)
    assert main(*run, "--trainer.max_steps", 4) == 0
    longer = (*run, "--trainer.max_steps", 6, "--model.optimizer.lr", 0.02)
    line = refused(*longer)
    assert "trainer.max_steps 4 (config: 6)" in line and line.endswith('--allow_changes "[trainer.max_steps]"')
    assert "--allow_changes has 'max_steps'" in refused(*longer, "--allow_changes", "[max_steps]")
    assert not (tmp_path / "run" / "config.step-00000004.yaml").exists()  # a refused session leaves no record
    for _time in range(2):  # as a requeued job, after its last step
        assert main(*longer, "--allow_changes", "[trainer.max_steps]") == 0
    printed = capsys.readouterr().err
    assert "changed since step-00000004: model.optimizer.lr 0.01 (config: 0.02), trainer.max_steps 4 (con" in printed
    assert "already at step 6" in printed


def test_debug_shows_the_traceback(main: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_kv_heads"):
        main("--run_dir", tmp_path / "run", "--model.network.n_kv_heads", 3, "--debug")


def test_a_damaged_shard_is_one_line(refused: Refused, corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(corpus), str(damaged)], check=True)
    shard = next((damaged / "train").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    line = refused("--data.sources", f"[{{path: {damaged}}}]", "--data.verify", "checksum")
    assert shard.name in line and "sha256" in line and "data.prepare" in line


def test_an_error_during_training_keeps_its_traceback(
    main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("training.module.linear_cross_entropy", fail)
    with pytest.raises(ValueError, match="a bug"):
        main("--run_dir", tmp_path / "run")


def test_an_error_that_loader_workers_are_there_for_ends_all_processes(tiny_config: Path, tmp_path: Path) -> None:
    options = ("--data.num_workers", 2, "--data.val_sequences", 5, "--validation.every_n_steps", 5)
    done = run_train("--config", tiny_config, "--run_dir", tmp_path / "run", *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: data.val_sequences 5 is not a multiple of")


def test_as_a_process_an_error_is_one_line_and_exit_code_2(tiny_config: Path) -> None:
    done = subprocess.run(
        command("--config", tiny_config, "--run_dir", "x", "--trainer.max_stepz", 3), env=dict(os.environ),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "trainer.max_stepz" in done.stderr
