"""The data module: order over ranks and workers, resuming with Lightning, validation, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from data.datamodule import PackedDataModule, SourceConfig
from data.loading import MicroBatchSampler, PackedDataset
from data.store import TokenStore
from tests.data.conftest import PrepareTexts, make_module

STDLIB_YAML = Path(__file__).parents[2] / "configs" / "data" / "stdlib.yaml"


def first_batch(data: PackedDataModule) -> dict[str, Any]:
    return next(iter(data.train_dataloader()))


class Recorder(lightning.LightningModule):
    """Keeps the samples it sees; saves a checkpoint when step `save_at` has finished, and fails at `fail_at`."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.validated: list[int] = []
        self.save_at, self.path = save_at, path

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen += batch["sample_ids"].tolist()
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.validated += batch["sample_ids"].tolist()

    def on_train_batch_end(self, *_: Any) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.consumed_samples = self.trainer.global_step * data.global_batch_size
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)  # type: ignore[arg-type]
            self.save_at = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: PackedDataModule, steps: int, model: Recorder, path: Path | None = None, **options: Any) -> Recorder:
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=data.accumulation(1),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"limit_val_batches": 0} | options),
    )
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
    assert trainer.global_step == steps or steps < 0
    return model


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_neither_skips_nor_repeats_a_sample(prepared: Path, tmp_path: Path, workers: int) -> None:
    whole = fit(make_module(prepared, num_workers=workers), 6, Recorder())
    assert whole.seen == list(range(6 * 8))
    checkpoint = tmp_path / "step.ckpt"
    fit(make_module(prepared, num_workers=workers), 6, Recorder(save_at=3, path=checkpoint))
    resumed = fit(make_module(prepared, num_workers=workers), 6, Recorder(), checkpoint)
    assert resumed.seen == list(range(3 * 8, 6 * 8))


def test_a_finished_run_can_be_extended(prepared: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step.ckpt"
    fit(make_module(prepared), 4, Recorder(save_at=4, path=checkpoint))
    extended = fit(make_module(prepared), 7, Recorder(save_at=7, path=checkpoint), checkpoint)
    assert extended.seen == list(range(4 * 8, 7 * 8))
    again = fit(make_module(prepared), 9, Recorder(), checkpoint)
    assert again.seen == list(range(7 * 8, 9 * 8))


def test_validation_during_training_does_not_disturb_the_order(prepared: Path) -> None:
    options: dict[str, Any] = {"limit_val_batches": None, "num_sanity_val_steps": 0, "val_check_interval": 8}
    model = fit(make_module(prepared), 4, Recorder(), check_val_every_n_epoch=None, **options)
    assert model.seen == list(range(4 * 8))
    assert model.validated == 2 * list(range(8))


def test_without_max_steps_the_epochs_follow_one_another(prepared: Path) -> None:
    data = make_module(prepared)
    data.setup()
    steps = data.train_packing().sequences_per_pass // 8
    model = fit(data, -1, Recorder(), max_epochs=2)
    assert steps > 2 and model.seen == list(range(2 * steps * 8))


class RankRecorder(Recorder):
    """Writes the samples of its rank to a file."""

    def on_train_end(self) -> None:
        assert self.path is not None
        (self.path / f"rank-{self.global_rank}.json").write_text(json.dumps([self.seen, self.validated]))


def test_two_processes_share_every_global_batch(prepared: Path, tmp_path: Path) -> None:
    data = make_module(prepared, global_batch_size=8)
    trainer = lightning.Trainer(
        max_steps=3,
        accumulate_grad_batches=data.accumulation(2),
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(RankRecorder(path=tmp_path), datamodule=data)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0][0] == [s * 8 + a * 4 + i for s in range(3) for a in range(2) for i in range(2)]
    assert ranks[1][0] == [sample + 2 for sample in ranks[0][0]]
    assert sorted(ranks[0][1] + ranks[1][1]) == list(range(8)) and len(ranks[0][1]) == 4


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1), (4, 2)])
@pytest.mark.parametrize("consumed", [0, 16])
def test_every_world_size_sees_the_same_global_order(
    prepared: Path, world_size: int, micro_batch_size: int, consumed: int
) -> None:
    data = make_module(prepared, micro_batch_size=micro_batch_size, global_batch_size=8)
    data.setup()
    data.consumed_samples = consumed
    dataset = PackedDataset(data.train_packing(), num_samples=40)
    ranks = [list(MicroBatchSampler(data, dataset, rank, world_size)) for rank in range(world_size)]
    accumulation = data.accumulation(world_size)
    for step in range(consumed // 8, 5):
        first = (step - consumed // 8) * accumulation
        seen = [sample for a in range(first, first + accumulation) for rank in ranks for sample in rank[a]]
        assert seen == list(range(step * 8, step * 8 + 8))
    assert all(len(rank) == (5 - consumed // 8) * accumulation for rank in ranks)
    assert len(MicroBatchSampler(data, dataset, 0, world_size)) == 5 * accumulation


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(prepared: Path, workers: int) -> None:
    modules = [make_module(prepared, num_workers=n) for n in (0, workers)]
    for module in modules:
        module.setup()
        module.consumed_samples = 8
    for expected, batch in zip(modules[0].train_dataloader(), modules[1].train_dataloader(), strict=True):
        assert all(torch.equal(torch.as_tensor(expected[k]), torch.as_tensor(batch[k])) for k in expected)


def test_batches_hold_what_the_packing_gives(prepared: Path) -> None:
    data = make_module(prepared, micro_batch_size=4)
    data.setup()
    packing = data.train_packing()
    batch = first_batch(data)
    assert {
        key: (tuple(v.shape), v.dtype) for key, v in batch.items() if key in ("tokens", "labels", "sample_ids")
    } == {
        "tokens": ((1, 256), torch.int64),
        "labels": ((1, 256), torch.int64),
        "sample_ids": ((4,), torch.int64),
    }
    cu_seqlens = batch["cu_seqlens"]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0 and cu_seqlens[-1] == 256
    assert (cu_seqlens.diff() > 0).all() and cu_seqlens.diff().max() <= batch["max_seqlen"] == 64
    assert {64, 128, 192} <= set(cu_seqlens.tolist())
    for row, sample in enumerate(batch["sample_ids"].tolist()):
        expected = packing.sequence(sample)
        assert batch["tokens"][0, row * 64 : row * 64 + 64].tolist() == expected.tokens.tolist()
        assert batch["labels"][0, row * 64 : row * 64 + 64].tolist() == expected.labels.tolist()
    joined = make_module(prepared, micro_batch_size=4, intra_document=False)
    joined.setup()
    assert first_batch(joined)["cu_seqlens"].tolist() == [0, 64, 128, 192, 256]


def test_validation_is_the_same_for_every_seed_and_comes_from_the_heldout_split(prepared: Path) -> None:
    batches: list[list[Any]] = []
    for seed in (1, 2):
        data = make_module(prepared, seed=seed)
        data.setup()
        loader: Any = data.val_dataloader()
        batches.append([batch["tokens"] for batch in loader])
    assert len(batches[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    store = TokenStore(prepared / "heldout")
    documents = [store.document(i).astype("<i8").tobytes() for i in range(store.num_documents)]
    for batch in loader:
        for piece in torch.tensor_split(batch["tokens"][0], batch["cu_seqlens"][1:-1].long()):
            assert any(piece.numpy().tobytes() in document for document in documents)
    assert make_module(prepared, val_sequences=0).val_dataloader() == []


def test_properties_are_known_after_setup(prepared: Path) -> None:
    data = make_module(prepared)
    with pytest.raises(RuntimeError, match="call setup"):
        _ = data.vocab_size
    data.setup()
    assert data.vocab_size == 400 and Path(data.tokenizer_path) == prepared / "tokenizer.model"
    assert data.tokenizer_fingerprint == TokenStore(prepared / "train").fingerprint_of_tokenizer


def test_the_state_restores_and_refuses_another_order(prepared: Path) -> None:
    data = make_module(prepared)
    data.setup()
    data.consumed_samples = 24
    state = json.loads(json.dumps(data.state_dict()))  # plain values only
    other = make_module(prepared, micro_batch_size=1)
    other.load_state_dict(state)
    assert other.consumed_samples == 24
    assert first_batch(other)["sample_ids"].tolist() == [24]
    with pytest.raises(ValueError, match="trained with data.seed 5, the config has 6"):
        make_module(prepared, seed=6).load_state_dict(state)
    with pytest.raises(ValueError, match="trained with data.sequence_length 64, the config has 32"):
        make_module(prepared, sequence_length=32).load_state_dict(state)
    regrouped = make_module(prepared, global_batch_size=10)
    regrouped.load_state_dict(state)
    with pytest.raises(ValueError, match="consumed_samples 24 is no whole number of global batches of 10"):
        regrouped.train_dataloader()


def test_the_state_refuses_the_same_corpus_in_other_shards(
    prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    again = [
        f"--tokenizer.path={prepared / 'tokenizer.model'}",
        "--heldout_fraction=0.2",
    ]
    other, same = (prepare_texts(tmp_path / size, *again, f"--shard_bytes={size}") for size in ("7000", "40000"))
    data = make_module(prepared)
    data.setup()
    state = json.loads(json.dumps(data.state_dict()))
    make_module(same).load_state_dict(state)
    with pytest.raises(
        ValueError, match=rf"trained on other shards of {other} \(\w{{12}}, now \w{{12}}\): it was prep"
    ):
        make_module(other).load_state_dict(state)
    del state["order"]["sources"][0]["content"]  # as before shards were recorded
    make_module(other).load_state_dict(state)
    state["order"]["sources"][0]["tokens"] += 1
    with pytest.raises(ValueError, match="trained with data.sources"):
        make_module(other).load_state_dict(state)


@pytest.mark.parametrize("passes", [1, 2])
def test_more_passes_than_one_are_said_as_training_begins(
    passes: int, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_module(prepared)
    data.setup()
    samples = passes * data.train_packing().sequences_per_pass
    monkeypatch.setattr(PackedDataModule, "_samples_of_run", lambda *_: samples)
    data.train_dataloader()
    said = capsys.readouterr().out
    assert ("2 passes over documents of" in said and "are planned; this is pass 1" in said) == (passes > 1), said


def test_the_stdlib_yaml_fits_the_data_module(monkeypatch: pytest.MonkeyPatch, prepared: Path, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PackedDataModule, "data")
    settings = parser.parse_args([f"--config={STDLIB_YAML}", "--data.sequence_length=64", "--data.val_sequences=8"])
    shutil.copytree(prepared, tmp_path / "prepared" / "stdlib")
    monkeypatch.chdir(tmp_path)
    data = parser.instantiate(settings).data
    data.prepare_data()
    data.setup()
    assert first_batch(data)["tokens"].shape == (1, 64 * 8)


def test_length_buckets_can_be_given_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  sources:\n    - path: a\n      weight: 2\n      length_buckets: {0: 1.0, 8192: 2.5}\n")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PackedDataModule, "data")
    data = parser.instantiate(parser.parse_args([f"--config={path}"])).data
    assert data.sources == [SourceConfig("a", 2.0, {0: 1.0, 8192: 2.5})]


def test_a_mixture_keeps_to_its_weights(prepared: Path, prepare_texts: Any, tmp_path: Path) -> None:
    tokenizer = f"--tokenizer.path={prepared / 'tokenizer.model'}"
    other = prepare_texts(tmp_path / "other", tokenizer, "--max_documents=30")
    data = PackedDataModule([SourceConfig(str(prepared), 3.0), SourceConfig(str(other), 1.0)], sequence_length=64)
    data.prepare_data()
    data.setup()
    streams = [data.train_packing().locate(i)[0] for i in range(400)]
    assert streams.count(0) == 300
