"""Which generated video belongs to which real one."""

from __future__ import annotations

import pytest

from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.measures import pair_frames
from flowvqtalker_eval.tables.pairs import (
    Method,
    common,
    emotion_of,
    read_folders,
    read_labels,
    read_method,
    read_table,
)
from tests.metrics.test_analysis import video


@pytest.fixture
def folders(tmp_path):
    for name, level in (("a", 100), ("b", 50)):
        video(tmp_path / "real" / f"{name}.mp4", [level] * 6)
        video(tmp_path / "near" / f"{name}.mp4", [level + 10] * 6)
        video(tmp_path / "far" / f"{name}.mp4", [level + 40] * 6)
    return tmp_path


def test_folders_are_paired_by_name(folders):
    pairs = read_folders(folders / "near", folders / "real", {"b": "sad"})
    assert [(p.name, p.generated.parent.name, p.real.name, p.emotion) for p in pairs] == [
        ("a", "near", "a.mp4", None),
        ("b", "near", "b.mp4", "sad"),
    ]


def test_mismatched_names_are_listed(folders):
    video(folders / "near" / "c.mp4", [1])
    video(folders / "real" / "d.mp4", [1])
    with pytest.raises(UserError, match=r"c\.mp4 in .*near without a real video.* d\.mp4 in .*real"):
        read_folders(folders / "near", folders / "real")
    method = read_method(f"near={folders / 'near'}", folders / "real", shared=True)
    assert [pair.name for pair in method.pairs] == ["a", "b"]


@pytest.mark.parametrize("make", ["nothing", "empty", "file"])
def test_folder_without_videos_is_an_error(folders, make):
    place = folders / "other"
    if make == "empty":
        place.mkdir()
        (place / "notes.txt").write_text("no video")
    elif make == "file":
        place.write_text("no folder")
    with pytest.raises(UserError, match=r"holds no video|does not exist|is a file"):
        read_folders(place, folders / "real")


def test_seeds_are_samples_of_one_name(folders):
    for seed in (0, 1):
        video(folders / "samples" / f"a#seed{seed}.mp4", [1])
        video(folders / "samples" / f"b_seed{seed}.mp4", [1])
    pairs = read_folders(folders / "samples", folders / "real")
    assert [(p.name, p.seed) for p in pairs] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_table_of_pairs(folders):
    table = folders / "pairs.csv"
    table.write_text("generated,real,emotion,name\nnear/a.mp4,real/b.mp4,disgust,x\n")
    (pair,) = read_table(table)
    assert (pair.name, pair.real.name, pair.emotion) == ("x", "b.mp4", "disgusted")
    table.write_text("generated,real\nnear/none.mp4,real/b.mp4\n")
    with pytest.raises(UserError, match="do not exist"):
        read_table(table)
    table.write_text("generated\nnear/a.mp4\n")
    with pytest.raises(UserError, match="lacks the columns real"):
        read_table(table)
    table.write_text("name,emotion\na.mp4,joy\n")
    with pytest.raises(UserError, match="unknown emotion 'joy'"):
        read_labels(table)


def test_emotions_in_names():
    assert emotion_of("M003#angry#level_1#001") == "angry"
    assert emotion_of("W009_front_surprise_level3_002") == "surprised"
    assert emotion_of("unhappyish") is None
    assert emotion_of("RD_Radio1_000#3") is None


def test_common_names(folders):
    one = Method("one", tuple(read_folders(folders / "near", folders / "real")))
    two = Method("two", one.pairs[1:])
    assert [[p.name for p in m.pairs] for m in common([one, two])] == [["b"], ["b"]]
    with pytest.raises(UserError, match="no name in common"):
        common([Method("one", one.pairs[:1]), two])


def test_frames_are_paired_evenly():
    i, j = pair_frames(5, 5)
    assert i.tolist() == j.tolist() == [0, 1, 2, 3, 4]
    i, j = pair_frames(3, 9)
    assert i.tolist() == [0, 1, 2] and j.tolist() == [0, 4, 8]
