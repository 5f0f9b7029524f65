"""Model FLOPs and the peaks that utilisation is measured against."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import ModelConfig
from model.hierarchical.config import HierarchicalConfig
from model.nsa.config import BRANCHES, NSAConfig

# Dense bfloat16 tensor-core peaks in FLOP/s with float32 accumulation, from the vendor's datasheets (never the figures
# "with sparsity"), by what torch.cuda.get_device_name says without "NVIDIA". A name that only contains one of these is
# another device: an RTX A1000 is no A100, a MIG slice of an A100 neither.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200 120GB": 989e12,
    "GH200 480GB": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-SXM-64GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A800-SXM4-80GB": 312e12,
    "A800 80GB PCIe": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "RTX 6000 Ada Generation": 364e12,
    "GeForce RTX 4090": 165e12,
    "GeForce RTX 3090": 71e12,
}


# Time of entmax attention beside dense softmax's at 32,768 tokens: 0.5 with fresh weights, 0.58 and 0.71 on trained
# models near alpha 1.5 (results/kernels)
ENTMAX_ATTENTION = 0.6


def _normalised(device_name: str) -> str:
    words = device_name.casefold().split()
    return " ".join(words[1:] if words[:1] == ["nvidia"] else words)  # older drivers leave the vendor out


PEAK_BY_NAME = {_normalised(name): peak for name, peak in PEAK_FLOPS.items()}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s of a device (torch.cuda.get_device_name) for bfloat16 or float16 products; None where
    none is recorded."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return PEAK_BY_NAME.get(_normalised(device_name))


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: all matrices and the output head, the embedding table not."""
    head = config.head_size
    attention = config.d_model * head * (2 * config.n_heads + 2 * config.n_cached_heads)
    if config.attention.has_adaptive_temperature:
        attention += 2 * config.d_model * (config.n_heads - config.n_alibi_heads)
    if config.attention.nsa is not None:
        attention += _nsa_parameters(config, config.attention.nsa)
    if config.attention.dsa is not None:
        attention += config.attention.dsa.matrix_parameters(config.d_model)
    if config.attention.dms is not None:
        attention += config.attention.dms.extra_parameters(config.d_model, config.n_kv_heads)
    layer = attention + 3 * config.d_model * config.feed_forward_size
    return config.n_layers * layer + config.vocab_size * config.d_model


def _nsa_parameters(config: ModelConfig, nsa: NSAConfig) -> int:
    """What a layer has besides: the gates, and the weights of both phi, which each head's compressed keys and values
    are multiplied with, one every compress_stride tokens."""
    hidden = config.head_size if nsa.compress_hidden is None else nsa.compress_hidden
    phi = hidden * config.head_size * (nsa.compress_length + 1)
    return BRANCHES * config.d_model * config.n_heads + round(2 * phi * config.n_kv_heads / nsa.compress_stride)


def sequence_cost(
    config: ModelConfig, document_lengths: Sequence[int] | NDArray[np.int64], teacher: ModelConfig | None = None
) -> float:
    """How long a sequence takes beside others, in FLOPs of `train_flops` at softmax's speed; of kinds of
    model.trained_sparse by their density. teacher: a frozen model that reads it too, forward alone."""
    share = ENTMAX_ATTENTION if config.attention.is_entmax else density(config, document_lengths)
    cost = _flops(config, document_lengths, share)
    return cost if teacher is None else cost + sequence_cost(teacher, document_lengths) / 3


def density(config: ModelConfig, document_lengths: Sequence[int] | NDArray[np.int64]) -> float:
    """What attention reads of one document after another, lengths in tokens, as a share of dense attention's: as
    NSAConfig and DSAConfig say; of hierarchical entmax all, since which blocks are dead is known to the weights alone,
    and the scores of summaries; 1 for kinds that weigh every key, and for dms, likewise."""
    if config.attention.nsa is not None:
        return config.attention.nsa.density(document_lengths)
    if config.attention.dsa is not None:
        return config.attention.dsa.density(document_lengths, config.n_heads, config.head_size)
    if config.attention.hierarchical is not None:
        return 1 + _summaries(config.attention.hierarchical, document_lengths)
    return 1.0


def _summaries(sizes: HierarchicalConfig, document_lengths: Sequence[int] | NDArray[np.int64]) -> float:
    """The scores of summaries beside dense attention, whose keys have a second product, with values."""
    lengths = np.asarray(document_lengths, np.float64)
    return 0.5 * sizes.summaries_read(document_lengths) / float((lengths * (lengths + 1) / 2).sum())


def _flops(config: ModelConfig, document_lengths: Sequence[int] | NDArray[np.int64], attention: float) -> float:
    """Of `train_flops`, with this share of attention's."""
    lengths = np.asarray(document_lengths, np.float64)
    products = 6.0 * matmul_parameters(config) * float(lengths.sum())
    scores = 6.0 * config.n_layers * config.n_heads * config.head_size * float(np.square(lengths).sum())
    return products + attention * scores


def forward_flops(config: ModelConfig, document_lengths: Sequence[int]) -> float:
    """FLOPs of one forward pass over packed documents, a third of train_flops: what a frozen model takes."""
    return train_flops(config, document_lengths) / 3


def train_flops(config: ModelConfig, document_lengths: Sequence[int]) -> float:
    """FLOPs of one forward and backward pass over packed documents.

    6 per weight and token, plus 6 * L * H * D * n ** 2 for causal attention at half within each document of n
    tokens: two products of 2 * H * D * n ** 2 / 2 in the forward pass and twice that in the backward pass. Sparsity,
    NSA's branches, DSA's indexer, summaries of blocks, a sliding window and recomputation change what is executed, not
    this count.
    """
    return _flops(config, document_lengths, 1.0)
