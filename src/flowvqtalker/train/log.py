"""A table of numbers that grows row by row in a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["CsvLog"]


class CsvLog:
    """Append rows to a CSV file; a new column rewrites the file with a wider header.

    Arguments:
        path: the file; rows that it holds already are kept if their ``step`` is below ``keep_below`` (a resumed run
            writes the others again).
    """

    def __init__(self, path: Path, keep_below: int = 0) -> None:
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or [])
                rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < keep_below]
            self._rewrite(rows)

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; the file is complete after every call."""
        new = [key for key in row if key not in self.columns]
        if new:
            rows: list[dict[str, str]] = []
            if self.path.exists():
                with open(self.path, newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow({k: v if k == "step" else f"{v:.6g}" for k, v in row.items()})

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            if self.columns:
                writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.path)
