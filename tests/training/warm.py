"""Processes of the commands without the seconds of an interpreter's start: forked from one that has imported all.

Each run and each of its ranks still is a process of its own: arguments, environment, pipes, signals, exit code and end
are those of `python train.py` or `python -m eval.run`, and rank 0 is the parent of the other ranks.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LARGEST_MESSAGE = 2**18
MOST_RANKS = 16
END_SECONDS = 20.0  # for what a process has started, once it has ended itself
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Ended:
    """A process that has ended. left: how many of the processes it had started did not, within END_SECONDS."""

    args: list[str]
    returncode: int
    stdout: str
    stderr: str
    left: int


class WarmInterpreter:
    """The side of the tests; one run at a time.

    Args:
        modules: imported once; the first runs wait for that.
        quick: processes end without taking down the interpreter, which costs seconds: exit handlers do run.
    """

    def __init__(self, modules: tuple[str, ...], quick: bool) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno()), "quick" if quick else "whole", *modules]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def run(self, arguments: list[str], environment: dict[str, str], timeout: float) -> Ended:
        """As subprocess.run with captured output: until the process and all that it has started have ended.

        Args:
            arguments: what follows `python`: a script's path or -m and a module, then their arguments.
            timeout: seconds until the process is killed.
        """
        pipes = [os.pipe() for _ in range(2)]
        request = json.dumps({"arguments": arguments, "environment": environment}).encode()
        socket.send_fds(self.control, [request], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        texts = ["", ""]

        def read(index: int) -> None:
            with os.fdopen(pipes[index][0], errors="replace") as pipe:
                texts[index] = pipe.read()

        readers = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(2)]
        for reader in readers:
            reader.start()
        timer = threading.Timer(timeout, os.kill, (self._answer(), signal.SIGKILL))
        timer.start()
        code, left = self._answer()
        timer.cancel()
        for reader in readers:
            reader.join()
        return Ended(arguments, code, *texts, left)

    def close(self) -> None:
        self.control.close()
        self.process.wait(20)

    def _answer(self) -> Any:
        message = self.control.recv(LARGEST_MESSAGE)
        assert message, f"the warm interpreter has ended with exit code {self.process.wait()}"
        return json.loads(message)


@functools.cache
def warm_interpreter(*modules: str, quick: bool = False) -> WarmInterpreter:
    """One for all tests of this process that run commands which need these modules."""
    interpreter = WarmInterpreter(modules, quick)
    atexit.register(interpreter.close)
    return interpreter


def serve(control: socket.socket, modules: list[str]) -> list[str]:
    """Import what all runs have in common and fork for every request; returns in the forked process only, with what
    follows `python`."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # collecting what will stay would copy each page of it in each process
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    threads.remove("python")
    # jemalloc, in pyarrow, is made for forks
    assert set(threads) <= {"jemalloc_bg_thd"}, f"threads {threads}, which a fork would lose"
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0  # what a run leaves behind becomes ours
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored where tests run in the background
    while True:
        message, pipes, _, _ = socket.recv_fds(control, LARGEST_MESSAGE, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        pid = os.fork()
        if pid == 0:
            control.close()
            for standard, pipe in zip((1, 2), pipes, strict=True):
                os.dup2(pipe, standard)
                os.close(pipe)
            return become(request) if (rank := spare_ranks(request["arguments"])) is None else rank
        for pipe in pipes:
            os.close(pipe)
        control.send(json.dumps(pid).encode())
        _, status = os.waitpid(pid, 0)
        control.send(json.dumps([os.waitstatus_to_exitcode(status), end_the_rest()]).encode())


def end_the_rest() -> int:
    """Wait for the processes that an ended one has left, then kill them. Returns how many had to be killed."""
    killed: set[int] = set()
    start = time.monotonic()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return len(killed)
        if not pid:
            if time.monotonic() - start > END_SECONDS:
                for left in children():
                    killed.add(left)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(left, signal.SIGKILL)
            time.sleep(0.01)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def become(request: dict[str, Any]) -> list[str]:
    """Take over environment and standard input of a new process; returns its arguments."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    return request["arguments"]


def spare_ranks(arguments: list[str]) -> list[str] | None:
    """Fork what Lightning's launcher will start as further ranks, before this process has done anything.

    Returns None here, and in each forked process, once it is started as a rank, its arguments.
    """
    spares: list[tuple[socket.socket, int]] = []
    devices = dict(zip(arguments, arguments[1:], strict=False)).get("--trainer.devices", "1")
    for _ in range(1, min(int(devices), MOST_RANKS) if devices.isdigit() else 0):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            for control in (ours, *(control for control, _ in spares)):
                control.close()
            if not (message := theirs.recv(LARGEST_MESSAGE)):
                os._exit(0)  # rank 0 has ended without any
            theirs.close()
            return become(json.loads(message))
        theirs.close()
        spares.append((ours, pid))
    if spares:
        from lightning.pytorch.strategies.launchers import subprocess_script

        subprocess_script.subprocess = SimpleNamespace(Popen=functools.partial(Rank, spares))  # type: ignore[assignment]
    return None


class Rank:
    """What Lightning uses of the subprocess.Popen of a rank."""

    returncode: int | None = None

    def __init__(self, spares: list[tuple[socket.socket, int]], command: list[str], env: Any, cwd: None) -> None:
        control, self.pid = spares.pop(0)
        control.send(json.dumps({"arguments": command[1:], "environment": dict(env)}).encode())
        control.close()

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def run_as_python_does(arguments: list[str]) -> None:
    """What `python` does with a script's path, or -m and a module, and what follows."""
    if arguments[0] != "-m":
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        return
    sys.argv = arguments[1:]
    for name in (arguments[1], f"{arguments[1]}.__main__"):
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)  # it is the main module, not one that was imported
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as for a script there
    command = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[3:])
    if sys.argv[2] == "quick":
        from common.ending import run_and_end

        run_and_end(functools.partial(run_as_python_does, command))
    gc.unfreeze()
    run_as_python_does(command)
