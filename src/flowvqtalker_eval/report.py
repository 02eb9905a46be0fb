"""Tables of numbers as Markdown, csv and json, all from the same values."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowvqtalker.io.coefficients import write_whole
from flowvqtalker_eval.metrics.analysis import Settings

__all__ = ["Column", "Row", "Table", "markdown", "write"]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: in json and csv.
        title: in Markdown.
        better: ``"higher"``, ``"lower"``, or None where neither is better (the real videos' value is what is sought).
        digits: after the point, in Markdown.
        about: what it is, with unit and setting.
        extra: only in csv and json.
    """

    key: str
    title: str
    better: str | None = None
    digits: int = 3
    about: str = ""
    extra: bool = False

    @property
    def heading(self) -> str:
        """The title with an arrow."""
        return self.title + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: of the method.
        values: by column; None or a missing one is a dash.
        clips: how many pairs of videos.
        frames: how many frames in all.
        reference: the real videos themselves, which are never the best.
        pairs: values of each pair, by the name of its video.
    """

    name: str
    values: Mapping[str, float | None]
    clips: int
    frames: int
    reference: bool = False
    pairs: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows by columns, with everything that the numbers depend on.

    Attributes:
        title: one line.
        columns: in order.
        rows: in order.
        settings: of each metric, by its name.
        notes: what is to be known besides: columns left out, videos left out.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Settings]
    notes: tuple[str, ...] = ()

    def best(self, column: Column) -> float | None:
        """The best value of a column among two or more methods, as it is printed."""
        values = [
            _rounded(v, column)
            for row in self.rows
            if not row.reference
            if (v := row.values.get(column.key)) is not None
        ]
        values = [v for v in values if math.isfinite(v)]
        if column.better is None or len(values) < 2 or len(set(values)) < 2:
            return None
        return max(values) if column.better == "higher" else min(values)


def _rounded(value: float, column: Column) -> float:
    return round(value, column.digits)


def _cell(value: float | None, column: Column, best: float | None, reference: bool) -> str:
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{column.digits}f}"
    return f"**{text}**" if not reference and best is not None and _rounded(value, column) == best else text


def markdown(table: Table) -> str:
    """The table as Markdown: the best of each column bold, then what each column is and every setting."""
    columns = [column for column in table.columns if not column.extra]
    lines = [f"### {table.title}", ""]
    lines.append("| " + " | ".join(["", *(c.heading for c in columns), "clips", "frames"]) + " |")
    lines.append("|---" + "|---:" * (len(columns) + 2) + "|")
    best = {column.key: table.best(column) for column in columns}
    for row in table.rows:
        cells = [_cell(row.values.get(c.key), c, best[c.key], row.reference) for c in columns]
        lines.append("| " + " | ".join([row.name, *cells, str(row.clips), str(row.frames)]) + " |")
    lines += ["", *(f"- **{c.title}**: {c.about}" for c in columns if c.about)]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    lines += ["", "Settings: " + "; ".join(f"{name} ({_settings(values)})" for name, values in table.settings.items())]
    return "\n".join(lines) + "\n"


def _settings(values: Settings) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _plain(value: float | None) -> float | str | None:
    """A number for json, which has no infinity: None for what is not a number."""
    if value is None or math.isnan(value):
        return None
    return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def as_json(table: Table) -> str:
    """The table with full precision, the values of every pair and the settings."""
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
    content = {
        "title": table.title,
        "columns": [asdict(column) for column in table.columns],
        "rows": rows,
        "settings": table.settings,
        "notes": table.notes,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(table: Table, base: str | Path) -> list[Path]:
    """Write ``BASE.md``, ``BASE.csv`` and ``BASE.json``; each appears whole or not at all.

    Raises:
        UserError: if they cannot be written.
    """
    base = Path(base)
    if base.suffix.lower() in (".md", ".csv", ".json"):
        base = base.with_suffix("")
    files = [base.with_name(f"{base.name}{suffix}") for suffix in (".md", ".csv", ".json")]
    base.parent.mkdir(parents=True, exist_ok=True)

    def rows(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["method", *(c.key for c in table.columns), "clips", "frames"])
            for row in table.rows:
                values = [_plain(row.values.get(c.key)) for c in table.columns]
                writer.writerow([row.name, *("" if v is None else v for v in values), row.clips, row.frames])

    write_whole(files[0], lambda path: _write_text(path, markdown(table)))
    write_whole(files[1], rows)
    write_whole(files[2], lambda path: _write_text(path, as_json(table)))
    return files


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
