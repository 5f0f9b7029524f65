import torch

from kernels.common.backends import constant


def test_the_mark_is_that_of_torch() -> None:
    """kernels/common/backends.py sets it by hand, to leave torch._dynamo alone until something is compiled."""

    @torch.compiler.assume_constant_result
    def marked() -> None: ...

    @constant
    def ours() -> None: ...

    assert vars(marked) and vars(marked).items() <= vars(ours).items()


def test_constants_are_computed_once_and_not_traced() -> None:
    asked = []

    @constant
    def size_of(device: torch.device) -> int:
        asked.append(device)
        return len(input_of(device))

    def input_of(device: torch.device) -> str:
        with open(__file__) as file:  # what a trace would refuse
            return file.read(5)

    scaled = torch.compile(lambda x: x * size_of(x.device), backend="eager", fullgraph=True)
    assert scaled(torch.ones(1)) == size_of(torch.device("cpu")) == 5
    assert asked == [torch.device("cpu")]
