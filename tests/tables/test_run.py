"""The benchmark runner: splits, planning, resuming, failures, and every method on tiny weights."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from flowvqtalker.cli import main
from flowvqtalker.errors import UserError
from flowvqtalker.io.video import VideoWriter, probe, read_video
from flowvqtalker_eval.tables.plan import METHODS, Output, Task, plan
from flowvqtalker_eval.tables.run import Run
from flowvqtalker_eval.tables.splits import Item
from flowvqtalker_eval.tables.workers import in_processes, make_all
from tests.conftest import babble, write_wav


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


# ------------------------------------------------------------------------------------------------------------ planning


def test_plan_skips_what_is_there(tmp_path):
    items = [Item("a", Path("a.mp4")), Item("b", Path("b.mp4"), has_speech=False)]
    tasks = plan(items, tmp_path, ("animate", "copy"), seeds=2)
    assert [[str(o.path.relative_to(tmp_path)) for o in task.outputs] for task in tasks] == [
        ["animate/a#seed0.mp4", "animate/a#seed1.mp4", "copy/a.mp4"],
        ["copy/b.mp4"],
    ]
    touch(tmp_path, "animate/a#seed0.mp4", "copy/b.mp4")
    (task,) = plan(items, tmp_path, ("animate", "copy"), seeds=2)
    assert [(o.method, o.seed) for o in task.outputs] == [("animate", 1), ("copy", 0)]


class Fake:
    """Stands in for the animator: writes empty files, and does as it is told at some items."""

    def __init__(self, folder: Path, behaviour: dict[str, object]) -> None:
        self.folder, self.behaviour, self.made = folder, behaviour, []

    def make(self, item, outputs):
        errors = {}
        for output in outputs:
            what = self.behaviour.get(item.name)
            if isinstance(what, BaseException):
                raise what
            if isinstance(what, str):
                errors[output] = what
                continue
            touch(output.path.parent, output.path.name)
            touch(self.folder / "real", f"{item.name}.mp4")
            self.made.append(item.name)
        return errors


@pytest.fixture
def three(tmp_path, monkeypatch, tiny_weights):
    """A split of three clips, and an animator that can be told what to do."""
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "split.csv").write_text("clip\na.mp4\nb.mp4\nc.mp4\n")

    def run(behaviour, **options):
        fake = Fake(tmp_path / "out", behaviour)
        monkeypatch.setattr(Run, "animator", lambda self, number=0: fake)
        settings = {"method": ("copy",), "table": False, "weights": tiny_weights, **options}
        try:
            Run(split=str(tmp_path / "split.csv"), output=tmp_path / "out", **settings).run()
        finally:
            run.made = fake.made

    run.folder = tmp_path / "out"
    return run


def test_interrupted_run_goes_on_where_it_stopped(three):
    with pytest.raises(KeyboardInterrupt):
        three({"c": KeyboardInterrupt()})
    assert three.made == ["a", "b"]
    three({})
    assert three.made == ["c"]
    three({})
    assert three.made == []


def test_failures_are_listed_and_tried_again(three, caplog):
    three({"b": "no face found"})
    with open(three.folder / "errors.csv", newline="") as stream:
        assert list(csv.reader(stream)) == [["name", "method", "seed", "error"], ["b", "copy", "0", "no face found"]]
    assert three.made == ["a", "c"] and "b (copy): no face found" in caplog.text
    three({})
    assert three.made == ["b"] and not (three.folder / "errors.csv").exists()


def test_folder_of_another_choice_is_refused(three):
    three({}, limit=1)
    assert three.made == ["a"]
    with pytest.raises(UserError, match=r"made with other settings \(seconds\)"):
        three({}, seconds=2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": ()}, "choose from animate"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"seconds": 0.0}, "--seconds must be positive"),
    ],
)
def test_bad_options(three, options, message):
    with pytest.raises(UserError, match=message):
        three({}, **options)


WORKER = """
import os
from pathlib import Path

class Worker:
    def make(self, item, outputs):
        if item.name == "c":
            os._exit(1)
        for output in outputs:
            Path(output.path).touch()
        return {}

def animator(number):
    return Worker()

def picky(number):
    def work(task):
        if task == 2:
            raise ValueError("no 2")
        return task
    return work
"""


def test_a_process_that_dies_costs_its_own_task_alone(monkeypatch, tmp_path):
    (tmp_path / "crashing_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import crashing_worker

    tasks = [Task(Item(name, Path(name)), (Output("copy", 0, tmp_path / name),)) for name in "abcdef"]
    assert make_all(tasks, crashing_worker.animator, tmp_path / "errors.csv", jobs=2) == 1
    assert sorted(path.name for path in tmp_path.glob("?")) == ["a", "b", "d", "e", "f"]
    with open(tmp_path / "errors.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["name"] == "c" and "its process died" in row["error"]
    for jobs in (1, 2):
        assert sorted(in_processes([0, 1], crashing_worker.picky, jobs, "test")) == [(0, 0), (1, 1)]
        with pytest.raises(ValueError, match="no 2"):
            list(in_processes([0, 1, 2, 3], crashing_worker.picky, jobs, "test"))


# ------------------------------------------------------------------------------------------------------------ for real


@pytest.fixture
def clips(tmp_path, astronaut):
    """A speaking astronaut who nods, a silent one, and a clip without a face."""
    speech = write_wav(tmp_path / "speech.wav", babble(0.32))
    for name, sound, faces in (("a", speech, True), ("silent", None, True), ("empty", speech, False)):
        with VideoWriter(tmp_path / f"{name}.mp4", sound) as writer:
            for t in range(8):
                writer.write(np.roll(astronaut, 2 * t, axis=0) if faces else np.full_like(astronaut, 20 * t))
    (tmp_path / "split.csv").write_text("clip,emotion,voiced\na.mp4,happy,yes\nsilent.mp4,sad,no\nempty.mp4,,yes\n")
    return tmp_path


@pytest.mark.slow
def test_every_method_on_tiny_weights(clips, tiny_weights, capsys, monkeypatch):
    out, scratch = clips / "out", clips / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    line = ["evaluate", "run", "--split", str(clips / "split.csv"), "-o", str(out), "--weights", str(tiny_weights)]
    line += ["--device", "cpu", "--dtype", "float32", "--method", *METHODS]
    assert main([*line, "--no-table"]) == 0
    for method in METHODS:
        made = {path.stem for path in (out / method).iterdir()}
        assert made == ({"a"} if method == "animate" else {"a", "silent"}), method
        for name in made:
            info = probe(out / method / f"{name}.mp4")
            assert (info.width, info.height, info.sound) == (512, 512, name == "a")
            assert sum(1 for _ in read_video(out / method / f"{name}.mp4")) == 8
    assert sum(1 for _ in read_video(out / "real" / "a.mp4")) == 8
    first, last = (frame.astype(int) for frame in (list(read_video(out / "real" / "a.mp4"))[i] for i in (0, -1)))
    still = [frame.astype(int) for frame in read_video(out / "copy" / "a.mp4")]
    assert np.abs(still[-1] - first).mean() < 2 < np.abs(last - first).mean()
    with open(out / "errors.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["name"] for row in rows} == {"empty"} and len(rows) == len(METHODS)
    assert all("no face found" in row["error"] for row in rows)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    capsys.readouterr()
    assert main([*line, "--table", "--jobs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == times
    printed = capsys.readouterr().out
    assert "| GT |" in printed and all(f"| {method} |" in printed for method in METHODS)
    assert (
        "1 of them made by every method" in printed and "left out, since not every method made them: silent" in printed
    )
    assert not list(scratch.iterdir())
    content = json.loads((out / "table1.json").read_text())
    assert [row["clips"] for row in content["rows"]] == [1] * (len(METHODS) + 1)
