"""Job lists: every form, defaults, names, and bad tables with file, line and column."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from flowvqtalker.batch.command import Batch
from flowvqtalker.batch.table import COLUMNS, check_jobs, product, read_table
from flowvqtalker.commands import Animate
from flowvqtalker.errors import UserError
from flowvqtalker.options import AnimateArguments

OUT = Path("videos")


@pytest.fixture
def place(tmp_path):
    """Two portraits, a third in a folder, and two recordings; their content does not matter here."""
    (tmp_path / "faces").mkdir()
    for name in ("a.jpg", "b.jpg", "faces/c.jpg", "one.wav", "two.wav", "track.csv"):
        (tmp_path / name).write_text(name)
    return tmp_path


def table(place: Path, text: str, name: str = "jobs.csv") -> Path:
    (place / name).write_text(text, encoding="utf-8")
    return place / name


def read(path: Path, **defaults):
    jobs, problems = read_table(path, OUT, AnimateArguments(**defaults))
    jobs = check_jobs(jobs, problems)
    problems.stop()
    return jobs


def refused(path: Path, **defaults) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **defaults)
    return str(caught.value)


def test_columns_and_options_are_those_of_animate():
    assert set(COLUMNS) == {f.name for f in fields(Animate)}
    own = {"jobs", "portraits", "emotions", "workers", "ray", "shard", "dry_run"}
    assert {f.name for f in fields(Batch)} == ({f.name for f in fields(Animate)} - {"portrait"}) | own


def test_csv_and_json_lines_say_the_same(place):
    text = (
        "portrait,speech,emotion,emotion_track,seed,intensity,full,face,output\n"
        'a.jpg,one.wav,"happy:0.7,sad:0.3",,5,1.5,yes,1,x/first.mp4\n'
        "\n"
        "b.jpg,two.wav,,track.csv\n"
    )
    rows = [
        {"portrait": "a.jpg", "speech": "one.wav", "emotion": "happy:0.7,sad:0.3", "seed": 5, "intensity": 1.5,
         "full": True, "face": 1, "output": "x/first.mp4"},
        {"portrait": "b.jpg", "speech": "two.wav", "emotion-track": "track.csv", "emotion": None},
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in rows)
    first, second = read(table(place, text))
    assert (first.portrait, first.speech) == (place / "a.jpg", place / "one.wav")
    assert (first.emotion, first.seed, first.intensity, first.full, first.face) == (
        "happy:0.7,sad:0.3",
        5,
        1.5,
        True,
        1,
    )
    assert first.output == OUT / "x/first.mp4"
    assert (second.emotion, second.emotion_track, second.seed, second.full) == (None, place / "track.csv", 0, False)
    assert second.output == OUT / "b_two_track_0.mp4"
    for job, other in zip((first, second), read(table(place, lines, "jobs.jsonl")), strict=True):
        assert [getattr(job, name) for name in COLUMNS] == [getattr(other, name) for name in COLUMNS]


def test_options_of_the_command_line_fill_the_gaps(place):
    jobs = read(table(place, "portrait,speech,seed\na.jpg,one.wav,7\nb.jpg,one.wav,\n"), seed=3, emotion="sad")
    assert [(job.seed, job.emotion) for job in jobs] == [(7, "sad"), (3, "sad")]


def test_marks_of_a_row_are_checked(place):
    marked = table(place, "portrait,speech,mark,mark_id\na.jpg,one.wav,yes,7\nb.jpg,one.wav,no,\n")
    assert [(job.mark, job.mark_id) for job in read(marked)] == [(True, 7), (False, 0)]
    assert "--no-mark excludes" in refused(table(place, "portrait,speech,mark,mark_id\na.jpg,one.wav,no,7\n"))
    assert "mark_id must be" in refused(table(place, "portrait,speech,mark_id\na.jpg,one.wav,-1\n"))


def test_patterns_stand_for_every_match(place):
    jobs = read(table(place, "portrait,speech\n**/*.jpg,*.wav\n"))
    assert [(job.portrait.name, job.speech.name) for job in jobs] == [
        (face, voice) for face in ("a.jpg", "b.jpg", "c.jpg") for voice in ("one.wav", "two.wav")
    ]
    assert len({job.output for job in jobs}) == 6


def test_a_name_with_brackets_is_a_name_first(place):
    (place / "a[1].jpg").write_text("x")
    (job,) = read(table(place, "portrait,speech\na[1].jpg,one.wav\n"))
    assert job.portrait.name == "a[1].jpg"


def test_samples_become_jobs_with_the_seeds_of_animate(place):
    rows = "a.jpg,one.wav,4,3,x.mp4\nb.jpg,one.wav,0,2,\n"
    jobs = read(table(place, "portrait,speech,seed,num_samples,output\n" + rows))
    assert [(job.output.name, job.seed, job.num_samples) for job in jobs] == [
        ("x_1.mp4", 4, 1), ("x_2.mp4", 5, 1), ("x_3.mp4", 6, 1),
        ("b_one_neutral_0.mp4", 0, 1), ("b_one_neutral_1.mp4", 1, 1),
    ]  # fmt: skip


def test_jobs_with_the_same_inputs_get_names_of_their_own(place):
    text = "portrait,speech,intensity\na.jpg,one.wav,1\na.jpg,one.wav,2\nb.jpg,one.wav,1\n"
    names = [job.output.name for job in read(table(place, text))]
    assert names[2] == "b_one_neutral_0.mp4"
    assert len(set(names)) == 3
    assert all(name.startswith("a_one_neutral_0_") for name in names[:2])
    reverse = "portrait,speech,intensity\na.jpg,one.wav,2\na.jpg,one.wav,1\n"
    assert [job.output.name for job in read(table(place, reverse))] == names[1::-1]


def test_the_product_holds_each_combination_once(place):
    jobs, problems = product(
        [str(place / "*.jpg"), str(place / "a.jpg")], [str(place / "one.wav")], "happy, sad:1+fear:2", OUT,
        AnimateArguments(full=True),
    )  # fmt: skip
    problems.stop()
    assert [(job.portrait.name, job.emotion, job.full) for job in jobs] == [
        (face, emotion, True) for face in ("a.jpg", "b.jpg") for emotion in ("happy", "sad:1+fear:2")
    ]


def test_the_product_takes_the_emotion_of_the_command_line(place):
    jobs, problems = product([str(place / "a.jpg")], [str(place / "*.wav")], None, OUT, AnimateArguments(emotion="sad"))
    problems.stop()
    assert [(job.speech.name, job.emotion) for job in jobs] == [("one.wav", "sad"), ("two.wav", "sad")]


def test_the_product_reports_every_problem_once(place):
    faces = [str(place / "a.jpg"), str(place / "b.jpg"), str(place / "*.png")]
    _, problems = product(
        faces, [str(place / "none.wav"), str(place / "one.wav")], "happy,glad", OUT, AnimateArguments()
    )
    with pytest.raises(UserError) as caught:
        problems.stop()
    text = str(caught.value)
    assert "3 problems" in text
    assert "--portraits: " in text and "*.png matches no file" in text
    assert "none.wav does not exist" in text
    assert "--emotions: unknown emotion 'glad'" in text


def test_all_problems_of_a_table_are_reported_at_once(place):
    path = table(
        place,
        "portrait,speech,emotion,seed,intensity,fixed_pose,pose_from,device\n"
        "a.jpg,one.wav,hapy,0,1\n"
        "none.jpg,one.wav,happy,1.5,9\n"
        ",two.wav,happy\n"
        "a.jpg,one.wav,happy,0,1,maybe\n"
        "a.jpg,one.wav,happy,0,1,true,track.csv\n"
        "a.jpg,one.wav,happy,0,1,,,tpu\n"
        "a.jpg,one.wav,happy,0,1,,,,,,\n",
    )
    text = refused(path)
    for expected in (
        "9 problems; nothing was made",
        "line 2, column emotion: unknown emotion 'hapy'",
        "line 3, column portrait: ",
        "line 3, column seed: must be a whole number, got '1.5'",
        "line 3, column intensity: intensity must be between 0 and 2, got 9",
        "line 4, column portrait: missing",
        "line 5, column fixed_pose: must be true or false, got 'maybe'",
        "line 6, column fixed_pose, pose_from: fixed_pose and pose_from exclude each other",
        "line 7, column device: unknown device 'tpu'",
        "line 8: 11 cells, but 8 columns",
    ):
        assert expected in text, text
    assert text.count(str(path)) >= 10


@pytest.mark.parametrize(
    "text, expected",
    [
        ("portrait,voice\na.jpg,one.wav\n", "line 1: unknown column 'voice'; choose from"),
        ("portrait,emotion\na.jpg,happy\n", "line 1: no column speech"),
        ("portrait,speech,speech\na.jpg,one.wav,two.wav\n", "line 1: column speech stands there twice"),
        ("portrait,speech\n", "holds no job"),
        ("", "line 1: no column portrait and speech"),
        ('portrait,speech\n"a.jpg,one.wav\n', "broken csv"),
        ("portrait,speech,output\na.jpg,one.wav,../x.mp4\n", "column output: ../x.mp4 lies outside"),
        ("portrait,speech,output\na.jpg,one.wav,x.gif\n", "column output: x.gif: the name must end in"),
        ("portrait,speech,output\n*.jpg,one.wav,x.mp4\n", "column output: one name for 2 jobs"),
        ("portrait,speech,output\na.jpg,one.wav,x.mp4\nb.jpg,one.wav,x.mp4\n", "already the output of "),
        ("portrait,speech\na.jpg,one.wav\na.jpg,one.wav\n", "already the output of "),
        ("portrait,speech,num_samples\na.jpg,one.wav,0\n", "column num_samples: must be from 1 to 1000"),
        ("portrait,speech,face\na.jpg,one.wav,-1\n", "column face: must be a number from 0"),
        ("portrait,speech,weights\na.jpg,one.wav,none\n", "column weights: weights folder "),
        ("portrait,speech,emotion_track\na.jpg,one.wav,none.csv\n", "column emotion_track: "),
    ],
)
def test_bad_csv(place, text, expected):
    assert expected in refused(table(place, text))


def test_bad_json_lines(place):
    lines = ['{"portrait": "a.jpg"', '["a.jpg"]', '{"portrait": "a.jpg", "speech": "one.wav", "sead": 1}',
             '{"portrait": "a.jpg", "speech": "one.wav", "seed": "x", "full": 1, "emotion": 3}']  # fmt: skip
    text = refused(table(place, "\n".join(lines), "jobs.jsonl"))
    for expected in (
        "6 problems",
        "line 1: broken JSON",
        "line 2: not a JSON object",
        "line 3, column sead: unknown column 'sead'",
        "line 4, column seed: must be a whole number",
        "line 4, column full: must be true or false",
        "line 4, column emotion: must be text, got 3",
    ):
        assert expected in text, text


def test_an_output_may_not_replace_an_input(place):
    (place / "two.mp4").write_text("x")
    path = table(place, "portrait,speech,output\na.jpg,one.wav,two.mp4\nb.jpg,two.mp4,x.mp4\n")
    jobs, problems = read_table(path, place, AnimateArguments())
    check_jobs(jobs, problems)
    with pytest.raises(UserError, match=r"line 2: output .*two\.mp4 is also an input"):
        problems.stop()


def test_other_files_are_refused(place):
    assert "must end in one of .csv, .jsonl, .ndjson" in refused(place / "jobs.xlsx")
    assert "cannot be read" in refused(place / "none.csv")
    (place / "utf16.csv").write_bytes("portrait,speech\n".encode("utf-16"))
    assert "is not UTF-8" in refused(place / "utf16.csv")


def test_the_fingerprint_follows_content_and_options(place, tmp_path_factory):
    from flowvqtalker.batch import job as module

    text = "portrait,speech,seed,device\na.jpg,one.wav,1,cpu\n"
    (job,) = read(table(place, text))
    mark = job.fingerprint()
    other = tmp_path_factory.mktemp("moved")
    for name in ("a.jpg", "one.wav"):
        (other / name).write_text(name)
    (moved,) = read(table(other, text.replace("cpu", "auto")))
    assert moved.fingerprint() == mark
    (changed,) = read(table(place, text.replace(",1,", ",2,")))
    assert changed.fingerprint() != mark
    (place / "one.wav").write_text("another take")
    module._digest.cache_clear()
    assert job.fingerprint() != mark


def test_the_table_of_the_docs_is_a_table(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```csv\n(.*?)```", page, re.DOTALL)
    for name in ("faces/anna.jpg", "faces/ben.jpg", "talks/hello.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [str(job.output.relative_to(OUT)) for job in read(table(tmp_path, text))]
    mixture = "happy-0.7-surprised-0.3"
    assert names == ["anna/hello.mp4", f"anna_hello_{mixture}_0.mp4", f"ben_hello_{mixture}_0.mp4"]
