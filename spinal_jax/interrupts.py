"""Exceptions that signal handlers raise in the main thread, so that they neither get lost nor crash a library."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
PAUSE = 0.01  # seconds until a signal that comes at a bad moment is sent again


class Interruption(BaseException):
    """Raised by the handler of a signal. `number` is the signal's."""

    number: int


def outside_imports(handler: Handler) -> Handler:
    """A signal handler that runs `handler` after the imports that are in progress. An exception during the import of an
    extension module can crash the process (nanobind, pybind11) or be dropped (Cython)."""

    def handle(number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            send_again(number)
        else:
            handler(number, frame)

    return handle


def send_again(number: int) -> None:
    """Sends a signal to the main thread in a moment."""
    threading.Timer(PAUSE, signal.pthread_kill, (threading.main_thread().ident, number)).start()


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame, unless it is the one that runs the command line."""
    while frame is not None and frame.f_globals.get("__name__") != "spinal_jax.cli.guard":
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
