"""One training at a time writes to a run folder."""

import atexit
import os
import time
from contextlib import ExitStack
from pathlib import Path

from common.locks import LOCK, folder_lock
from training.tracking import is_first_process, say

# Seconds: a process that was told to end frees its memory first; a file server misses a dead node after a while.
PATIENCE, PATIENCE_REQUEUED = 5.0, 120.0


def hold_run_folder(run_dir: Path, patience: float | None = None) -> ExitStack:
    """Keep other trainings out of a run folder, made where it is missing, until the returned stack is closed or this
    process ends, however it ends. Taken by the first process of a run, over all nodes; for others it does nothing.

    Args:
        patience: seconds to wait for a process that has it; by default short, and longer in a requeued Slurm job.

    Raises:
        ValueError: another process has it.
    """
    held = ExitStack()
    if not is_first_process():
        return held
    if patience is None:
        patience = PATIENCE_REQUEUED if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else PATIENCE
    taken = (
        f"--run_dir {run_dir} is in use by another training: wait for its end or stop it, or choose another --run_dir "
        f"(if the machine that had it is dead, remove {run_dir / LOCK})"
    )
    end, said = time.monotonic() + patience, False
    while True:
        try:
            held.enter_context(folder_lock(run_dir, taken))
            atexit.register(held.close)  # so that no lock file is left
            return held
        except ValueError:
            if time.monotonic() >= end:
                raise
        if not said:
            said = True
            say(f"waiting {patience:.0f} s for another training to leave {run_dir}")
        time.sleep(0.1)
