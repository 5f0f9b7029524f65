"""Train a language model, or continue a run.

    python train.py --config configs/models/smoke.yaml --config configs/attention/asentmax.yaml \
        --config configs/data/stdlib.yaml --config configs/smoke.yaml --run_dir runs/x --resume auto

Several --config files merge key by key, later ones win, options on the command line win over files
(--trainer.max_steps 200), and --print_config shows the result. Exit code 2: an error in what was asked for; 75: stopped
by a signal (SIGUSR1, SIGTERM, Ctrl-C) with what there is saved; common/exits.py has the others.
"""

import sys

from common.ending import run_and_end
from common.errors import user_errors
from training.faults.signals import stop_signals


def main() -> None:
    with stop_signals() as stop:  # the imports take seconds, and a signal may come meanwhile
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from training.cli import TrainingCLI

        with user_errors(MisconfigurationException) as setup:
            session = TrainingCLI(stop)  # options -> checkpoint to start from -> data, module, trainer
            session.prepare()  # open the data, check that everything fits, record config and code version
            code = session.fit(on_start=setup.close)  # step: module.py, logs: callbacks.py, saves: checkpointing.py
    sys.exit(code)


if __name__ == "__main__":
    run_and_end(main)
