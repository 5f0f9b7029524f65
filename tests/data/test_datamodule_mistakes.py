"""What the data module refuses, before training starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data.datamodule import PackedDataModule, SourceConfig
from tests.data.conftest import make_module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight of source a is 0.0, expected a number above 0"),
        ({"length_buckets": {8: 1.0}}, "expected a bucket from 0 on"),
        ({"length_buckets": {0: -1.0}}, "expected factors >= 0"),
        ({"length_buckets": {0: 0.0}}, "one above 0"),
    ],
)
def test_bad_sources_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig("a", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "data.sequence_length is 1: expected a whole number at least 2"),
        ({"micro_batch_size": 0}, "data.micro_batch_size is 0: expected a whole number at least 1"),
        ({"micro_batch_size": 3}, "global_batch_size 8 is not a multiple of micro_batch_size 3 x 1 ranks"),
        ({"val_sequences": 9}, "val_sequences 9 is not a multiple of micro_batch_size 2 x 1 ranks"),
        ({"val_sequences": 10**6}, "val_sequences is 1000000, but the held-out splits give only"),
        ({"sequence_length": 10**7}, "fewer than one sequence of 10000000"),
        (
            {"global_batch_size": 10**6, "micro_batch_size": 10},
            "fewer than global_batch_size 1000000; set trainer.max_steps",
        ),
    ],
)
def test_bad_settings_are_named(prepared: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data = make_module(prepared, **options)
        data.setup()
        data.train_dataloader()
        data.val_dataloader()


def test_missing_and_mismatching_corpora_are_named(prepared: Path, prepare_texts: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.sources is empty"):
        PackedDataModule([])
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest.json does not exist; prepare the corpus first"):
        make_module(tmp_path / "nowhere").prepare_data()
    other = prepare_texts(tmp_path / "other", "--tokenizer.vocab_size=390")
    data = PackedDataModule([SourceConfig(str(prepared)), SourceConfig(str(other))], sequence_length=64)
    with pytest.raises(ValueError, match="sources have different tokenizers: .* prepare one with --tokenizer.path"):
        data.setup()
    alone = make_module(other)
    alone.setup()
    with pytest.raises(ValueError, match="no source has held-out documents"):
        alone.val_dataloader()


def test_a_damaged_shard_is_found_before_training_starts(prepared: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(prepared, tmp_path / "corpus")
    shard = corpus / "train" / "000001.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    make_module(corpus, verify="size").prepare_data()
    with pytest.raises(ValueError, match="000001.bin has sha256"):
        make_module(corpus).prepare_data()
