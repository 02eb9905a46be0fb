"""Tables as Markdown, csv and json."""

from __future__ import annotations

import csv
import json

import pytest

from flowvqtalker_eval.report import Column, Row, Table, markdown, write


@pytest.fixture
def table():
    columns = (
        Column("up", "Up", "higher", 2, "more"),
        Column("down", "Down", "lower", 1, "less"),
        Column("none", "None", None, 0),
        Column("hidden", "Hidden", extra=True),
    )
    rows = (
        Row("GT", {"up": float("inf"), "down": 0.0, "none": 3.0}, 2, 20, reference=True),
        Row("one", {"up": 1.2345, "down": 7.77, "none": 1.0, "hidden": 0.125}, 2, 20, pairs={"a": {"up": 1.0}}),
        Row("two", {"up": 1.2312, "down": None, "none": 2.0}, 2, 20),
        Row("three", {"up": 1.1, "down": 7.71, "none": 2.0}, 1, 10),
    )
    return Table("Numbers", columns, rows, {"up": {"window": "uniform7", "K1": 0.01}}, ("a note",))


def test_markdown(table):
    text = markdown(table)
    assert "|  | Up ↑ | Down ↓ | None | clips | frames |" in text
    assert "| GT | ∞ | 0.0 | 3 | 2 | 20 |" in text
    assert "| one | **1.23** | 7.8 | 1 | 2 | 20 |" in text
    assert "| two | **1.23** | - | 2 | 2 | 20 |" in text  # equal as printed, both are the best
    assert "| three | 1.10 | **7.7** | 2 | 1 | 10 |" in text
    assert "a note" in text and "up (window uniform7, K1 0.01)" in text and "Hidden" not in text


def test_markdown_csv_and_json_hold_equal_numbers(table, tmp_path):
    files = write(table, tmp_path / "out" / "table.md")
    assert [file.name for file in files] == ["table.md", "table.csv", "table.json"]
    assert not list(tmp_path.rglob("*.part"))
    with open(files[1], newline="", encoding="utf-8") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    content = json.loads(files[2].read_text(encoding="utf-8"))
    printed = {
        line.split("|")[1].strip(): line for line in files[0].read_text(encoding="utf-8").splitlines() if "|" in line
    }
    for entry in content["rows"]:
        row = rows[entry["name"]]
        assert int(row["clips"]) == entry["clips"]
        cells = [cell.strip().strip("*") for cell in printed[entry["name"]].split("|")[2:-1]]
        for column, cell in zip(table.columns[:3], cells, strict=False):
            value = entry["values"][column.key]
            assert row[column.key] == ("" if value is None else str(value))
            if isinstance(value, float):
                assert cell == f"{value:.{column.digits}f}"
            else:
                assert cell == ("-" if value is None else "∞")
    assert content["rows"][1]["values"]["hidden"] == 0.125 and rows["one"]["hidden"] == "0.125"
    assert content["settings"] == {"up": {"window": "uniform7", "K1": 0.01}}
