"""The command: what is made, skipped and reported, also after kill -9 of a worker and of the command itself."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from flowvqtalker.batch import command as module
from flowvqtalker.batch.job import Outcome, record_path, write_record
from flowvqtalker.cli import main
from flowvqtalker.io.video import probe

from ..conftest import babble, write_wav


@pytest.fixture
def place(tmp_path, portrait_file, monkeypatch):
    """A folder with two portraits and three recordings, which is also the current one."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(portrait_file.read_bytes())
    for number in range(3):
        write_wav(tmp_path / f"s{number}.wav", babble(0.2, seed=number))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rendered(monkeypatch):
    """Stands in for the worker processes: writes a text for a video, and lists the names."""
    names: list[str] = []

    def run_jobs(jobs, workers, ray, report):
        for job, mark in jobs:
            names.append(job.output.name)
            job.output.parent.mkdir(exist_ok=True, parents=True)
            if "s2" in job.speech.name:
                report(job, Outcome(error="no sound, or none that counts"))
            else:
                write_record(job, mark)
                job.output.write_text("video")
                report(job, Outcome(5, 0.1))

    monkeypatch.setattr(module, "run_jobs", run_jobs)
    return names


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_second_run_makes_what_is_missing_or_changed(place, tiny_weights, rendered, capsys):
    table = place / "jobs.csv"
    table.write_text("portrait,speech\na.png,s0.wav\nb.png,s0.wav\na.png,s2.wav\n")
    line = ["batch", "jobs.csv", "-o", "out", "--weights", str(tiny_weights)]
    assert main(line) == 1
    printed = capsys.readouterr()
    assert "out: 2 made, 0 done before, 1 failed" in printed.out
    assert "out/errors.csv says why" in printed.err
    (failed,) = rows(place / "out/errors.csv")
    assert failed == {
        "output": "out/a_s2_neutral_0.mp4", "portrait": "a.png", "speech": "s2.wav", "source": "jobs.csv, line 4",
        "error": "no sound, or none that counts",
    }  # fmt: skip
    rendered.clear()
    table.write_text("portrait,speech,seed\na.png,s0.wav\nb.png,s0.wav,\nb.png,s1.wav,5\n")
    (place / "out/b_s0_neutral_0.mp4").unlink()
    assert main(line) == 0
    assert rendered == ["b_s0_neutral_0.mp4", "b_s1_neutral_5.mp4"]
    assert not (place / "out/errors.csv").exists()
    rendered.clear()
    assert main([*line, "--intensity", "0.5"]) == 0
    assert len(rendered) == 3
    assert "3 made, 0 done before, 0 failed" in capsys.readouterr().out


def test_shards_cover_every_job_once(place, tiny_weights, rendered):
    line = ["batch", "--portraits", "*.png", "--speech", "s0.wav", "s1.wav", "s2.wav", "--emotions", "happy,sad,fear"]
    codes = [main([*line, "-o", "out", "--weights", str(tiny_weights), "--shard", f"{k}/4"]) for k in range(1, 5)]
    assert len(rendered) == len(set(rendered)) == 2 * 3 * 3
    failed = [row["output"] for path in sorted((place / "out").glob("errors-*-of-4.csv")) for row in rows(path)]
    assert sorted(map(os.path.basename, failed)) == sorted(name for name in rendered if "_s2_" in name)
    assert set(codes) <= {0, 1} and 1 in codes
    rendered.clear()
    main([*line, "-o", "out", "--weights", str(tiny_weights)])
    assert all("_s2_" in name for name in rendered)


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], "give a table of jobs (.csv or .jsonl), or --portraits and --speech"),
        (["--portraits", "a.png"], "give a table of jobs"),
        (["jobs.csv", "--emotions", "sad"], "goes without --portraits"),
        (["jobs.csv", "--shard", "0/4"], "shard '0/4': write I/N with I from 1 to N"),
        (["jobs.csv", "--shard", "5/4"], "shard '5/4'"),
        (["jobs.csv", "--workers", "0"], "workers must be a number from 1, got 0"),
        (["jobs.csv", "--intensity", "3"], "intensity must be between 0 and 2, got 3"),
        (["jobs.csv", "--pose-from", "none.npz"], "input none.npz does not exist"),
        (["jobs.csv", "--device", "tpu"], "unknown device 'tpu'"),
        (["jobs.csv", "--weights", "none"], "weights folder none does not exist"),
        (["jobs.csv", "-o", "a.png"], "output a.png cannot be a folder"),
        (["none.csv"], "job list none.csv cannot be read"),
    ],
)
def test_bad_options_are_user_errors(place, rendered, options, expected, capsys):
    (place / "jobs.csv").write_text("portrait,speech\na.png,s0.wav\na.png,s0.wav\n".replace("\na", "\nb", 1))
    before = sorted(place.rglob("*"))
    assert main(["batch", *(options if "-o" in options else [*options, "-o", "out"])]) == 2
    assert expected in capsys.readouterr().err
    assert rendered == [] and sorted(place.rglob("*")) == before


def test_a_dry_run_opens_everything_and_writes_nothing(place, tiny_weights, rendered, capsys):
    line = ["batch", "jobs.jsonl", "-o", "out", "--weights", str(tiny_weights), "--device", "cpu", "--dry-run"]
    good = {"portrait": "a.png", "speech": "s0.wav"}
    (place / "jobs.jsonl").write_text(json.dumps(good))
    assert main(line) == 0
    assert "1 job: 0 done, 1 to do, every input can be used" in capsys.readouterr().out
    Image.new("RGB", (200, 200), "grey").save(place / "wall.png")
    (place / "noise.wav").write_bytes(b"not sound")
    bad = [good | {"portrait": "wall.png"}, good | {"speech": "noise.wav"}]
    (place / "jobs.jsonl").write_text("\n".join(map(json.dumps, [good, *bad])))
    assert main(line) == 2
    text = capsys.readouterr().err
    assert "dry run: 2 problems" in text
    assert "jobs.jsonl, line 2, column portrait: no face found in" in text
    assert "jobs.jsonl, line 3, column speech: " in text
    assert rendered == [] and not (place / "out").exists()


def test_help_imports_nothing_heavy():
    code = "import sys; from flowvqtalker.cli import main; main(['batch', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--portraits" in done.stdout
    assert not set(done.stdout.splitlines()[-1].split()) & {"torch", "mediapipe", "av", "cv2", "scipy"}


# ------------------------------------------------------------------------------------------- real worker processes


def workers(parent: int) -> list[int]:
    """Process ids of the workers of a command."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            ppid = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if ppid == parent and b"spawn_main" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


@pytest.fixture
def start(place, tiny_weights) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the real program on two jobs, each long enough to be killed in."""
    for number in range(2):
        write_wav(place / f"s{number}.wav", babble(2.0, seed=number))
    begun: list[subprocess.Popen[str]] = []
    # Tests that a shell runs in the background would else pass on that Ctrl-C is ignored.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*options: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "flowvqtalker", "batch", "--portraits", "a.png", "--speech", "s0.wav", "s1.wav"]
        line += ["-o", "out", "--weights", str(tiny_weights), "--device", "cpu", *options]
        begun.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield run
    signal.signal(signal.SIGINT, former)
    for process in begun:
        process.kill()
        process.communicate()


VIDEOS = [Path("out/a_s0_neutral_0.mp4"), Path("out/a_s1_neutral_0.mp4")]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")


def clean(folder: Path) -> bool:
    """Whether there is nothing but whole videos with their records."""
    names = {path.name for path in folder.iterdir()}
    return names == {path.name for video in VIDEOS for path in (video, record_path(video))}


@pytest.mark.slow
@needs_proc
def test_a_killed_worker_costs_its_job_one_of_two_tries(start):
    process = start()
    for video, kills in zip(VIDEOS, (2, 1), strict=True):
        for _ in range(kills):
            known = workers(process.pid)
            # The record comes before the video: then the job is being rendered.
            until(lambda video=video: record_path(video).exists() and workers(process.pid), process)
            assert not video.exists()
            known = workers(process.pid)
            os.kill(known[0], signal.SIGKILL)
            record_path(video).unlink()
            until(lambda known=known: workers(process.pid) and workers(process.pid) != known, process)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert "out: 1 made, 0 done before, 1 failed" in out
    (failed,) = rows(Path("out/errors.csv"))
    assert failed["output"] == str(VIDEOS[0]) and "was killed by signal 9, 2 times" in failed["error"]
    again = start()
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "out: 1 made, 1 done before, 0 failed" in out
    assert clean(Path("out"))


@pytest.mark.slow
@needs_proc
def test_the_command_resumes_after_kill_9(start):
    process = start()
    until(lambda: record_path(VIDEOS[1]).exists(), process)
    (worker,) = workers(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()  # no orphan renders on
    assert VIDEOS[0].exists() and not VIDEOS[1].exists()
    first = VIDEOS[0].stat()
    again = start("--workers", "2")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "out: 1 made, 1 done before, 0 failed" in out
    assert (VIDEOS[0].stat().st_ino, VIDEOS[0].stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert clean(Path("out"))
    assert [probe(video).kind for video in VIDEOS] == ["video", "video"]


@pytest.mark.slow
@needs_proc
def test_an_interrupt_ends_the_workers(start):
    process = start("--workers", "2")
    until(lambda: len(workers(process.pid)) == 2, process)  # later, a fast machine could be done already
    running = workers(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in running)
