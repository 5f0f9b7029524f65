"""Processes of train.py without the seconds of an interpreter's start: forked from one that has imported everything.

Each run still is a process of its own: arguments, environment, pipes, signals, exit code and end are those of
`python train.py`. Ranks that Lightning starts from it are started anew.
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
    while True:
        message, pipes, _, _ = socket.recv_fds(control, LARGEST_MESSAGE, 2)
        if not message:
            sys.exit(0)
        request = json.loads(message)
        pid = os.fork()
        if pid == 0:
            control.close()
            become(request["environment"], pipes)
            return request["arguments"]
        for pipe in pipes:
            os.close(pipe)
        control.send(json.dumps(pid).encode())
        _, status = os.waitpid(pid, 0)
        control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def become(environment: dict[str, str], pipes: list[int]) -> None:
    """Take over environment and standard streams of a new process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for standard, pipe in zip((1, 2), pipes, strict=True):
        os.dup2(pipe, standard)
        os.close(pipe)
    os.environ.clear()
    os.environ.update(environment)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as for a script there
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
