import torch

from kernels.common.backends import warn_of_slow_path


def test_the_warning_bears_the_mark_of_torch() -> None:
    """kernels/common/backends.py sets it by hand, to leave torch._dynamo alone until something is compiled."""

    @torch.compiler.assume_constant_result
    def marked() -> None: ...

    assert vars(marked) and vars(marked).items() <= vars(warn_of_slow_path).items()
