"""How busy the device is and how much memory a run takes, as far as the machine can tell."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable

import torch

__all__ = ["Utilisation", "peak_memory"]

_PERIOD = 1.0


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of a GPU, as torch's allocator reserved them; of a CPU, resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class Utilisation:
    """Mean share of time in which a GPU worked, sampled each second in a thread; measures nothing on a CPU.

    NVML tells it where its Python binding is installed, else the program nvidia-smi.
    """

    def __init__(self, device: torch.device, read: Callable[[], float] | None = None, period: float = _PERIOD) -> None:
        self.read = read or (_reader(device) if device.type == "cuda" else None)
        self.period = period
        self._values: list[float] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Utilisation:
        if self.read is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="utilisation")
            self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _watch(self) -> None:
        assert self.read is not None
        while not self._closed.wait(self.period):
            try:
                self._values.append(self.read())
            except Exception:  # a driver that stops answering must not end a training
                return

    def means(self) -> dict[str, float]:
        """``gpu_busy`` in [0, 1] since the last call; empty if nothing is known."""
        values, self._values = self._values, []
        return {"gpu_busy": sum(values) / len(values)} if values else {}


def _reader(device: torch.device) -> Callable[[], float] | None:
    """A function that asks for a GPU's utilisation in [0, 1], or None."""
    try:
        torch.cuda.utilization(device)
    except Exception:  # no pynvml, or a driver without NVML
        program = shutil.which("nvidia-smi")
        if program is None:
            return None
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        which = ["-i", f"GPU-{uuid}"] if uuid is not None else []
        command = [program, *which, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

        def ask() -> float:
            found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return float(found.stdout.split()[0]) / 100

        try:
            ask()
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return None
        return ask
    return lambda: torch.cuda.utilization(device) / 100
