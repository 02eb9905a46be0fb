"""What a run logs: a table of numbers in a CSV file, means over steps, and the load of the device."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowvqtalker.io.atomic import atomic_write

__all__ = ["CsvLog", "Meter", "gpu_busy", "peak_memory"]


class CsvLog:
    """Rows of numbers, kept in a CSV file; a new column widens the table.

    Arguments:
        path: the file; its rows are kept if their ``step`` is below ``keep_below`` (a resumed run repeats the others).
    """

    def __init__(self, path: Path, keep_below: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < keep_below]

    def write(self, row: Mapping[str, float]) -> None:
        """Add one row; the file is complete after every call."""
        self.rows.append({key: str(value) if key == "step" else f"{value:.6g}" for key, value in row.items()})
        atomic_write(self.path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in self.rows for key in row)))
            writer.writeheader()
            writer.writerows(self.rows)


class Meter:
    """Means of logged numbers; tensors stay on their device until the means are read."""

    def __init__(self) -> None:
        self.sums: dict[str, float | Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        """Count one value for each name."""
        for key, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        means = {key: float(total) / self.counts[key] for key, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


def gpu_busy(device: torch.device) -> dict[str, float]:
    """``gpu_busy``: share of the last second in which a GPU worked, by NVML; empty where NVML is not available."""
    if device.type != "cuda":
        return {}
    try:
        return {"gpu_busy": torch.cuda.utilization(device) / 100}
    except Exception:  # the binding or the driver's library is missing; a training must not end for it
        return {}


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: of a GPU, as reserved by torch's allocator; of a CPU, resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
