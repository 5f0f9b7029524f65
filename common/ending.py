"""The end of a process without taking down its interpreter."""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

FLUSH_FAILED = 120  # Python's own


def run_and_end(main: Callable[[], object]) -> NoReturn:
    """Call `main`, then end this process as Python does, up to and with its exit handlers: with the code of a
    SystemExit, 1 after the traceback of another exception, else 0.

    What follows in Python, taking down modules and objects, is left out, because it aborts runs of several processes
    now and then: gloo's threads drop the tensors of a collective after it has returned and need the interpreter for it.
    Python ends a thread that asks for it by then, through C++ destructors, which is SIGABRT ("terminate called without
    an active exception"; Python 3.11, torch 2.13). Destroying process groups first does not help: models hold them too.
    """
    code: object = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or FLUSH_FAILED
    os._exit((code or 0) & 0xFF)
