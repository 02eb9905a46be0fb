"""Table 1 on small synthetic videos, with extractors and measures whose values are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from flowvqtalker.cli import main
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.video import VideoWriter
from flowvqtalker_eval.metrics.analysis import (
    ClipExtractor,
    FrameExtractor,
    StreamExtractor,
    analyse,
    cached,
    read_wave,
)
from flowvqtalker_eval.report import Column, Row, Table, markdown, write
from flowvqtalker_eval.tables.measures import Measure, Options, all_measures, pair_frames
from flowvqtalker_eval.tables.pairs import (
    Method,
    Pair,
    common,
    emotion_of,
    read_folders,
    read_labels,
    read_method,
    read_table,
)
from flowvqtalker_eval.tables.table1 import measure
from tests.conftest import babble, write_wav


def video(path: Path, levels: list[int], size: tuple[int, int] = (48, 32), speech: Path | None = None) -> Path:
    """A video of flat frames with these grey levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, speech) as writer:
        for level in levels:
            writer.write(np.full((size[1], size[0], 3), level, np.uint8))
    return path


class Level(FrameExtractor):
    """Mean grey level of each frame."""

    name = "level"
    gives = ("level",)

    def __init__(self, gain: float = 1.0) -> None:
        self.gain, self.calls = gain, 0

    def settings(self):
        return {"gain": self.gain}

    def __call__(self, frames, known):
        self.calls += 1
        return {"level": self.gain * frames.mean((1, 2, 3), dtype=np.float64)}


class Squared(FrameExtractor):
    """Builds on another extractor, and is given before it."""

    name = "squared"
    needs = ("level",)
    gives = ("squared",)

    def __init__(self) -> None:
        self.calls = 0

    def settings(self):
        return {}

    def __call__(self, frames, known):
        assert set(known) == {"level"} and len(known["level"]) == len(frames)
        self.calls += 1
        return {"squared": known["level"] ** 2}


class Loud(ClipExtractor):
    """Of a whole clip and its sound."""

    name = "loud"
    needs = ("squared",)
    gives = ("loud",)

    def __init__(self) -> None:
        self.calls = 0

    def settings(self):
        return {}

    def __call__(self, known, wave):
        self.calls += 1
        length = 0 if wave is None else len(wave)
        return {"loud": np.array([len(known["squared"]), length])}


class Streamed(StreamExtractor):
    """Sees the frames again."""

    name = "streamed"
    needs = ("level",)
    gives = ("seen",)

    def settings(self):
        return {}

    def __call__(self, frames, known, wave):
        return {"seen": np.array(sum(1 for _ in frames))}


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


# ------------------------------------------------------------------------------------------------------------ analysis


def test_extractors_run_in_the_order_of_their_needs(tmp_path):
    path = video(tmp_path / "v.mp4", [10, 60, 110, 160, 210], speech=write_wav(tmp_path / "s.wav", babble(0.2)))
    found = analyse(path, [Loud(), Squared(), Streamed(), Level()], batch=2)
    assert (found.frames, found.size, found.fps) == (5, (48, 32), 25.0)
    assert np.allclose(found.arrays["level"], [10, 60, 110, 160, 210], atol=2)
    assert np.array_equal(found.arrays["squared"], found.arrays["level"] ** 2)
    assert found.arrays["loud"].tolist() == [5, 5 * 640] and found.arrays["seen"] == 5
    assert found.settings["level"] == {"gain": 1.0}
    silent = video(tmp_path / "silent.mp4", [10, 10])
    assert analyse(silent, [Loud(), Squared(), Level()]).arrays["loud"].tolist() == [2, 0]
    assert read_wave(silent, 2) is None


def test_what_an_extractor_needs_must_be_given(tmp_path):
    path = video(tmp_path / "v.mp4", [10])
    with pytest.raises(UserError, match="squared needs level"):
        analyse(path, [Squared()])
    with pytest.raises(UserError, match="does not exist"):
        analyse(tmp_path / "none.mp4", [Level()])


def test_cache_gives_equal_arrays_without_work(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60, 110]), tmp_path / "cache"
    first = analyse(path, [Level(), Squared(), Loud()], cache, batch=2)
    again = [Level(), Squared(), Loud()]
    second = analyse(path, again, cache)
    assert [e.calls for e in again] == [0, 0, 0]
    assert first.frames == second.frames and set(first.arrays) == set(second.arrays)
    for name, values in first.arrays.items():
        assert np.array_equal(values, second.arrays[name]) and values.dtype == second.arrays[name].dtype
    copied = tmp_path / "copy.mp4"  # the content counts, not the name
    copied.write_bytes(path.read_bytes())
    assert cached(copied, again, cache) is not None


def test_changed_settings_or_files_are_analysed_again(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60, 110]), tmp_path / "cache"
    analyse(path, [Level(), Squared()], cache)
    louder, squared = Level(gain=2.0), Squared()
    found = analyse(path, [louder, squared], cache)  # what builds on the changed one is made again as well
    assert louder.calls == 1 and squared.calls == 1
    assert np.allclose(found.arrays["squared"], found.arrays["level"] ** 2)
    level, squared = Level(), Squared()
    analyse(path, [level, squared], cache)  # the first results are still there
    assert level.calls == 0 and squared.calls == 0
    video(path, [10, 60, 111, 200])
    level = Level()
    assert analyse(path, [level], cache).frames == 4 and level.calls == 1


def test_new_extractor_uses_what_the_cache_has_of_others(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60, 110]), tmp_path / "cache"
    analyse(path, [Level()], cache)
    level, squared = Level(), Squared()
    found = analyse(path, [squared, level], cache, batch=2)
    assert level.calls == 0 and squared.calls == 2
    assert np.array_equal(found.arrays["squared"], found.arrays["level"] ** 2)


def test_damaged_cache_is_made_again(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60]), tmp_path / "cache"
    analyse(path, [Level()], cache)
    for file in cache.rglob("level-*.npz"):
        file.write_bytes(b"no npz")
    level = Level()
    assert np.allclose(analyse(path, [level], cache).arrays["level"], [10, 60], atol=2) and level.calls == 1


# --------------------------------------------------------------------------------------------------------------- pairs


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


def test_seeds_are_takes_of_one_name(folders):
    for seed in (0, 1):
        video(folders / "takes" / f"a#seed{seed}.mp4", [1])
        video(folders / "takes" / f"b_seed{seed}.mp4", [1])
    pairs = read_folders(folders / "takes", folders / "real")
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


# --------------------------------------------------------------------------------------------------------------- table


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


# -------------------------------------------------------------------------------------------------------------- report


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


# -------------------------------------------------------------------------------------------------------- command line


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
        (["evaluate", "table1", "--method", "x=here"], "needs --real"),
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
