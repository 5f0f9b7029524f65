"""Exit codes of the commands. Scripts that start train.py decide by them whether to start it again
(slurm/pretrain.sbatch); docs/errors.md explains them.

0 is a finished run. Everything that is not listed here is a crash.
"""

CRASHED = 1  # Python's own; also where a disk refuses checkpoints
USER_ERROR = 2  # what was asked for cannot be done
DIVERGED = 65  # EX_DATAERR of sysexits.h: too many steps were skipped, or weights or the last loss are not finite
STALLED = 70  # EX_SOFTWARE: the watchdog ended a process that got nothing done
INTERRUPTED = 75  # EX_TEMPFAIL: stopped with everything saved, mostly by a signal; start it again to continue
KEYBOARD = 130  # 128 + SIGINT, as shells count: stopped by Ctrl-C, of train.py before there was anything to save
READER_GONE = 141  # 128 + SIGPIPE: whoever read the output has gone
