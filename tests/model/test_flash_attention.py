"""FlashAttention-4: when it is taken, what is said where it is not, and its results on a GPU that has it."""

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import Tensor

from model import flash_attention, softmax
from model.config import AttentionConfig, ModelConfig
from tests.kernels.helpers import needs_cuda

GPU = torch.device("cuda", 0)
MODEL: dict[str, Any] = dict(vocab_size=64, n_layers=1, d_model=64, n_heads=4, n_kv_heads=2, d_ff=64, positions="rope")
SOFTMAX = ModelConfig(**MODEL, attention=AttentionConfig(kind="softmax"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU with the package on it, as far as `activate` can tell: what it calls, and the capability."""
    said: dict[str, Any] = dict(capability=(9, 0), calls=[])
    monkeypatch.setattr(flash_attention, "version", lambda name: {"flash-attn-4": "4.0.0b16"}[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: said["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", said["calls"].append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: said["calls"].append("torch's own"))
    monkeypatch.setattr(flash_attention, "try_kernels", lambda config, device: None)
    yield said
    flash_attention.deactivate()


def test_taken_where_it_is_installed_and_works(installed: dict[str, Any]) -> None:
    told = flash_attention.activate(SOFTMAX, GPU)
    assert told == "softmax attention by FlashAttention-4 (flash-attn-4 4.0.0b16)"
    assert flash_attention.is_active() and installed["calls"] == ["FA4"]
    flash_attention.deactivate()
    flash_attention.deactivate()  # once more changes nothing
    assert not flash_attention.is_active() and installed["calls"] == ["FA4", "torch's own"]


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        (dict(attention=AttentionConfig(kind="asentmax")), GPU),
        (dict(positions="nape"), GPU),
        (dict(window=128), GPU),
        ({}, torch.device("cpu")),
    ],
    ids=["entmax", "alibi", "window", "cpu"],
)
def test_nothing_is_said_of_attention_that_it_cannot_compute(
    installed: dict[str, Any], changes: dict[str, Any], device: torch.device
) -> None:
    config = ModelConfig(**MODEL | dict(attention=AttentionConfig(kind="softmax")) | changes)
    assert flash_attention.activate(config, device) is None
    assert not flash_attention.is_active() and not installed["calls"]


def test_nothing_is_said_where_it_is_not_installed(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flash_attention, "version", missing)
    assert flash_attention.activate(SOFTMAX, GPU) is None and not flash_attention.is_active()


def test_a_gpu_without_kernels_is_named(installed: dict[str, Any]) -> None:
    installed["capability"] = (8, 0)
    told = flash_attention.activate(SOFTMAX, GPU)
    assert told == "flash-attn-4 4.0.0b16 has no kernels for A GPU: attention by cuDNN and FlashAttention-2"
    assert not flash_attention.is_active() and not installed["calls"]


def test_a_package_that_fails_is_named_and_left(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A later model is not left with its kernels."""

    def fail(config: ModelConfig, device: torch.device) -> None:
        raise ValueError("too many values to unpack\n(expected 2)")

    assert flash_attention.activate(SOFTMAX, GPU) and flash_attention.is_active()
    monkeypatch.setattr(flash_attention, "try_kernels", fail)
    told = flash_attention.activate(SOFTMAX, GPU)
    assert told == (
        f"flash-attn-4 4.0.0b16 cannot be used with torch {torch.__version__} (ValueError: too many values to unpack "
        "(expected 2)): attention by cuDNN and FlashAttention-2"
    )
    assert not flash_attention.is_active() and installed["calls"] == ["FA4", "torch's own"] * 2


def plain_kernels(spoil: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """`dense` and `packed` by plain products, the latter spoilt."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention._plain_products(q, k, v, [0, q.shape[2]])

    def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return spoil(flash_attention._plain_products(*rows, cu_seqlens.tolist())[0].transpose(0, 1))

    return dense, packed


def test_the_trial_passes_right_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, packed = plain_kernels(lambda out: out)
    monkeypatch.setattr(flash_attention, "dense", dense)
    monkeypatch.setattr(flash_attention, "packed", packed)
    flash_attention.try_kernels(SOFTMAX, torch.device("cpu"))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda out: out * 1.02, "output of packed"),
        (lambda out: out * torch.nan, "output of packed"),
        (lambda out: (1.05 * out) + (out - 1.05 * out).detach(), "dq of packed"),
    ],
    ids=["output", "nan", "gradient"],
)
def test_the_trial_refuses_wrong_kernels(
    spoil: Callable[[Tensor], Tensor], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, packed = plain_kernels(spoil)
    monkeypatch.setattr(flash_attention, "dense", dense)
    monkeypatch.setattr(flash_attention, "packed", packed)
    with pytest.raises(RuntimeError, match=f"{part} attention is off by"):
        flash_attention.try_kernels(SOFTMAX, torch.device("cpu"))


def test_softmax_attention_goes_through_it_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, without a window or ALiBi."""
    taken: list[torch.dtype] = []

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.append(q.dtype)
        return q

    monkeypatch.setattr(flash_attention, "dense", dense)
    monkeypatch.setattr(flash_attention, "_active", True)
    for dtype in (torch.bfloat16, torch.float32):
        for window in (None, 4):
            x = torch.randn(1, 2, 8, 8, dtype=dtype)
            softmax.softmax_attention(
                x, x, x, cu_seqlens=None, max_seqlen=8, alibi_slopes=None, window=window, block_mask=None
            )
    assert taken == [torch.bfloat16]


def test_compiled_with_results_laid_out_as_its_kernels_lay_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes results to be laid out as queries, keys and values are, which in the model are transposed
    views. Those of FlashAttention-4 are contiguous."""
    laid_out: list[bool] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        laid_out.append(all(x.is_contiguous() for x in (q, k, v)))
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = flash_attention._plain_products(*rows, cu_q.tolist())[0].transpose(0, 1).contiguous()
        logsumexp = torch.zeros(q.shape[1], q.shape[0])
        return out, logsumexp, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ones(x.shape) for x in (q, k, v))

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", forward, "CPU")
    kernels.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(flash_attention, "_active", True)
    cuts = [0, 5, 5, 24]
    bounds = torch.tensor(cuts, dtype=torch.int32)
    attend = torch.compile(lambda q, k, v: softmax._varlen(q, k, v, bounds, 19, None))
    torch.manual_seed(0)
    *inputs, gradient = (torch.randn(1, heads, 24, 8) for heads in (4, 2, 2, 4))
    try:
        found = flash_attention._pass(attend, inputs, gradient, torch.float32)
    finally:
        kernels._destroy()
    assert laid_out and all(laid_out)
    torch.testing.assert_close(
        found[0], flash_attention._plain_products(*(x.bfloat16().float() for x in inputs), [0, 5, 24])
    )
    for ours, given in zip(found[1:], inputs, strict=True):
        assert torch.equal(ours, torch.ones(given.shape))


@needs_cuda
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 128), (8, 1, 64)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu(heads: int, kv_heads: int, head_dim: int, compiled: bool) -> None:
    """Outputs and gradients of softmax_attention against float64: within four times what plain products in bfloat16
    lose."""
    config = ModelConfig(
        **MODEL | dict(d_model=heads * head_dim, n_heads=heads, n_kv_heads=kv_heads),
        attention=AttentionConfig(kind="softmax"),
    )
    told = flash_attention.activate(config, GPU)
    if not flash_attention.is_active():
        pytest.skip(told or "flash-attn-4 is not installed")
    attend: Any = torch.compile(softmax.softmax_attention) if compiled else softmax.softmax_attention
    torch.manual_seed(0)
    for cuts, rows in (([0, 700], 2), ([0, 1, 130, 130, 1000], 1)):
        sizes = [(rows, n, cuts[-1], head_dim) for n in (heads, kv_heads, kv_heads, heads)]
        *inputs, gradient = (torch.randn(size, device=GPU) for size in sizes)
        cu_seqlens = None if len(cuts) == 2 else torch.tensor(cuts, dtype=torch.int32, device=GPU)
        options = dict(cu_seqlens=cu_seqlens, max_seqlen=cuts[-1], alibi_slopes=None, window=None, block_mask=None)

        def plain(q: Tensor, k: Tensor, v: Tensor, cuts: list[int] = cuts) -> Tensor:
            return flash_attention._plain_products(q, k, v, sorted(set(cuts)))

        def ours(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any] = options) -> Tensor:
            out: Tensor = attend(q, k, v, **options)
            return out

        truth = flash_attention._pass(plain, inputs, gradient, torch.float64)
        lost = flash_attention._pass(plain, inputs, gradient, torch.bfloat16)
        for found, rounded, true in zip(
            flash_attention._pass(ours, inputs, gradient, torch.bfloat16), lost, truth, strict=True
        ):
            assert (found - true).norm() <= 4 * (rounded - true).norm()
    flash_attention.deactivate()
