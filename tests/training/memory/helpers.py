"""Small models, and how they train, for the tests of the memory estimate."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import AttentionConfig, DMSConfig, DSAConfig, HierarchicalConfig, ModelConfig, NSAConfig
from model.transformer import Transformer
from training.memory.setup import Setup
from training.module import LanguageModule
from training.step.optim import OptimizerConfig
from training.step.teacher import DistillConfig, Teacher

TOKENS, LENGTH = 512, 256
BASE: dict[str, Any] = dict(vocab_size=128, n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_ff=160)
HIERARCHICAL = AttentionConfig(kind="hierarchical", hierarchical=HierarchicalConfig(block=8))
NSA = NSAConfig(compress_length=8, compress_stride=4, select_block=8, select_count=4, window=32)
DMS = AttentionConfig(kind="dms", dms=DMSConfig(window=20))
DSA = DSAConfig(index_dim=16, select_tokens=40)
MODELS = {
    "asentmax-nape": ModelConfig(**BASE),
    "entmax-nope-fixed-qk_norm": ModelConfig(
        **BASE, positions="nope", qk_norm=True, attention=AttentionConfig(kind="entmax", learn_alpha=False)
    ),
    "softmax-rope": ModelConfig(**BASE, positions="rope", attention=AttentionConfig(kind="softmax")),
    "ssmax-rope-untied": ModelConfig(
        **BASE, positions="rope", tie_embeddings=False, attention=AttentionConfig(kind="ssmax")
    ),
    "nsa-rope": ModelConfig(**BASE, positions="rope", attention=AttentionConfig(kind="nsa", nsa=NSA)),
    "hierarchical-rope": ModelConfig(**BASE, positions="rope", attention=HIERARCHICAL),
    "nsa-nape": ModelConfig(**BASE, attention=AttentionConfig(kind="nsa", nsa=NSA)),
    "dms-rope": ModelConfig(**BASE, positions="rope", attention=DMS),
    "dsa-rope": ModelConfig(**BASE, positions="rope", attention=AttentionConfig(kind="dsa", dsa=DSA)),
    "dsa-nape": ModelConfig(**BASE, attention=AttentionConfig(kind="dsa", dsa=DSA)),
}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "offload": {"activation_checkpointing": "offload"},
    "tiled": {"mlp_tile_tokens": 100},
    "full-tiled": {"activation_checkpointing": "full", "mlp_tile_tokens": 100},
}


# graphs on CPUs are those of GPUs only with the products themselves, in place of emulated ones
needs_float8_by_row = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="older FP8 products on CPUs have one scale"
)


def make(
    network: ModelConfig, precision: str = "32-true", teacher: ModelConfig | None = None, **options: Any
) -> tuple[LanguageModule, Setup]:
    torch.manual_seed(0)
    options = {"loss_chunk_tokens": 128, **options}
    distill = DistillConfig() if teacher is None else DistillConfig("teacher", weight=0.5)
    module = LanguageModule(network, OptimizerConfig(), loss_backend="chunked", distill=distill, **options)
    if teacher is not None:
        module.teacher = Teacher(Transformer(teacher), Path("teacher"), 0)
        tiles = options.get("mlp_tile_tokens", 0)
        module.teacher.place(torch.device("cpu"), precision, compile=False, tile_tokens=tiles)
    setup = Setup(
        network=network, tokens=TOKENS, sequence_length=LENGTH, cuda=False, precision=precision, teacher=teacher,
        **options,
    )  # fmt: skip
    return module, setup


def batch(slices: int = 1) -> dict[str, Any]:
    bounds = torch.tensor([0, LENGTH, TOKENS], dtype=torch.int32)
    tokens = torch.randint(128, (1, TOKENS // slices))
    return {"tokens": tokens, "labels": tokens.clone(), "cu_seqlens": bounds, "max_seqlen": LENGTH}


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)
