"""The arrows between folders, and what may not stand in the project."""

import ast
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]
ALLOWED = {  # folder -> own packages that it may import
    "kernels": {"kernels"},
    "longsplash": {"longsplash", "kernels"},
    "common": {"common"},
    "model": {"model", "kernels", "common"},
    "model/hub": {"model", "data", "common", "longsplash"},  # tokenizers come with models; what transformers loads
    "data": {"data", "common"},
    "training": {"training", "model", "data", "common"},
    "training/memory": {"training", "model", "data", "common", "kernels"},  # counts what kernels hold, by their sizes
    "eval": {"eval", "model", "data", "common"},
    "train.py": {"training", "data", "common"},
}
OWN = {"kernels", "longsplash", "common", "model", "data", "training", "eval", "train", "tests", "benchmarks"}
LEAF_LIBRARIES = {"torch", "triton"}


def modules(folder: str) -> list[Path]:
    """All of a folder but those in its rooms that ALLOWED names."""
    path = ROOT / folder
    rooms = [ROOT / name for name in ALLOWED if name.startswith(f"{folder}/")]
    found = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    return [one for one in found if not any(one.is_relative_to(room) for room in rooms)]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_arrows(folder: str) -> None:
    found = modules(folder)
    assert found, folder
    for path in found:
        wrong = imports(path) & OWN - ALLOWED[folder]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_kernels_import_torch_and_triton_only() -> None:
    import sys

    for path in modules("kernels"):
        foreign = imports(path) - LEAF_LIBRARIES - {"kernels"} - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_entry_point_is_a_table_of_contents() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) < 80


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, in functions too."""
    paths = {module_name(path): path for folder in ALLOWED for path in modules(folder)}
    edges: dict[str, set[str]] = {}
    for name, path in paths.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        edges[name] = (wanted & paths.keys()) - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of the arrows without all that imports none of the rest, or is imported by none of it."""
    while True:
        imported = set().union(*edges.values())
        kept = {name: targets & edges.keys() for name, targets in edges.items() if targets & edges.keys()}
        kept = {name: targets for name, targets in kept.items() if name in imported}
        if kept == edges:
            return edges
        edges = kept


def test_no_module_leads_back_to_itself() -> None:
    assert not circles(arrows())


def test_no_room_leads_back_to_itself() -> None:
    """Of the folders inside a folder. Modules that lie in the folder itself are entries: they use all rooms, and what
    the rooms share."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    rooms: dict[str, set[str]] = {}
    for name, targets in arrows().items():
        if name.count(".") >= 2:
            inner = {room(target) for target in targets if target.count(".") >= 2} - {room(name)}
            rooms.setdefault(room(name), set()).update(inner)
    assert {"eval.held_out", "kernels.common", "training.faults"} <= rooms.keys()
    assert not circles(rooms)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b": {"c"}, "c": {"b"}}
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_files_that_are_begun_first_exist() -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []
