import pytest
import torch

from model.config import AttentionConfig, ModelConfig, NSAConfig
from model.flops import forward_flops, matmul_parameters, peak_flops, sequence_cost, train_flops
from model.transformer import Transformer


@pytest.mark.parametrize("kind", ["softmax", "asentmax", "dms", "hierarchical"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(kind, tied: bool) -> None:
    config = ModelConfig(tie_embeddings=tied, attention=AttentionConfig(kind=kind))
    matrices = sum(p.numel() for p in Transformer(config).parameters() if p.dim() == 2)
    assert matmul_parameters(config) == matrices - (0 if tied else config.vocab_size * config.d_model)


def test_nsa_multiplies_with_phi_once_a_stride() -> None:
    nsa = NSAConfig(compress_length=32, compress_stride=16)
    config = ModelConfig(n_layers=1, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=50, head_dim=16,
                         attention=AttentionConfig(kind="nsa", nsa=nsa))  # fmt: skip
    matrices = {n: p.numel() for n, p in Transformer(config).named_parameters() if p.dim() == 2}
    phi = sum(count for name, count in matrices.items() if ".sparse.compress" in name and ".place." not in name)
    rest = sum(count for name, count in matrices.items() if ".sparse.compress" not in name)
    assert matmul_parameters(config) == rest + phi * 2 / 16  # of the vectors of two heads, one every 16 tokens
    assert phi == 2 * (32 * 16 * 16 + 16 * 16)


def test_a_long_sequence_costs_nsa_less_than_softmax() -> None:
    def attention(kind: str, lengths: list[int]) -> float:
        config = ModelConfig(attention=AttentionConfig(kind=kind))  # type: ignore[arg-type]
        return sequence_cost(config, lengths) - 6 * matmul_parameters(config) * sum(lengths)

    read = NSAConfig().density([8192, 32768])
    assert attention("nsa", [8192, 32768]) == pytest.approx(read * attention("softmax", [8192, 32768]), rel=1e-9)
    assert attention("nsa", [32768]) < 0.25 * attention("softmax", [32768])


def test_hierarchical_entmax_costs_softmax_and_the_scores_of_summaries() -> None:
    """Counted query by query; a score is half of what dense attention has a pair, its weight times a value the rest."""

    def attention(kind: str) -> float:
        config = ModelConfig(attention=AttentionConfig(kind=kind))  # type: ignore[arg-type]
        return sequence_cost(config, [700, 64, 1]) - 6 * matmul_parameters(config) * 765

    summaries = sum(t // 64 + 1 for n in (700, 64, 1) for t in range(n))
    pairs = sum(t + 1 for n in (700, 64, 1) for t in range(n))
    assert attention("hierarchical") == pytest.approx((1 + summaries / pairs / 2) * attention("softmax"), rel=1e-9)


def test_formula_by_hand() -> None:
    config = ModelConfig(n_layers=3, n_heads=8, n_kv_heads=8, head_dim=16, attention=AttentionConfig(kind="softmax"))
    weights = matmul_parameters(config)
    assert train_flops(config, [100]) == 6 * weights * 100 + 6 * 3 * 8 * 16 * 100**2
    assert forward_flops(config, [100]) == 2 * weights * 100 + 2 * 3 * 8 * 16 * 100**2
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
