"""Without a GPU, Triton's kernels are interpreted; Triton reads the switch when it is first imported. What tests verify
is noted apart from what the user's runs do."""

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# A machine with other work on it says nothing about the code
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["LONGSPLASH_CACHE"] = os.path.join(tempfile.gettempdir(), "longsplash-tests")

# Files that take minutes, longest first: begun first, or a last one would keep the other processes waiting
LONGEST = (
    "tests/slurm/test_slurm.py",
    "tests/kernels/alpha_entmax/test_triton_accuracy.py",
    "tests/test_bad_input.py",
    "tests/training/distributed/test_zero.py",
    "tests/kernels/alpha_entmax/test_attention.py",
    "tests/kernels/alpha_entmax/test_triton.py",
    "tests/model/test_sequence_parallel.py",
    "tests/kernels/common/test_compiled.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(rank)))
