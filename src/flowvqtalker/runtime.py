"""OpenVINO, which runs the compiled networks on CPUs: loaded without telemetry, one core for the process."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

__all__ = ["load_openvino", "openvino_core"]

_lock = threading.Lock()


def load_openvino() -> Any:
    """The module `openvino` without its telemetry, which would write to the home folder and report to its makers.

    Raises:
        ImportError: if it is not installed.
    """
    name = "openvino_telemetry"
    held_back = sys.modules.setdefault(name, None) is None  # type: ignore[arg-type]  # OpenVINO then takes its own stub
    try:
        return importlib.import_module("openvino")
    finally:
        if held_back:
            del sys.modules[name]


def openvino_core() -> Any:
    """The process's `openvino.Core`, with its CPU plugin loaded.

    The plugin gives the thread that loads it a stack for signals, on which Python's handler has too little room: Ctrl-C
    would end the process with a segmentation fault. So a thread of its own loads the plugin.

    Raises:
        ImportError: if OpenVINO is not installed.
    """
    with _lock:
        return _core(os.getpid())


@cache
def _core(process: int) -> Any:
    """The core of a process. A fork has none of its parent's threads, so it needs one of its own, and cannot end the
    parent's, which would wait for them."""
    openvino = load_openvino()

    def load() -> Any:
        core = openvino.Core()
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return core

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load).result()
