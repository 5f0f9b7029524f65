"""The wheel: what is in it, and that it runs without the checkout, and beside it. Installed libraries are reused."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import longsplash
from tests.training.conftest import ROOT

PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "docs/pip.md", "longsplash", "kernels")
EXAMPLE = """
import torch
q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
alpha = torch.full((2,), 1.4, requires_grad=True)
cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
scores = torch.linspace(0, 8, 7).expand(3, 7)  # the least have no weight
{lines}
out.sum().backward()
assert out.shape == q.shape and q.grad is not None and alpha.grad is not None
assert torch.allclose(p.sum(-1), torch.ones(3)) and bool((p == 0).any())
"""


def run(code: str, folders: list[Path], cwd: Path) -> str:
    """In a Python that sees the installed libraries and these folders, and not the folder that it stands in."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, folders)), PYTHONSAFEPATH="1")
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def wheel(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    ended = subprocess.run([*command, "-w", str(folder)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, to leave no build folder in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        target = folder / part
        target.parent.mkdir(exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, target)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stale = source / "build" / "lib" / "longsplash" / "kernels" / "removed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    return wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built) as file:
        file.extractall(folder)
    return folder


def metadata(site: Path) -> Path:
    (folder,) = site.glob("longsplash-*.dist-info")
    return folder


def test_holds_the_package_and_nothing_else(site: Path) -> None:
    assert {path.name for path in site.iterdir()} == {"longsplash", metadata(site).name}
    found = {str(path.relative_to(site / "longsplash")) for path in (site / "longsplash").rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT / "longsplash")) for path in (ROOT / "longsplash").glob("*.py")} | {"py.typed"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert found == wanted
    for path in (site / "longsplash").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) kernels\b", path.read_text(), flags=re.M), path
    assert (metadata(site) / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_depends_on_torch_and_triton_alone(site: Path) -> None:
    fields = Parser().parsestr((metadata(site) / "METADATA").read_text())
    assert (fields["Name"], fields["Version"]) == ("longsplash", longsplash.__version__)
    wanted = [line.split(";") for line in fields.get_all("Requires-Dist", [])]
    names = {re.split(r"\W", line[0])[0]: line[1].strip() if len(line) > 1 else "" for line in wanted}
    assert names == {"torch": "", "triton": "", "transformers": 'extra == "hub"'}


def test_runs_the_lines_of_the_readme(site: Path, tmp_path: Path) -> None:
    """Beside a package of the name kernels, as Hugging Face's is."""
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert "from longsplash import" in example
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("get_kernel = 1\n")
    checks = "import kernels, longsplash; assert kernels.get_kernel == 1; print(longsplash.__file__)"
    out = run(EXAMPLE.format(lines=example) + checks, [site, tmp_path / "other"], tmp_path)
    assert Path(out.strip()) == site / "longsplash" / "__init__.py"


def test_import_leaves_slow_libraries_alone(site: Path, tmp_path: Path) -> None:
    """torch._dynamo alone took more than a second, triton with our kernels half of one."""
    slow = {"torch._dynamo", "torch._inductor", "transformers", "safetensors", "sympy"}
    code = "import longsplash, sys; {use}; print(sorted({slow!r} & sys.modules.keys()))"
    at_use, at_import = sorted(slow), sorted(slow | {"torch", "triton", "numpy", "longsplash.kernels"})
    assert run(code.format(use="longsplash.entmax", slow=set(at_use)), [site], tmp_path).strip() == "[]"
    assert run(code.format(use="dir(longsplash)", slow=set(at_import)), [site], tmp_path).strip() == "[]"


def test_exports_what_it_says(site: Path, tmp_path: Path) -> None:
    names = "add_alpha, block_sparse_attention, entmax, entmax_attention, load_alpha, register"
    assert ", ".join(longsplash.__all__) == names
    run(f"from longsplash import {names}; from longsplash.kernels import block_maxima", [site], tmp_path)


def test_checkout_and_wheel_in_one_process(site: Path, tmp_path: Path) -> None:
    code = """
import torch, kernels, longsplash.kernels
assert kernels.__name__ == "kernels" and longsplash.kernels is not kernels
q = torch.randn(1, 2, 9, 16, requires_grad=True)
grads = []
for attend in (kernels.entmax_attention, longsplash.entmax_attention, kernels.entmax_attention):
    (grad,) = torch.autograd.grad(attend(q, q, q, backend="torch").square().sum(), q)
    grads.append(grad)
assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
assert all(hasattr(one, "entmax_triton_sum") for one in (torch.ops.longsplash, torch.ops.longsplash_checkout))
"""
    run(code, [site, ROOT], tmp_path)


def test_source_distribution_gives_the_same_wheel(source: Path, built: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    run(code, [], source)
    (archive,) = tmp_path.glob("*.tar.gz")
    again = wheel(archive, tmp_path / "wheel")
    with zipfile.ZipFile(again) as x, zipfile.ZipFile(built) as y:
        assert sorted(x.namelist()) == sorted(y.namelist())


def test_editable_install_is_refused(source: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=200)
    assert ended.returncode and ended.stderr.splitlines()[-1].startswith("error: longsplash has no editable install")
