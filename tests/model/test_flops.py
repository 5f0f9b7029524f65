import pytest
import torch

from model.config import AttentionConfig, ModelConfig
from model.flops import matmul_parameters, peak_flops, train_flops
from model.transformer import Transformer


@pytest.mark.parametrize("kind", ["softmax", "asentmax"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(kind, tied: bool) -> None:
    config = ModelConfig(tie_embeddings=tied, attention=AttentionConfig(kind=kind))
    matrices = sum(p.numel() for p in Transformer(config).parameters() if p.dim() == 2)
    assert matmul_parameters(config) == matrices - (0 if tied else config.vocab_size * config.d_model)


def test_formula_by_hand() -> None:
    config = ModelConfig(n_layers=3, n_heads=8, n_kv_heads=8, head_dim=16, attention=AttentionConfig(kind="softmax"))
    weights = matmul_parameters(config)
    assert train_flops(config, [100]) == 6 * weights * 100 + 6 * 3 * 8 * 16 * 100**2
    assert train_flops(config, [50, 50]) == 6 * weights * 100 + 6 * 3 * 8 * 16 * 2 * 50**2


def test_peaks_are_dense_and_known_names_match() -> None:
    assert peak_flops("NVIDIA H200", torch.bfloat16) == peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.float16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) is None
    assert peak_flops("A100-SXM4-80GB", torch.bfloat16) == 312e12  # as older drivers say it
    assert peak_flops("NVIDIA GeForce RTX  4090 ", torch.bfloat16) == 165e12
    for name in ("RTX A1000", "RTX A4000", "A10G", "A100-SXM4-40GB MIG 1g.5gb", "GeForce RTX 4090 D", "future"):
        assert peak_flops(f"NVIDIA {name}", torch.bfloat16) is None
