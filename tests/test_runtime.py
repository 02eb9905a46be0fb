"""OpenVINO leaves the signals of the thread that uses it alone."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

_CODE = """
import signal, sys
from flowvqtalker.runtime import openvino_core

# A shell that runs tests in the background has interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from tests.test_runtime import signal_stack

before = signal_stack()
assert openvino_core() is openvino_core()
"""


class _Stack(ctypes.Structure):
    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int | None, int, int]:
    """Place, flags and size of the calling thread's alternate stack for signals (sigaltstack(2))."""
    stack = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.place, stack.flags, stack.size


def _run(root: Path, then: str) -> subprocess.CompletedProcess[str]:
    code = _CODE.format(root=str(root)) + then
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_no_thread_keeps_openvino_s_stack_for_signals(request) -> None:
    done = _run(request.config.rootpath, "assert signal_stack() == before, signal_stack()")
    assert done.returncode == 0, done.stderr


def test_an_interrupt_after_loading_openvino_is_python_s(request) -> None:
    done = _run(request.config.rootpath, "signal.raise_signal(signal.SIGINT)")
    assert done.returncode != -11 and "KeyboardInterrupt" in done.stderr
