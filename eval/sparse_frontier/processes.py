"""Cells measured by several processes beside each other. Decoding token by token waits for the host, which launches a
policy's many small kernels: a GPU has room for a dozen such processes."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.errors import error_line
from eval.common.subjects import choose_device, find_subjects
from eval.held_out.texts import open_held_out
from eval.ruler.files import FrozenTask
from eval.sparse_frontier.config import FrontierConfig
from eval.sparse_frontier.measure import Measuring, Place
from eval.sparse_frontier.ruler_answers import open_wanted

POLL = 0.2  # seconds
QUIET = "TQDM_DISABLE"  # of tqdm: bars of several processes would write over each other


@dataclass(frozen=True)
class Work:
    """What a process needs to measure cells of the softmax model. runs: softmax and entmax; data, output: folders."""

    runs: list[str]
    data: Path
    output: Path
    config: FrontierConfig


def measure_beside(work: Work, places: Sequence[Place]) -> None:
    """Measures these places, each with its RULER samples, in config.processes processes, which keep the results in
    output/results. They share the GPUs out where the device is auto or cuda, and the cores.

    Raises:
        ValueError: what a process has met, or that one was ended.
    """
    context = get_context("spawn")  # CUDA does not survive a fork
    taken, done = context.Value("l", 0), context.Value("l", 0)
    errors: Any = context.SimpleQueue()
    count = min(work.config.processes, len(places))
    with _quiet():
        running = [
            context.Process(target=_measure, args=(work, places, index, count, taken, done, errors), daemon=True)
            for index in range(count)
        ]
        for process in running:
            process.start()
    try:
        with tqdm(total=len(places), desc=f"cells, by {count} processes", leave=False) as bar:
            while any(process.is_alive() for process in running):
                time.sleep(POLL)
                bar.update(done.value - bar.n)
                _raise_failure(running, errors)
        _raise_failure(running, errors)
    finally:
        for process in running:
            process.kill()


def _raise_failure(running: Sequence[Any], errors: Any) -> None:
    if not errors.empty():
        raise ValueError(errors.get())
    for process in running:
        if process.exitcode:
            told = "was killed, as for want of memory" if process.exitcode < 0 else "ended with a traceback"
            raise ValueError(
                f"one of the {len(running)} processes of --processes {told}: what they have measured is kept, the same "
                "command with fewer goes on"
            )


def _measure(work: Work, places: Sequence[Place], index: int, count: int, taken: Any, done: Any, errors: Any) -> None:
    """Takes one place after the other until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the command, and that its processes
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        measuring, sets = _open(work, index)
        while (place := _take(places, taken)) is not None:
            measuring.measure_place(place, sets)
            with done.get_lock():
                done.value += 1
    except torch.cuda.OutOfMemoryError:
        errors.put(f"--processes is {work.config.processes}, for which the GPU's memory does not suffice: use fewer")
    except (ValueError, OSError) as error:
        errors.put(error_line(error))


def _take(places: Sequence[Place], taken: Any) -> Place | None:
    with taken.get_lock():
        taken.value += 1
        return places[taken.value - 1] if taken.value <= len(places) else None


def _open(work: Work, index: int) -> tuple[Measuring, list[FrozenTask]]:
    """As the command opens the softmax model."""
    device = choose_device(work.config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", index % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one
    subjects = find_subjects(work.runs)
    held_out = open_held_out(work.data, subjects, work.config.shared())
    sets, _ = open_wanted(work.config, subjects, held_out)
    return Measuring(subjects[0], held_out, work.output, work.config, device), sets


@contextmanager
def _quiet() -> Iterator[None]:
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"  # read when tqdm is imported
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before
