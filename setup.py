"""What pyproject.toml cannot say: in a wheel, kernels/ is longsplash.kernels, and imports itself by that name."""

import ast
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def renamed(source: str, path: str) -> str:
    """The module's text with `from kernels... import` as `from longsplash.kernels... import`.

    Raises: SystemExit for `import kernels...`, whose name in the module a new prefix would change.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kernels":
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace("from kernels", "from longsplash.kernels", 1)
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "kernels" for alias in node.names):
            raise SystemExit(f"error: {path}:{node.lineno} says `import kernels`: write `from kernels... import ...`")
    return "".join(lines)


class BuildPackage(build_py):
    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit(
                "error: longsplash has no editable install, its kernels are renamed as they are copied: install it "
                "without -e, or put the checkout on PYTHONPATH"
            )
        shutil.rmtree(Path(self.build_lib, "longsplash"), ignore_errors=True)  # an earlier build's files, since removed
        super().run()

    def build_module(self, module, module_file, package):
        outfile, copied = super().build_module(module, module_file, package)
        text = Path(module_file).read_text(encoding="utf-8")
        Path(outfile).write_text(renamed(text, module_file), encoding="utf-8")
        return outfile, copied


setup(cmdclass={"build_py": BuildPackage})
