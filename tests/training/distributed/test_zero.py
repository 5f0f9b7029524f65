"""ZeRO and DDP: the same training as one process, and checkpoints that go from any of them to any other."""

import socket
from math import prod
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from model.checkpoint import checkpoint_folder, read_complete
from model.loading import StoredTensors
from model.transformer import Transformer
from tests.training.conftest import TrainProcess, callbacks, logged, stored_tensors
from tests.training.distributed import zero_worker
from training.distributed.config import ParallelConfig, check_combinations

# Its matrices are above stage 3's threshold for parameters that stay whole on every rank.
WIDER = """
model: {network: {d_model: 32, d_ff: 320, tie_embeddings: true, attention: {learn_alpha: true}}}
trainer: {max_steps: 10, log_every_n_steps: 1, gradient_clip_val: 0.5}
checkpoint: {milestones: [5]}
stats: {every_n_steps: 3}
"""
STAGES = [0, 1, 2, 3]
RunDirs = dict[int, Path]


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "wider.yaml"
    path.write_text(WIDER)
    return path


@pytest.fixture(scope="module")
def single(train: TrainProcess, wider: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of one process: two micro-batches of two sequences each."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    done = train("--run_dir", run_dir, configs=(wider,))
    assert done.returncode == 0, done.stderr
    return run_dir


def on_two(stage: int) -> tuple[object, ...]:
    """Options for two processes with the same global batch, accumulated over two micro-batches."""
    return "--trainer.devices", 2, "--data.micro_batch_size", 1, "--parallel.zero_stage", stage


@pytest.fixture(scope="module")
def divided(train: TrainProcess, wider: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirs:
    """The same ten steps by two processes, at each stage."""
    folder = tmp_path_factory.mktemp("divided")
    for stage in STAGES:
        done = train("--run_dir", folder / str(stage), *on_two(stage), configs=(wider,))
        assert done.returncode == 0, done.stderr
        assert "INFO" not in done.stdout + done.stderr and "WARNING" not in done.stdout + done.stderr
    return {stage: folder / str(stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradient_norms_equal_those_of_one_process(single: Path, divided: RunDirs, stage: int) -> None:
    wanted, found = logged(single), logged(divided[stage])
    assert sorted(wanted) == sorted(found) == list(range(1, 11))
    assert max(norm for _, norm in wanted.values()) > 0.5  # clipping acts
    for step, values in wanted.items():
        assert found[step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_blocks_at_stage_3(
    mode: str, single: Path, train: TrainProcess, wider: Path, tmp_path: Path
) -> None:
    """Recomputed, they gather weights that forward found gathered."""
    options = ("--model.activation_checkpointing", mode)
    done = train("--run_dir", tmp_path / "run", *on_two(3), *options, configs=(wider,))
    assert done.returncode == 0, done.stderr
    found = logged(tmp_path / "run")
    for step, values in logged(single).items():
        assert found[step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_identical(
    divided: RunDirs, stage: int, train: TrainProcess, wider: Path, tmp_path: Path
) -> None:
    half, run_dir = checkpoint_folder(divided[stage], 5), tmp_path / "run"
    done = train("--run_dir", run_dir, "--resume", half, *on_two(stage), configs=(wider,))
    assert done.returncode == 0, done.stderr
    ours, theirs = stored_tensors(run_dir, 10), stored_tensors(divided[stage], 10)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_stage_starts_from_the_weights_that_one_process_takes_over(
    single: Path, train: TrainProcess, wider: Path, tmp_path: Path
) -> None:
    """Alphas stay what they are, though they start elsewhere."""
    new = ("--init_from", single, "--model.network.attention.alpha", 1.4)
    shapes = StoredTensors(read_complete(checkpoint_folder(single, 10))).shapes()
    count = sum(prod(shape) for key, shape in shapes.items() if key.startswith("weight/"))
    for name, options in (("one", ()), ("two", on_two(3))):
        watching = callbacks(("SaveAtStart", {"folder": str(tmp_path / name)}), ("StopAfterStep", {"step": 1}))
        done = train("--run_dir", tmp_path / f"run-{name}", *new, *options, watching, configs=(wider,))
        assert done.returncode == 0, done.stderr
        assert "changed: attention.alpha 1.5 -> 1.4" in done.stdout + done.stderr
        assert f"training {count:,} parameters" in done.stdout + done.stderr
    one, two = (dict(StoredTensors(read_complete(tmp_path / name))) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    taken = StoredTensors(read_complete(checkpoint_folder(single, 10)))
    same = [key for key in taken if key.startswith("weight/") and "alpha" not in key]
    assert same and all(torch.equal(taken[key], two[key]) for key in same)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bfloat16_the_float32_weights_start_as_those_of_one_process(
    stage: int, single: Path, train: TrainProcess, wider: Path, tmp_path: Path
) -> None:
    watching = callbacks(("SaveAtStart", {"folder": str(tmp_path / "start")}), ("StopAfterStep", {"step": 1}))
    options = ("--trainer.precision", "bf16-mixed", *on_two(stage))
    done = train("--run_dir", tmp_path / "run", *options, watching, configs=(wider,))
    assert done.returncode == 0, done.stderr
    start = StoredTensors(read_complete(tmp_path / "start"))
    torch.manual_seed(0)
    initial = Transformer(read_complete(checkpoint_folder(single, 10)).architecture).initial
    assert {key.removeprefix("weight/") for key in start if key.startswith("weight/")} == set(initial)
    assert all(torch.equal(start[f"weight/{name}"], initial[name]) for name in initial)


def test_from_one_process_to_two_at_other_stages_and_back(
    single: Path, train: TrainProcess, wider: Path, tmp_path: Path
) -> None:
    run_dir, start = tmp_path / "run", checkpoint_folder(single, 5)
    samples = tmp_path / "samples"
    samples.mkdir()
    for last, options in ((6, on_two(3)), (8, on_two(1)), (10, ())):
        as_restored = tmp_path / f"restored-{last}"
        watching = callbacks(
            ("SaveAtStart", {"folder": str(as_restored)}),
            ("RecordSamples", {"folder": str(samples)}),
            ("StopAfterStep", {"step": last}),  # trainer.max_steps would change the learning rate
        )
        done = train("--run_dir", run_dir, "--resume", start, *options, watching, configs=(wider,))
        assert done.returncode == 0, done.stderr
        before, after = (dict(StoredTensors(read_complete(folder))) for folder in (start, as_restored))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        start = checkpoint_folder(run_dir, last)
    wanted = logged(single)
    for step, values in logged(run_dir).items():
        assert values == pytest.approx(wanted[step], rel=1e-5), step
    seen = [int(number) for path in samples.iterdir() for number in path.read_text().split()]
    assert sorted(seen) == list(range(5 * 4, 10 * 4))


def test_engines_of_all_stages(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(
        zero_worker.main, (str(tmp_path), port), nprocs=zero_worker.RANKS, start_method="spawn"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "zero_stage is 4: expected 0, 1, 2 or 3"),
        ({"timeout_minutes": 0}, "timeout_minutes is 0: expected a whole number at least 1"),
        ({"offload_optimizer": True}, "offload_optimizer is True: it needs parallel.zero_stage"),
        ({"reduce_dtype": "bfloat16"}, "reduce_dtype is bfloat16: it needs parallel.zero_stage"),
        ({"reduce_dtype": "float16", "zero_stage": 1}, "reduce_dtype is 'float16': expected float32 or bfloat16"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "precision", "compile", "message"),
    [
        ({"zero_stage": 1}, "16-mixed", False, "trainer.precision is '16-mixed': expected 32-true or bf16-mixed"),
        ({"zero_stage": 2, "reduce_dtype": "bfloat16"}, "32-true", False, "expected float32 with trainer.precision"),
        ({"zero_stage": 3}, "32-true", True, "stage 3 gathers weights .* use stage 1 or 2, or model.compile false"),
    ],
)
def test_combinations_that_cannot_work(options: dict[str, object], precision: str, compile: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_combinations(ParallelConfig(**options), precision=precision, compile=compile)  # type: ignore[arg-type]


def test_muon_needs_whole_matrices() -> None:
    check_combinations(ParallelConfig(), precision="bf16-mixed", compile=True, optimizer="muon")
    for stage in (1, 2, 3):
        with pytest.raises(
            ValueError, match=f"whole matrices, and parallel.zero_stage {stage} divides them: use adamw"
        ):
            check_combinations(
                ParallelConfig(zero_stage=stage),  # type: ignore[arg-type]
                precision="32-true", compile=False, optimizer="muon",
            )  # fmt: skip
