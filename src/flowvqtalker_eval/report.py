"""Tables of results, written as Markdown, csv and json from the same values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from flowvqtalker.io.atomic import atomic_write

__all__ = ["Column", "Row", "Table", "markdown", "write"]

#: What a number depends on, for instance hashes of weights.
Settings = Mapping[str, str | float | int]

_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: name in json and csv.
        title: name in Markdown.
        better: ``"higher"``, ``"lower"``, or None where the value of the real videos is the goal.
        digits: decimals in Markdown.
        about: definition, with unit and setting.
        extra: written to csv and json only.
    """

    key: str
    title: str
    better: str | None = None
    digits: int = 3
    about: str = ""
    extra: bool = False


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: of the method.
        values: by column key; a value that is None or missing prints as a dash.
        clips: number of video pairs.
        frames: number of frames in total.
        reference: whether this row is the real videos, which are never marked as the best.
        pairs: values of each pair by its name.
    """

    name: str
    values: Mapping[str, float | None]
    clips: int
    frames: int
    reference: bool = False
    pairs: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows by columns, with everything the numbers depend on.

    Attributes:
        title: one line.
        columns, rows: in order.
        settings: of each metric, by its name.
        notes: for instance which columns and videos were left out.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Settings]
    notes: tuple[str, ...] = ()

    def best(self, column: Column) -> float | None:
        """The best value of a column, rounded as printed; None unless two methods differ."""
        values = (row.values.get(column.key) for row in self.rows if not row.reference)
        rounded = [round(v, column.digits) for v in values if v is not None and math.isfinite(v)]
        if column.better is None or len(set(rounded)) < 2:
            return None
        return max(rounded) if column.better == "higher" else min(rounded)


def _cell(row: Row, column: Column, best: float | None) -> str:
    value = row.values.get(column.key)
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{column.digits}f}"
    return f"**{text}**" if not row.reference and round(value, column.digits) == best else text


def markdown(table: Table) -> str:
    """The table as Markdown: the best of each column in bold, then definitions, notes and settings."""
    columns = [column for column in table.columns if not column.extra]
    best = {column.key: table.best(column) for column in columns}
    headings = ["", *(c.title + _ARROWS[c.better] for c in columns), "clips", "frames"]
    lines = [f"### {table.title}", "", f"| {' | '.join(headings)} |", "|---" + "|---:" * (len(columns) + 2) + "|"]
    for row in table.rows:
        cells = [row.name, *(_cell(row, c, best[c.key]) for c in columns), str(row.clips), str(row.frames)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- **{c.title}**: {c.about}" for c in columns if c.about)]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    settings = "; ".join(f"{name} ({_listed(values)})" for name, values in table.settings.items())
    return "\n".join([*lines, "", f"Settings: {settings}"]) + "\n"


def _listed(values: Settings) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _plain(value: float | None) -> float | str | None:
    """A value for json, which has no infinities; None for NaN."""
    if value is None or math.isnan(value):
        return None
    return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _csv(table: Table) -> str:
    keys = [column.key for column in table.columns]
    rows = [[row.name, *map(row.values.get, keys), row.clips, row.frames] for row in table.rows]
    return pd.DataFrame(rows, columns=["method", *keys, "clips", "frames"]).to_csv(index=False)


def _json(table: Table) -> str:
    rows: list[dict[str, Any]] = [
        {
            "name": row.name,
            "clips": row.clips,
            "frames": row.frames,
            "reference": row.reference,
            "values": {c.key: _plain(row.values.get(c.key)) for c in table.columns},
            "pairs": {name: {key: _plain(v) for key, v in values.items()} for name, values in row.pairs.items()},
        }
        for row in table.rows
    ]
    columns = [asdict(column) for column in table.columns]
    content = {"title": table.title, "columns": columns, "rows": rows, "settings": table.settings, "notes": table.notes}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(table: Table, base: str | Path) -> list[Path]:
    """Write ``BASE.md``, ``BASE.csv`` and ``BASE.json``; csv and json hold full precision and the extra columns.

    Raises:
        UserError: if a file cannot be written.
    """
    base = Path(base)
    texts = {".md": markdown(table), ".csv": _csv(table), ".json": _json(table)}
    if base.suffix.lower() in texts:
        base = base.with_suffix("")
    base.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix, text in texts.items():
        files.append(base.with_name(base.name + suffix))
        atomic_write(files[-1], partial(Path.write_text, data=text, encoding="utf-8"))
    return files
