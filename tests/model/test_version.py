import shutil
import subprocess
from pathlib import Path

import pytest

from model import version
from model.version import code_version


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_version_in_and_outside_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "copy" / "model"
    package.mkdir(parents=True)
    source = package / "version.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(version, "__file__", str(source))
    assert code_version() == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path / "copy"), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init"), git("add", "."), git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert code_version() == commit
    source.write_text("x = 2\n")
    assert code_version() == commit + "-dirty"
    nested = tmp_path / "copy" / "vendor" / "model" / "version.py"
    nested.parent.mkdir(parents=True)
    nested.touch()
    monkeypatch.setattr(version, "__file__", str(nested))
    assert code_version() == "unknown"
