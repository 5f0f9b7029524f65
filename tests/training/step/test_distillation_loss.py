"""The divergence from a teacher against its definition, and the sums that go with it."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from tests.training.step.test_loss import plain, plain_z, problem
from training.step.loss import IGNORE_INDEX, TeacherHead, linear_cross_entropy, linear_distillation


def teacher_of(tokens: int, dtype: torch.dtype, width: int = 9, vocab: int = 37) -> tuple[Tensor, Tensor]:
    """Hidden states and head, of another width than the student's."""
    generator = torch.Generator().manual_seed(1000 + tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)


def looped_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """sum over labelled tokens and words of q log(q / p), one by one. Logits: (N, V)."""
    total = student.new_zeros(())
    for row, label in enumerate(labels.tolist()):
        if label == IGNORE_INDEX:
            continue
        p, q = ((x[row] / temperature).exp() for x in (student, teacher))
        p, q = p / p.sum(), q / q.sum()
        for word in range(len(p)):
            total = total + q[word] * torch.log(q[word] / p[word])
    return total


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.5, 1.0), (0.3, 2.5), (1.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (50, 7), (50, 4096), (65, 64)])
def test_equals_its_definition_in_float64(
    tokens: int, chunk: int, share: float, temperature: float, coefficient: float
) -> None:
    hidden, weight, labels = problem(tokens, torch.float64)
    labels[0] = 3
    theirs = teacher_of(tokens, torch.float64)
    head = TeacherHead(*theirs, share, temperature)
    total, parts = linear_distillation(hidden, weight, labels, head, chunk_tokens=chunk, z_loss=coefficient)
    assert not parts.requires_grad
    cross_entropy, z_loss = plain(hidden, weight, labels), plain_z(hidden, weight, labels, coefficient)
    kl = looped_kl(hidden @ weight.T, theirs[0] @ theirs[1].T, labels, temperature)
    assert kl > 0
    torch.testing.assert_close(parts, torch.stack([cross_entropy, z_loss, kl]).detach(), rtol=1e-11, atol=1e-12)
    expected = (1 - share) * cross_entropy + share * temperature**2 * kl + z_loss
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-12)
    scale = 0.37  # an upstream gradient other than 1
    ours = torch.autograd.grad(total * scale, (hidden, weight))
    wanted = torch.autograd.grad(expected * scale, (hidden, weight))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11)


def test_by_hand() -> None:
    """Two words: the student says 1/2, the teacher 3/4 and 1/4, at temperature 2 after halving its logit."""
    hidden, weight = torch.zeros(1, 1), torch.ones(2, 1)
    head = TeacherHead(torch.tensor([[2 * math.log(3)]]), torch.tensor([[1.0], [0.0]]), 0.25, 2.0)
    total, parts = linear_distillation(hidden, weight, torch.tensor([0]), head, chunk_tokens=8)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert parts.tolist() == pytest.approx([math.log(2), 0, kl])
    assert float(total) == pytest.approx(0.75 * math.log(2) + 0.25 * 4 * kl)


def test_a_share_of_nothing_is_the_cross_entropy() -> None:
    hidden, weight, labels = problem(50, torch.float32)
    head = TeacherHead(*teacher_of(50, torch.float32), 0.0, 1.0)
    found = []
    for loss in (
        linear_distillation(hidden, weight, labels, head, chunk_tokens=20)[0],
        linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk_tokens=20)[0],
    ):
        found.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_student_that_is_the_teacher_learns_nothing(autocast: bool, temperature: float) -> None:
    """The same products give the same bits, so that the divergence and its gradient are zero, not small."""
    hidden, weight, labels = problem(50, torch.float32)
    head = TeacherHead(hidden.detach(), weight.detach(), 1.0, temperature)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, parts = linear_distillation(hidden, weight, labels, head, chunk_tokens=20)
    assert total == 0 and parts[2] == 0 and parts[0] > 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, (hidden, weight)))


def test_all_labels_ignored_gives_zero_loss_and_zero_gradients() -> None:
    hidden, weight, labels = problem(20, torch.float32)
    head = TeacherHead(*teacher_of(20, torch.float32), 0.5, 1.0)
    ignored = torch.full_like(labels, IGNORE_INDEX)
    total, parts = linear_distillation(hidden, weight, ignored, head, chunk_tokens=8, z_loss=0.1)
    assert total == 0 and not parts.any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, (hidden, weight)))


def test_no_gradient_is_computed_where_none_is_needed() -> None:
    hidden, weight, labels = problem(20, torch.float32)
    head = TeacherHead(*teacher_of(20, torch.float32), 0.5, 1.0)
    with torch.no_grad():
        assert not linear_distillation(hidden, weight, labels, head, chunk_tokens=8)[0].requires_grad
    linear_distillation(hidden.detach(), weight, labels, head, chunk_tokens=8)[0].backward()
    assert hidden.grad is None and weight.grad is not None


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, labels = problem(30, torch.float32)
    theirs = teacher_of(30, torch.float32)
    head = TeacherHead(theirs[0] * 1e4, theirs[1], 0.5, 1.0)
    total, parts = linear_distillation(hidden * 1e4, weight, labels, head, chunk_tokens=8)
    assert parts.isfinite().all() and parts[2] > 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_in_bfloat16_are_as_exact_as_plain_ones(temperature: float) -> None:
    """At most twice what plain PyTorch loses in the same dtype, beside what rounding the gradients themselves loses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = (t.detach().to(device) for t in problem(60, torch.float32))
    hidden, weight, labels = (t.requires_grad_(t.is_floating_point()) for t in values)
    theirs = [t.to(device) for t in teacher_of(60, torch.float32)]

    def composed(double: bool) -> Tensor:
        h, w, th, tw = (t.double() if double else t for t in (hidden, weight, *theirs))
        student, teacher = (torch.log_softmax((x @ y.T) / temperature, dim=1) for x, y in ((h, w), (th, tw)))
        kl = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return 0.5 * plain(h, w, labels) + 0.5 * temperature**2 * kl[labels != IGNORE_INDEX].sum()

    with torch.autocast(device.type, torch.bfloat16):
        head = TeacherHead(theirs[0], theirs[1], 0.5, temperature)
        total, parts = linear_distillation(hidden, weight, labels, head, chunk_tokens=25)
        rough = composed(False)
    assert total.dtype == parts.dtype == torch.float32
    wanted = torch.autograd.grad(composed(True), (hidden, weight))
    lost = [(g - w).norm() for g, w in zip(torch.autograd.grad(rough, (hidden, weight)), wanted, strict=True)]
    for ours, best, loss in zip(torch.autograd.grad(total, (hidden, weight)), wanted, lost, strict=True):
        assert ours.dtype == torch.float32 and (ours - best).norm() < 2 * loss + 2.0**-8 * best.norm()


def test_peak_memory_is_a_fraction_of_the_logits() -> None:
    """16384 x 8192 float32 logits of two models are 1 GiB; the loss and its gradients must fit in a third of that."""
    script = """
        import resource, torch
        from training.step.loss import TeacherHead, linear_distillation
        torch.set_num_threads(1)
        def run(tokens):
            hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(8192, 16, requires_grad=True)
            head = TeacherHead(torch.randn(tokens, 16), torch.randn(8192, 16), 0.5, 2.0)
            labels = torch.randint(8192, (tokens,))
            linear_distillation(hidden, weight, labels, head, chunk_tokens=1024)[0].backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = run(16)
        print(run(16384) - before)
    """
    grown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(grown.stdout) / 1024 < 1024 / 3
