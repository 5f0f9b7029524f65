"""Which code this is: recorded in checkpoints, runs and reports."""

import subprocess
from pathlib import Path


def code_version() -> str:
    """Git commit of this code, with "-dirty" for uncommitted changes of tracked files; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root:
            return "unknown"  # an unpacked copy inside somebody else's repository
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
