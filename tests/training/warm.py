"""Processes of train.py without the seconds of an interpreter's start: forked from one that has imported everything.

Each run and each of its ranks still is a process of its own: arguments, environment, pipes, signals, exit code and end
are those of `python train.py`, and rank 0 is the parent of the other ranks.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LARGEST_MESSAGE = 2**18


class WarmInterpreter:
    """The side of the tests; one run at a time."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout: float
    ) -> "subprocess.CompletedProcess[str]":
        """As subprocess.run with captured output: until the process has ended and no other holds its pipes.

        Args:
            arguments: the script's path and what follows.
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
        code = self._answer()
        timer.cancel()
        for reader in readers:
            reader.join(timeout)
            assert not reader.is_alive(), f"a process that {arguments} has started does not end: {texts}"
        return subprocess.CompletedProcess(arguments, code, *texts)

    def close(self) -> None:
        self.control.close()
        self.process.wait(20)

    def _answer(self) -> Any:
        message = self.control.recv(LARGEST_MESSAGE)
        assert message, f"the warm interpreter has ended with exit code {self.process.wait()}"
        return json.loads(message)


@functools.cache
def warm_interpreter() -> WarmInterpreter:
    """One for all tests of this process."""
    interpreter = WarmInterpreter()
    atexit.register(interpreter.close)
    return interpreter


def serve(control: socket.socket) -> list[str]:
    """Fork for every request; returns in the forked process only, with the script's path and what follows."""
    import train  # noqa: F401  # what all runs have in common

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads, which a fork would lose"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored where tests run in the background
    while True:
        message, pipes, _, _ = socket.recv_fds(control, LARGEST_MESSAGE, 2)
        if not message:
            sys.exit(0)
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
        control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


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
    for _ in range(1, int(devices)):
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


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as for a script there
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
