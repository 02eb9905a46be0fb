"""One job: what is loaded once, what a record promises, how errors come back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flowvqtalker.batch.job import Job, finished, record_path
from flowvqtalker.batch.runner import Runner
from flowvqtalker.io.video import probe
from flowvqtalker.pipeline import Talker
from flowvqtalker.provenance import Marks, verify

from ..conftest import babble, write_wav


@pytest.fixture
def job(portrait_file, tiny_weights, tmp_path) -> Job:
    """A job of ten frames."""
    speech = write_wav(tmp_path / "speech.wav", babble(0.4))
    return Job(
        portrait=portrait_file, speech=speech, output=tmp_path / "out" / "a.mp4", weights=tiny_weights, device="cpu"
    )


@pytest.fixture
def calls(monkeypatch):
    """Counts what is loaded and prepared."""
    counted = {"loads": 0, "portraits": 0}
    load, portrait = Talker.from_pretrained, Talker.portrait

    def counting_load(*arguments, **options):
        counted["loads"] += 1
        return load(*arguments, **options)

    def counting_portrait(self, *arguments):
        counted["portraits"] += 1
        return portrait(self, *arguments)

    monkeypatch.setattr(Talker, "from_pretrained", counting_load)
    monkeypatch.setattr(Talker, "portrait", counting_portrait)
    return counted


def test_models_and_portrait_are_prepared_once(job, calls):
    runner = Runner()
    for seed in range(3):
        one = replace(job, seed=seed, output=job.output.with_stem(str(seed)))
        outcome = runner.run(one)
        assert (outcome.error, outcome.frames) == ("", 10)
        assert finished(one, one.fingerprint())
        assert not finished(one, replace(one, seed=9).fingerprint())
    assert calls == {"loads": 1, "portraits": 1}
    record = json.loads(record_path(one.output).read_text())
    assert (record["frames"], record["job"]["seed"], record["hash"]) == (10, 2, one.fingerprint())
    assert sorted(path.name for path in job.output.parent.iterdir()) == [
        "0.mp4", "0.mp4.json", "1.mp4", "1.mp4.json", "2.mp4", "2.mp4.json",
    ]  # fmt: skip


def test_the_video_is_marked(job):
    Runner().run(replace(job, mark_id=9))
    assert verify(job.output).watermark["identifier"] == 9


def test_the_video_is_that_of_animate(job, tmp_path):
    Runner().run(replace(job, emotion="happy", seed=3, full=True, mark=False))  # no two signatures are alike
    talker = Talker.from_pretrained(job.weights, device="cpu")
    talker.animate(
        job.portrait, job.speech, tmp_path / "b.mp4", emotion="happy", seed=3, full=True, marks=Marks(mark=False)
    )
    assert job.output.read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_an_error_is_an_outcome_and_leaves_nothing(job, tmp_path):
    Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(tmp_path / "wall.png")
    runner = Runner()
    assert "no face found in" in runner.run(replace(job, portrait=tmp_path / "wall.png")).error
    write_wav(tmp_path / "silence.wav", np.zeros(8000))
    assert "is silent throughout" in runner.run(replace(job, speech=tmp_path / "silence.wav")).error
    assert list(job.output.parent.glob("*")) == []
    assert runner.run(job).error == ""  # the runner still works


def test_a_failed_job_does_not_claim_the_video_of_another(job, monkeypatch):
    runner = Runner()
    runner.run(job)
    changed = replace(job, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(Talker, "animate", lambda *a, **k: (_ for _ in ()).throw(MemoryError("full")))
        assert runner.run(changed).error == "MemoryError: full"
    assert not finished(changed, changed.fingerprint())
    assert not finished(job, job.fingerprint())


def test_warnings_come_back(job, astronaut, tmp_path):
    both = astronaut.copy()
    both[300:500, 300:500] = np.asarray(Image.fromarray(astronaut[:260, 90:350]).resize((200, 200)))
    Image.fromarray(both).save(tmp_path / "both.png")
    outcome = Runner().run(replace(job, portrait=tmp_path / "both.png"))
    assert outcome.error == ""
    assert any("shows 2 faces" in warning for warning in outcome.warnings)


def test_check_names_the_column_and_looks_at_each_file_once(job, calls, tmp_path):
    (tmp_path / "track.csv").write_text("time,emotion\n0,glad\n")
    (tmp_path / "noise.wav").write_bytes(b"not sound")
    bad = replace(
        job, speech=tmp_path / "noise.wav", emotion_track=tmp_path / "track.csv", pose_from=tmp_path / "x.npz"
    )
    runner, seen = Runner(), set()
    assert [column for column, _ in runner.check(bad, seen)] == ["speech", "emotion_track", "pose_from"]
    assert list(runner.check(bad, seen)) == []
    assert list(runner.check(job, seen)) == []
    assert calls == {"loads": 1, "portraits": 1}
    assert not job.output.parent.exists()


def test_the_video_is_whole(job):
    Runner().run(job)
    found = probe(job.output)
    assert (found.kind, found.width, found.fps, found.sound) == ("video", 512, 25, True)
