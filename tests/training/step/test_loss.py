"""The chunked loss against torch's cross entropy."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from training.step.loss import IGNORE_INDEX, linear_cross_entropy, resolve_loss_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def problem(tokens: int, dtype: torch.dtype, width: int = 12, vocab: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = IGNORE_INDEX
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (50, 7), (50, 50), (50, 4096), (63, 64), (65, 64)])
def test_equals_plain_cross_entropy_in_float64(tokens: int, chunk: int) -> None:
    hidden, weight, labels = problem(tokens, torch.float64)
    loss, z_sum = linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk_tokens=chunk)
    expected = plain(hidden, weight, labels)
    assert z_sum == 0
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    scale = 0.37  # an upstream gradient other than 1
    ours = torch.autograd.grad(loss * scale, (hidden, weight))
    theirs = torch.autograd.grad(expected * scale, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def plain_z(hidden: Tensor, weight: Tensor, labels: Tensor, coefficient: float) -> Tensor:
    normaliser = torch.logsumexp((hidden @ weight.T).double(), dim=1)
    return coefficient * normaliser[labels != IGNORE_INDEX].square().sum()


@pytest.mark.parametrize("coefficient", [1e-4, 0.1])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (50, 7), (65, 64)])
def test_z_loss_equals_its_formula_in_float64(tokens: int, chunk: int, coefficient: float) -> None:
    hidden, weight, labels = problem(tokens, torch.float64)
    labels[0] = 3
    total, z_sum = linear_cross_entropy(
        hidden, weight, labels, backend="chunked", chunk_tokens=chunk, z_loss=coefficient
    )
    z_expected = plain_z(hidden, weight, labels, coefficient)
    expected = plain(hidden, weight, labels) + z_expected
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_sum, z_expected, rtol=1e-12, atol=1e-12)
    assert z_sum > 0 and not z_sum.requires_grad
    ours = torch.autograd.grad(total * 0.37, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.37, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_z_loss_by_hand() -> None:
    """Two tokens of equal logits 1 and 2 over 4 words: the normalisers are 1 + log 4 and 2 + log 4."""
    hidden, weight = torch.tensor([[1.0], [2.0]]), torch.ones(4, 1)
    total, z_sum = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 3]), backend="chunked", chunk_tokens=8, z_loss=0.5
    )
    log_4 = math.log(4)
    z_loss = 0.5 * ((1 + log_4) ** 2 + (2 + log_4) ** 2)
    assert float(z_sum) == pytest.approx(z_loss) and float(total) == pytest.approx(2 * log_4 + z_loss)


@pytest.mark.parametrize("backend", ["chunked", "liger"])
@pytest.mark.parametrize("coefficient", [0.0, 0.05])
def test_gradients_in_bfloat16_are_as_exact_as_plain_ones(backend: str, coefficient: float) -> None:
    """At most twice what plain PyTorch loses in the same dtype, beside what rounding the gradients themselves loses."""
    if backend == "liger":
        pytest.importorskip("liger_kernel")
    device = CUDA if torch.cuda.is_available() else CPU
    if backend == "liger" and device == CPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device or Triton's interpreter")
    values = [t.detach() for t in problem(60, torch.float32)]
    hidden, weight, labels = (t.to(device).requires_grad_(t.is_floating_point()) for t in values)
    exact = plain(hidden.double(), weight.double(), labels) + plain_z(
        hidden.double(), weight.double(), labels, coefficient
    )
    with torch.autocast(device.type, torch.bfloat16):
        total, z_sum = linear_cross_entropy(
            hidden, weight, labels, backend=backend, chunk_tokens=25, z_loss=coefficient
        )
        rough = plain(hidden, weight, labels) + plain_z(hidden, weight, labels, coefficient)
    assert total.dtype == z_sum.dtype == torch.float32
    rounding = 2.0**-8
    torch.testing.assert_close(
        z_sum.double(), plain_z(hidden.double(), weight.double(), labels, coefficient), rtol=2 * rounding, atol=0
    )
    wanted = torch.autograd.grad(exact, (hidden, weight))
    lost = [(g - w).norm() for g, w in zip(torch.autograd.grad(rough, (hidden, weight)), wanted, strict=True)]
    for ours, best, loss in zip(torch.autograd.grad(total, (hidden, weight)), wanted, lost, strict=True):
        assert ours.dtype == torch.float32 and (ours - best).norm() < 2 * loss + rounding * best.norm()
    if coefficient:  # and far from those without it
        without = torch.autograd.grad(plain(hidden.double(), weight.double(), labels), (hidden, weight))
        assert all((a - b).norm() > 0.1 * b.norm() for a, b in zip(wanted, without, strict=True))


def test_all_labels_ignored_gives_zero_loss_and_zero_gradients() -> None:
    hidden, weight, labels = problem(20, torch.float32)
    loss, z_sum = linear_cross_entropy(
        hidden, weight, torch.full_like(labels, IGNORE_INDEX), backend="chunked", chunk_tokens=8, z_loss=0.1
    )
    loss.backward()
    assert loss == 0 and z_sum == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, labels = problem(30, torch.float32)
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, labels, backend="chunked", chunk_tokens=8)
    torch.testing.assert_close(loss, plain(hidden * 1e4, weight, labels), rtol=1e-5, atol=0)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_under_autocast_the_weight_gradient_is_float32_and_close() -> None:
    hidden, weight, labels = problem(64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden.bfloat16(), weight, labels, backend="chunked", chunk_tokens=10)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(plain(hidden.bfloat16().float(), weight, labels), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_computed_where_none_is_needed() -> None:
    hidden, weight, labels = problem(20, torch.float32)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk_tokens=8)
    assert not loss.requires_grad
    loss, _ = linear_cross_entropy(hidden.detach(), weight, labels, backend="chunked", chunk_tokens=8)
    loss.backward()
    assert hidden.grad is None and weight.grad is not None


def test_a_second_backward_is_refused() -> None:
    hidden, weight, labels = problem(5, torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk_tokens=8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward twice"):
        loss.backward()


def test_peak_memory_is_a_fraction_of_the_logits() -> None:
    """16384 x 8192 float32 logits are 512 MiB; the loss and its gradients must fit in a third of that."""
    script = """
        import resource, torch
        from training.step.loss import linear_cross_entropy
        torch.set_num_threads(1)
        def run(tokens):
            hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(8192, 16, requires_grad=True)
            loss, _ = linear_cross_entropy(
                hidden, weight, torch.randint(8192, (tokens,)), backend="chunked", chunk_tokens=1024
            )
            loss.backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = run(16)
        print(run(16384) - before)
    """
    grown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(grown.stdout) / 1024 < 512 / 3


def test_backend_choice() -> None:
    assert resolve_loss_backend("auto", CPU) == "chunked"
    assert resolve_loss_backend("chunked", CUDA) == "chunked"
    with pytest.raises(ValueError, match="fast.*expected auto, liger or chunked"):
        resolve_loss_backend("fast", CPU)


@pytest.mark.parametrize("installed", [True, False])
def test_liger_is_taken_where_it_can_run(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.step.loss.find_spec", lambda name: object() if installed else None)
    assert resolve_loss_backend("auto", CUDA) == ("liger" if installed else "chunked")
    if installed:
        assert resolve_loss_backend("liger", CUDA) == "liger"
    with pytest.raises(
        ValueError, match="needs a CUDA device" if installed else "not installed: pip install liger-kernel"
    ):
        resolve_loss_backend("liger", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["chunked", "liger"])
def test_on_cuda_in_bfloat16(backend: str) -> None:
    if backend == "liger":
        pytest.importorskip("liger_kernel")
    hidden, weight, labels = (t.detach().cuda() for t in problem(1000, torch.float32, width=64, vocab=3000))
    hidden.requires_grad_(), weight.requires_grad_()
    expected = plain(hidden.double(), weight.double() * 0.1, labels)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight * 0.1, labels, backend=backend, chunk_tokens=300)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    for ours, exact in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()
