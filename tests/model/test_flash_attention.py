"""FlashAttention-4: when it is taken, what is said where it is not, and its results on a GPU that has it."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import flash_attention, softmax
from model.config import AttentionConfig, ModelConfig
from model.flash_attention import Heads, activate, outputs_and_gradients, plain_products
from tests.kernels.helpers import needs_cuda

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
OURS = "attention by torch's own kernels"
MODEL: dict[str, Any] = dict(vocab_size=64, n_layers=1, d_model=64, n_heads=4, n_kv_heads=2, d_ff=64, positions="rope")


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(**MODEL | dict(attention=AttentionConfig(kind="softmax")) | changes)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU with the package on it, as far as `activate` can tell: what it calls, what it tries, and the capability."""
    said = SimpleNamespace(capability=(9, 0), calls=[], tried=[])
    own = partial(said.calls.append, "torch's own")
    monkeypatch.setattr(flash_attention, "version", lambda name: {"flash-attn-4": "4.0.0b16"}[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: said.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", said.calls.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", own)
    monkeypatch.setattr(flash_attention, "try_kernels", lambda *given: said.tried.append(given))
    yield said
    flash_attention.deactivate()


def test_taken_where_it_is_installed_and_works(installed: SimpleNamespace) -> None:
    told = activate([model()], GPU, BF16)
    assert told == "softmax attention by FlashAttention-4 (flash-attn-4 4.0.0b16)"
    assert flash_attention.is_active() and installed.calls == ["FA4"]
    assert installed.tried == [(Heads(4, 2, 16), GPU, BF16, False)]
    flash_attention.deactivate()
    flash_attention.deactivate()  # once more changes nothing
    assert not flash_attention.is_active() and installed.calls == ["FA4", "torch's own"]


def test_tried_with_the_heads_of_each_model_and_rank(installed: SimpleNamespace) -> None:
    """Four ranks that share sequences share two key heads by two; a model of entmax is none of them."""
    teacher, entmax = model(d_model=512, n_heads=8, n_kv_heads=8), model(attention=AttentionConfig(kind="entmax"))
    activate([model(), teacher, entmax], GPU, torch.float16, ranks=4, compiled=True)
    assert {heads for heads, *_ in installed.tried} == {Heads(1, 1, 16), Heads(2, 2, 64)}
    assert {(dtype, compiled) for *_, dtype, compiled in installed.tried} == {(torch.float16, True)}


@pytest.mark.parametrize("changes", [dict(positions="nape"), dict(window=128)], ids=["alibi", "window"])
@pytest.mark.parametrize("beside", [[], [model()]], ids=["alone", "teacher"])
def test_attention_that_it_cannot_compute_is_told(
    installed: SimpleNamespace, changes: dict[str, Any], beside: list[ModelConfig]
) -> None:
    told = activate([model(**changes), *beside], GPU, BF16)
    assert told == (f"flash-attn-4 4.0.0b16 is not used, attention has ALiBi (positions: nape) or a window: {OURS}")
    assert not flash_attention.is_active() and not installed.calls


@pytest.mark.parametrize(
    ("kind", "device", "dtype"),
    [("asentmax", GPU, BF16), ("softmax", torch.device("cpu"), BF16), ("softmax", GPU, None)],
    ids=["entmax", "cpu", "float32"],
)
def test_nothing_is_said_where_it_has_no_part(
    installed: SimpleNamespace, kind: Any, device: torch.device, dtype: torch.dtype | None
) -> None:
    assert activate([model(attention=AttentionConfig(kind=kind))], device, dtype) is None
    assert not flash_attention.is_active() and not installed.calls


def test_nothing_is_said_where_it_is_not_installed(installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flash_attention, "version", missing)
    assert activate([model()], GPU, BF16) is None and not flash_attention.is_active()


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_a_gpu_without_kernels_is_named(installed: SimpleNamespace, capability: tuple[int, int]) -> None:
    installed.capability = capability
    assert activate([model()], GPU, BF16) == f"flash-attn-4 4.0.0b16 has no kernels for A GPU: {OURS}"
    assert not flash_attention.is_active() and not installed.calls


def test_a_package_that_fails_is_named_and_left(installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later model is not left with its kernels."""

    def fail(*given: Any) -> None:
        raise ValueError("too many values to unpack\n(expected 2)")

    assert activate([model()], GPU, BF16) and flash_attention.is_active()
    monkeypatch.setattr(flash_attention, "try_kernels", fail)
    assert activate([model()], GPU, BF16) == (
        f"flash-attn-4 4.0.0b16 cannot be used with torch {torch.__version__} (ValueError: too many values to unpack "
        f"(expected 2)): {OURS}"
    )
    assert not flash_attention.is_active() and installed.calls == ["FA4", "torch's own"] * 2


def test_a_crash_that_breaks_the_device_is_no_reason_to_go_on(
    installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*given: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(flash_attention, "try_kernels", crash)
    monkeypatch.setattr(torch.cuda, "synchronize", crash)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        activate([model()], GPU, BF16)
    assert not flash_attention.is_active()


def test_suspended_for_a_while(installed: SimpleNamespace) -> None:
    """And not tried again behind it, nor taken where it was not."""
    with flash_attention.suspended():
        pass
    assert not flash_attention.is_active() and not installed.calls
    activate([model()], GPU, BF16)
    with pytest.raises(KeyError), flash_attention.suspended():
        assert not flash_attention.is_active() and installed.calls == ["FA4", "torch's own"]
        raise KeyError
    assert flash_attention.is_active() and installed.calls == ["FA4", "torch's own", "FA4"]
    assert len(installed.tried) == 1


Spoil = Callable[[Tensor], Tensor]


def stand_in(monkeypatch: pytest.MonkeyPatch, spoil: Spoil = lambda out: out, mixes: bool = False) -> list[tuple]:
    """Plain products as `dense` and, spoilt, as `packed`, which mixes documents or does not. Returns the sizes of q and
    k that they are called with."""
    sizes: list[tuple] = []

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes.append((q.shape, k.shape))
        return plain_products(q, k, v, [0, q.shape[2]])

    def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        sizes.append((q.shape, k.shape))
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        cuts = [0, len(q)] if mixes else cu_seqlens.tolist()
        return spoil(plain_products(*rows, cuts=cuts)[0].transpose(0, 1))

    monkeypatch.setattr(flash_attention, "dense", dense)
    monkeypatch.setattr(flash_attention, "packed", packed)
    return sizes


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_trial_passes_right_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sizes that it is told."""
    sizes = stand_in(monkeypatch)
    flash_attention.try_kernels(Heads(6, 2, 24), torch.device("cpu"), dtype, compiled=False)
    assert sizes == [((1, 6, 256, 24), (1, 2, 256, 24)), ((256, 6, 24), (256, 2, 24))]


@pytest.mark.parametrize(
    ("spoil", "mixes", "part"),
    [
        (lambda out: out * 1.02, False, "output of packed"),
        (lambda out: out * torch.nan, False, "output of packed"),
        (lambda out: (1.05 * out) + (out - 1.05 * out).detach(), False, "dq of packed"),
        (lambda out: out, True, "output of packed"),
    ],
    ids=["output", "nan", "gradient", "documents"],
)
def test_the_trial_refuses_wrong_kernels(spoil: Spoil, mixes: bool, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, spoil, mixes)
    with pytest.raises(RuntimeError, match=f"{part} attention is off by"):
        flash_attention.try_kernels(Heads(4, 2, 16), torch.device("cpu"), BF16, compiled=False)


def test_the_trial_compiles_for_models_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a compiler that spoils what it compiles."""
    stand_in(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda attend: lambda *inputs: 1.02 * attend(*inputs))
    flash_attention.try_kernels(Heads(4, 2, 16), torch.device("cpu"), BF16, compiled=False)
    with pytest.raises(RuntimeError, match="output of compiled dense attention is off by"):
        flash_attention.try_kernels(Heads(4, 2, 16), torch.device("cpu"), BF16, compiled=True)


def test_whole_rows_are_causal_and_by_flash_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's FlashAttention for CPUs stands in for it here."""
    asked: list[Any] = []
    choose = flash_attention.sdpa_kernel
    monkeypatch.setattr(flash_attention, "sdpa_kernel", lambda backends: asked.append(backends) or choose(backends))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 8) for heads in (4, 2, 2))
    out = flash_attention.dense(q, k, v)
    assert asked == [[torch.nn.attention.SDPBackend.FLASH_ATTENTION]]
    torch.testing.assert_close(out, plain_products(q, k, v, [0, 40]))


def test_softmax_attention_goes_through_it_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows and documents, without a window."""
    taken: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(flash_attention, "dense", lambda q, k, v: taken.append(("rows", q.dtype)) or q)
    monkeypatch.setattr(flash_attention, "packed", lambda q, *rest: taken.append(("documents", q.dtype)) or q)
    monkeypatch.setattr(softmax, "varlen_attn", lambda q, *rest, **options: q)
    monkeypatch.setattr(flash_attention, "_active", True)
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    for dtype in (BF16, torch.float32):
        for window in (None, 4):
            x = torch.randn(1, 2, 8, 8, dtype=dtype)
            softmax.softmax_attention(
                x, x, x, cu_seqlens=None, max_seqlen=8, alibi_slopes=None, window=window, block_mask=None
            )
    for window in (None, 4):
        softmax._varlen(x, x, x, bounds, 8, window)
    assert taken == [("rows", BF16), ("documents", torch.float32)]


def test_compiled_with_results_laid_out_as_its_kernels_lay_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes results to be laid out as queries, keys and values are, which in the model are transposed
    views. Those of FlashAttention-4 are contiguous."""
    laid_out: list[bool] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **_: Any
    ) -> tuple[Tensor, ...]:
        longest, also_longest, dropout, causal, debug = rest
        assert (longest, also_longest, dropout, causal, debug) == (19, 19, 0.0, True, False) and cu_q is cu_k
        laid_out.append(all(x.is_contiguous() for x in (q, k, v)))
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = plain_products(*rows, cuts=cu_q.tolist())[0].transpose(0, 1).contiguous()
        logsumexp = torch.zeros(q.shape[1], q.shape[0])
        return out, logsumexp, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ones(x.shape) for x in (q, k, v))

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", forward, "CPU")
    kernels.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(flash_attention, "_active", True)
    bounds = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
    attend = torch.compile(lambda q, k, v: softmax._varlen(q, k, v, bounds, 19, None))
    torch.manual_seed(0)
    *inputs, gradient = (torch.randn(1, heads, 24, 8) for heads in (4, 2, 2, 4))
    try:
        found = outputs_and_gradients(attend, inputs, gradient, torch.float32, torch.float32)
    finally:
        kernels._destroy()
    assert laid_out and all(laid_out)
    torch.testing.assert_close(found[0], plain_products(*inputs, cuts=[0, 5, 24]))
    for ours, given in zip(found[1:], inputs, strict=True):
        assert torch.equal(ours, torch.ones(given.shape))


@needs_cuda
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 128), (8, 1, 64)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu(heads: int, kv_heads: int, head_dim: int, compiled: bool) -> None:
    """Outputs and gradients of softmax_attention against float64: within four times what plain products in bfloat16
    lose."""
    config = model(d_model=heads * head_dim, n_heads=heads, n_kv_heads=kv_heads)
    told = activate([config], GPU, BF16, compiled=compiled)
    if not flash_attention.is_active():
        pytest.skip(told or "flash-attn-4 is not installed")
    attend: Any = torch.compile(softmax.softmax_attention) if compiled else softmax.softmax_attention
    torch.manual_seed(0)
    for cuts, rows in (([0, 700], 2), ([0, 1, 130, 130, 1000], 1)):
        sizes = [(rows, n, cuts[-1], head_dim) for n in (heads, kv_heads, kv_heads, heads)]
        *inputs, gradient = (torch.randn(size, device=GPU) for size in sizes)
        cu_seqlens = None if len(cuts) == 2 else torch.tensor(cuts, dtype=torch.int32, device=GPU)
        options = dict(cu_seqlens=cu_seqlens, max_seqlen=cuts[-1], alibi_slopes=None, window=None, block_mask=None)
        plain = partial(plain_products, cuts=sorted(set(cuts)))
        truth = outputs_and_gradients(plain, inputs, gradient, BF16, torch.float64)
        lost = outputs_and_gradients(plain, inputs, gradient, BF16, BF16)
        found = outputs_and_gradients(partial(attend, **options), inputs, gradient, BF16, BF16)
        for ours, rounded, true in zip(found, lost, truth, strict=True):
            assert (ours - true).norm() <= 4 * (rounded - true).norm()
    flash_attention.deactivate()
