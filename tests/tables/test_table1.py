"""Table 1 on small synthetic videos, with extractors and measures whose values are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flowvqtalker.cli import main
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures import Measure, Options, all_measures
from flowvqtalker_eval.tables.pairs import (
    Method,
    Pair,
    read_folders,
)
from flowvqtalker_eval.tables.table1 import measure
from tests.metrics.test_analysis import Level, video


class LevelMeasure(Measure):
    """Difference of mean levels; NaN where the clip is black."""

    name = "level"
    columns = (Column("difference", "Diff", "lower", 1, "grey levels"), Column("level", "Level", None, 2, "mean"))

    def extractors(self):
        return [Level()]

    def settings(self):
        return {"unit": "levels"}

    def __init__(self):
        super().__init__(Options())

    def pair(self, clips):
        real, made = clips.paired("level")
        if made.max() < 5:
            return {"difference": float("nan")}
        return {"difference": float(np.abs(real - made).mean()), "level": float(made.mean())}


class Absent(LevelMeasure):
    name = "absent"
    columns = (Column("absent", "Absent"),)

    def extractors(self):
        raise MissingDependency("the package nothing is not installed")


@pytest.fixture
def folders(tmp_path):
    for name, level in (("a", 100), ("b", 50)):
        video(tmp_path / "real" / f"{name}.mp4", [level] * 6)
        video(tmp_path / "near" / f"{name}.mp4", [level + 10] * 6)
        video(tmp_path / "far" / f"{name}.mp4", [level + 40] * 6)
    return tmp_path


def methods(root: Path, *names: str) -> list[Method]:
    return [Method(name, tuple(read_folders(root / name, root / "real"))) for name in names]


def make(root: Path, *names: str, **options):
    return measure(methods(root, *names), Options(jobs=1, **options), measures=[LevelMeasure()])


def test_rows_of_methods_and_gt(folders):
    table = make(folders, "near", "far", cache=folders / "cache")
    assert [(r.name, r.clips, r.frames, r.reference) for r in table.rows] == [
        ("GT", 2, 12, True),
        ("near", 2, 12, False),
        ("far", 2, 12, False),
    ]
    values = {row.name: row.values for row in table.rows}
    assert values["GT"]["difference"] == 0
    assert values["near"]["difference"] == pytest.approx(10, abs=2)
    assert values["far"]["difference"] == pytest.approx(40, abs=2)
    assert values["near"]["level"] == pytest.approx(85, abs=2)
    assert set(table.rows[1].pairs) == {"a", "b"}
    assert table.settings == {"level": {"gain": 1.0, "unit": "levels"}}


def test_clips_of_different_lengths(folders):
    video(folders / "near" / "a.mp4", [110] * 4)
    eat = make(folders, "near")
    assert (eat.rows[1].clips, eat.rows[1].frames) == (2, 4 + 6)
    native = make(folders, "near", protocol="native")
    assert (native.rows[1].clips, native.rows[1].frames) == (1, 6)
    assert any("a.mp4 has 4 frames, a.mp4 has 6" in note for note in native.notes)


def test_broken_video_is_listed_and_the_others_are_measured(folders):
    (folders / "near" / "a.mp4").write_bytes(b"no video")
    table = make(folders, "near")
    assert table.rows[1].clips == 1
    assert any(note.startswith("not compared: a.mp4") for note in table.notes)


def test_clip_without_a_value_does_not_spoil_the_mean(folders):
    video(folders / "near" / "a.mp4", [0] * 6)
    table = make(folders, "near")
    assert table.rows[1].values["difference"] == pytest.approx(10, abs=2)
    assert table.rows[1].pairs["a"]["difference"] is not None and math.isnan(table.rows[1].pairs["a"]["difference"])


def test_what_cannot_be_had_is_left_out_or_required(folders):
    both = [LevelMeasure(), Absent()]
    table = measure(methods(folders, "near"), Options(jobs=1), measures=both)
    assert [c.key for c in table.columns] == ["difference", "level"]
    assert "left out: absent (the package nothing is not installed)" in table.notes
    with pytest.raises(MissingDependency, match="nothing is not installed"):
        measure(methods(folders, "near"), Options(jobs=1, require=("absent",)), measures=both)
    with pytest.raises(UserError, match="no metric is available"):
        measure(methods(folders, "near"), Options(jobs=1), measures=[Absent()])


def test_bad_options(folders):
    rows = methods(folders, "near")
    with pytest.raises(UserError, match="at least 1"):
        measure(rows, Options(jobs=0), measures=[LevelMeasure()])
    with pytest.raises(UserError, match="two rows are called near"):
        measure([*rows, *rows], Options(), measures=[LevelMeasure()])
    with pytest.raises(UserError, match="unknown metric psmr; choose from ssim"):
        all_measures(Options(metrics=("psmr",)))


def test_only_the_metrics_that_were_asked_for():
    assert [m.name for m in all_measures(Options(metrics=("cpbd",), require=("lve",)))] == ["cpbd", "lve"]
    everything = all_measures(Options())
    assert len({m.name for m in everything}) == len(everything)
    keys = [column.key for m in everything for column in m.columns]
    assert len(set(keys)) == len(keys)


def test_command_without_a_face(folders, capsys):
    """Real extractors on videos in which there is nothing: the rate of detection says so."""
    line = ["evaluate", "table1", "--method", f"near={folders / 'near'}", "--real", str(folders / "real")]
    assert (
        main([*line, "--metrics", "detection", "coefficients", "blinks", "--jobs", "1", "-o", str(folders / "t")]) == 0
    )
    printed = capsys.readouterr().out
    assert "| near | 0.0 |" in printed and "AED" not in printed
    assert json.loads((folders / "t.json").read_text())["rows"][1]["values"]["detected"] == 0


@pytest.mark.parametrize(
    "line, message",
    [
        (["evaluate", "table1"], "no method was given"),
        (["evaluate", "table1", "--method", "x"], "NAME=FOLDER"),
        (["evaluate", "table1", "--method", "x=."], "needs --real"),
    ],
)
def test_command_errors(line, message, capsys):
    assert main(line) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_pair_of_the_real_video_with_itself(folders):
    pair = Pair("a", folders / "real" / "a.mp4", folders / "real" / "a.mp4")
    table = measure([Method("same", (pair,))], Options(jobs=1), measures=[LevelMeasure()])
    assert [row.values["difference"] for row in table.rows] == [0, 0]
