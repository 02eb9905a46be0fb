"""Splits of datasets on disk."""

from __future__ import annotations

import csv
import json
from importlib.resources import files
from pathlib import Path

import pytest

from flowvqtalker import EMOTIONS
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.splits import BUILTIN, load_split

SPLITS = files("flowvqtalker_eval") / "splits"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_published_splits_are_those_of_the_data():
    mead = json.loads((SPLITS / "mead-test.json").read_text(encoding="utf-8"))
    hdtf = json.loads((SPLITS / "hdtf-test.json").read_text(encoding="utf-8"))
    assert mead["subjects"] == ["M003", "M030", "W009", "W015"]
    assert len(set(hdtf["videos"])) == 77 and {"RD_Radio1_000", "WRA_ShelleyMooreCapito1_001"} <= set(hdtf["videos"])


def test_mead_in_both_layouts(tmp_path):
    published = tmp_path / "published"
    touch(
        published,
        "M003/video/front/angry/level_1/001.mp4",
        "M003/video/front/neutral/level_1/012.mp4",
        "M003/video/left_30/angry/level_1/001.mp4",
        "M005/video/front/angry/level_1/001.mp4",
        "M003/audio/angry/level_1/001.m4a",
        "W009/video/front/surprised/level_3/002.mp4",
    )
    items = load_split("mead-test", published)
    assert [(i.name, i.emotion, i.speech is not None) for i in items] == [
        ("M003#angry#level_1#001", "angry", True),
        ("M003#neutral#level_1#012", "neutral", False),
        ("W009#surprised#level_3#002", "surprised", False),
    ]
    flat = tmp_path / "flat"
    touch(flat, "M030#fear#level_2#007.mp4", "W015_front_sad_level3_011.mp4", "M030#fear#level_2#007.txt", "x.mp4")
    assert [i.name for i in load_split("mead-test", flat)] == ["M030#fear#level_2#007", "W015#sad#level_3#011"]
    touch(flat, "more/M030_front_fear_level2_007.mp4")
    with pytest.raises(UserError, match="are the same clip"):
        load_split("mead-test", flat)


def test_hdtf_whole_and_cut(tmp_path):
    touch(tmp_path, "RD_Radio1_000.mp4", "cut/WRA_JimRisch_000#3.mp4", "cut/RD_Radio10_000#0.mp4")
    items = load_split("hdtf-test", tmp_path)
    assert [(i.name, i.emotion, i.seconds) for i in items] == [
        ("RD_Radio1_000", "natural", 5.0),
        ("WRA_JimRisch_000#3", "natural", None),
    ]
    with pytest.raises(UserError, match="holds no clip of mead-test"):
        load_split("mead-test", tmp_path)


def test_shared_split_holds_out_people(tmp_path):
    with open(str(SPLITS / "shared-val.csv"), newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {split_of(row["identity"]) for row in rows} == {"val"}
    assert {row["emotion"] for row in rows} <= set(EMOTIONS)
    touch(tmp_path / "clips", *(row["clip"] for row in rows))
    items = load_split("shared-val", tmp_path)
    assert len(items) == len(rows) and sum(not item.has_speech for item in items) == 3
    (tmp_path / "clips" / rows[0]["clip"]).unlink()
    with pytest.raises(UserError, match=r"lacks files of shared-val\.csv: GRID"):
        load_split("shared-val", tmp_path)


def test_split_of_a_table(tmp_path):
    touch(tmp_path, "clips/a.mp4", "b.mp4", "b.wav")
    table = tmp_path / "split.csv"
    table.write_text("clip,name,emotion,speech,voiced,seconds\na.mp4,one,happy,,no,\nb.mp4,,,b.wav,,2.5\n")
    one, two = load_split(str(table), None)
    assert (one.name, one.emotion, one.has_speech, one.seconds) == ("one", "happy", False, None)
    assert (two.name, two.emotion, two.speech, two.seconds) == ("b", None, tmp_path / "b.wav", 2.5)


@pytest.mark.parametrize(
    "content, message",
    [
        ("clip,emotion\na.mp4,joy\n", "unknown emotion 'joy'"),
        ("clip,seconds\na.mp4,soon\n", "seconds must be a number"),
        ("clip,name\na.mp4,x\na.mp4,x\n", "give each row its own name"),
        ("clip,name\na.mp4,../x\n", "cannot name a file"),
        ("file\na.mp4\n", "it needs clip"),
        ("", "it needs clip"),
        ("clip\nnone.mp4\n", "lacks files"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    touch(tmp_path, "a.mp4")
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_split(str(tmp_path / "split.csv"), None)


def test_unknown_split_and_missing_data(tmp_path):
    with pytest.raises(UserError, match=f"unknown split 'test'; choose one of {', '.join(BUILTIN)}"):
        load_split("test", tmp_path)
    with pytest.raises(UserError, match="needs --data"):
        load_split("mead-test", None)
    with pytest.raises(UserError, match="no folder"):
        load_split("mead-test", tmp_path / "none")
