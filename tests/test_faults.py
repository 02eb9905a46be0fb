"""Faults of the machine: a command ends with one line, or is killed, and leaves whole files alone (docs/faults.md).

With KILLS=N (`make faults`) commands are killed at N moments of each kind, `animate` and `evaluate run` too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker.cli import main
from flowvqtalker.commands import Doctor
from flowvqtalker.data.identity import Describer
from flowvqtalker.data.prepare import PrepareConfig, prepare
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.video import VideoWriter, read_video
from flowvqtalker.train.loop import fit
from tests.conftest import babble, write_wav
from tests.data.test_prepare import LENIENT, FakeTracker, fake_fit
from tests.data.test_prepare import data as clips_to_prepare  # noqa: F401
from tests.tables.test_run import clips as clips_to_evaluate  # noqa: F401
from tests.train.test_loop import CONFIG, Toy

resource = pytest.importorskip("resource")  # not on Windows
KILLS = int(os.environ.get("KILLS", "1"))
long = pytest.mark.skipif("KILLS" not in os.environ, reason="long; `make faults` runs it")
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")  # Python's audit events
LEFT = ".flowvqtalker.part"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def start(work: Callable[[], object], said: Path | str = os.devnull) -> int:
    """Do something in a child process whose output goes to a file."""
    cv2.setNumThreads(1)  # threads do not survive a fork
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            warnings.simplefilter("ignore")
            code = int(work() or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Check:
    """A command that writes to a folder, killed again and again; the same command goes on from what was there.

    Arguments:
        folder: where it writes.
        work: the command.
        whole: raises an error if a file in the folder is not whole.
        ignored: names of files that may differ, since they hold times.
        value: of a file, what equal runs share; by default every byte.
    """

    def __init__(
        self,
        folder: Path,
        work: Callable[[], object],
        whole: Callable[[Path], object] = lambda path: None,
        ignored: tuple[str, ...] = (),
        value: Callable[[Path], object] = digest,
    ) -> None:
        self.folder, self.work, self.whole, self.ignored, self.value = folder, work, whole, ignored, value
        self.seed = random.SystemRandom().randrange(1 << 32)
        self.rng = random.Random(self.seed)
        self.count = folder.with_name(folder.name + ".count")

    def content(self) -> dict[str, object]:
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name not in self.ignored]
        return {str(path.relative_to(self.folder)): self.value(path) for path in files}

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def after_a_kill(self) -> None:
        for path in self.folder.rglob("*"):
            assert not path.name.endswith(".part") or path.name == LEFT, f"{path} was left"
            if path.is_file() and path.name != LEFT:
                self.whole(path)

    def at_random_moments(self) -> None:
        self.clear()
        began = time.monotonic()
        assert finish(start(self.work)) == 0
        seconds = time.monotonic() - began
        expected = self.content()
        assert expected
        done = finished = 0
        while done < KILLS:
            if set(self.content()) == set(expected):
                finished += 1
                self.clear()
            child = start(self.work)
            time.sleep(self.rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            code = finish(child)
            assert code in (0, -signal.SIGKILL)
            done += code != 0
            self.after_a_kill()
        assert finish(start(self.work)) == 0
        assert self.content() == expected
        print(f"{done} kills, {finished} whole runs of {seconds:.1f} s, seed {self.seed}")

    def at_changes(self) -> None:
        """Before KILLS of the changes of its files, or before all of them if there are no more."""
        self.clear()
        assert finish(start(partial(self._until, -1))) == 0
        total, expected = int(self.count.read_text()), self.content()
        assert total
        moments = self.rng.sample(range(total), min(KILLS, total))
        for moment in moments:
            self.clear()
            assert finish(start(partial(self._until, moment))) == -signal.SIGKILL
            self.after_a_kill()
            assert finish(start(self.work)) == 0
            assert self.content() == expected, f"killed before change {moment}, seed {self.seed}"
        print(f"killed before {len(moments)} of {total} changes")

    def _until(self, moment: int) -> object:
        """Work until a change of files; a file that would be opened under its own name is then empty."""
        changes = 0
        deep = str(self.folder)

        def see(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            paths = [os.fsdecode(one) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
            if not (opened or event in CHANGES) or not any(path.startswith(deep) for path in paths):
                return
            changes += 1
            if changes == moment + 1:
                if opened and arguments[2] & os.O_TRUNC:
                    os.close(os.open(paths[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(see)
        result = self.work()
        if moment < 0:
            self.count.write_text(str(changes))
        return result


def whole_video(path: Path) -> None:
    if path.suffix == ".mp4":
        assert sum(1 for _ in read_video(path)) > 5


@pytest.fixture
def animation(tmp_path, tiny_weights, portrait_file):
    speech = write_wav(tmp_path / "speech.wav", babble(1.0))
    line = ["animate", str(portrait_file), str(speech), "-o", str(tmp_path / "out" / "a.mp4"), "--no-mark"]
    return Check(
        tmp_path / "out", lambda: main([*line, "--weights", str(tiny_weights), "--device", "cpu"]), whole_video
    )


@pytest.fixture
def evaluation(clips_to_evaluate, tiny_weights):  # noqa: F811
    out = clips_to_evaluate / "out"
    line = ["evaluate", "run", "--split", str(clips_to_evaluate / "split.csv"), "-o", str(out), "--no-table"]
    line += ["--weights", str(tiny_weights), "--device", "cpu", "--method", "copy", "warp"]
    return Check(out, lambda: main(line), whole_video)


@pytest.fixture
def preparation(tmp_path, clips_to_prepare, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Describer, "__init__", lambda self: setattr(self, "_network", None))  # loads in no time
    root, tracker = clips_to_prepare
    out = tmp_path / "out"
    config = PrepareConfig(root, out / "shard", tmp_path / "none", frames=4, min_native=100, **LENIENT)

    def work() -> None:
        prepare(config, make_tracker=FakeTracker(tracker.by_length), fit=fake_fit)

    return Check(out, work)


@pytest.fixture
def training(tmp_path):
    out = tmp_path / "out"

    def value(path: Path) -> object:
        """Of a checkpoint the values, since what its pickle shares is not one of them."""
        if path.name != "checkpoint.pt":
            return digest(path)
        kept = torch.load(path, weights_only=True)
        return json.dumps([kept["progress"], kept["parts"]], default=torch.Tensor.tolist)

    def work() -> None:
        fit(Toy(), CONFIG, out, resume=(out / "checkpoint.pt").exists())

    return Check(out, work, ignored=("log.csv",), value=value)


@pytest.mark.parametrize("command", ["preparation", "training"])
def test_killed_before_a_change(command, request):
    request.getfixturevalue(command).at_changes()


@long
@pytest.mark.parametrize("command", ["animation", "evaluation"])
def test_slow_command_killed_before_a_change(command, request):
    request.getfixturevalue(command).at_changes()


@long
@pytest.mark.parametrize("command", ["animation", "preparation", "training", "evaluation"])
def test_killed_at_random_moments(command, request):
    request.getfixturevalue(command).at_random_moments()


# ------------------------------------------------------------------------------------------------------- one line each


@pytest.fixture
def motion(tmp_path, tiny_weights):
    """Runs `motion` in a new process, after some code there; returns the exit code and what it said.

    Not in a forked one: the voice activity detector's threads do not survive a fork.
    """
    speech = write_wav(tmp_path / "speech.wav", babble(1.0))
    (tmp_path / "out").mkdir()

    def run(before: str = "", name: str = "a.npz") -> tuple[int, str]:
        line = ["motion", str(speech), "-o", str(tmp_path / "out" / name), "--weights", str(tiny_weights)]
        code = (
            f"import sys, flowvqtalker.pipeline\nfrom flowvqtalker.cli import main\n{before}\nsys.exit(main({line!r}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_full_quota_is_one_line(motion, tmp_path):
    """Python ignores SIGXFSZ, so a write beyond the limit is an error like that of a full disk."""
    code, said = motion("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))")
    assert code == 2 and said.count("\n") == 1 and "cannot be written" in said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def disk(tmp_path):
    """A file system, on which a function mounts anew what is given."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user cannot mount a file system")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("options", ["size=12k", "ro"])
def test_a_disk_that_is_full_or_read_only(disk, options, clips_to_prepare):  # noqa: F811
    """Errors that the command line tells in one line; what was there stays, and nothing else."""
    root, tracker = clips_to_prepare
    folder = disk(options)
    rng = np.random.default_rng(0)

    def video() -> None:
        with VideoWriter(folder / "a.mp4") as writer:
            for _ in range(20):
                writer.write(rng.integers(0, 255, (64, 64, 3), np.uint8))

    def shard() -> None:
        config = PrepareConfig(root, folder / "shard", root / "none", frames=4, min_native=100, **LENIENT)
        prepare(config, make_tracker=FakeTracker(tracker.by_length), fit=fake_fit)

    for write in (video, shard, lambda: fit(Toy(), CONFIG, folder / "run")):
        with pytest.raises((UserError, OSError), match=r"cannot be (written|created)|No space|Read-only"):
            write()
        assert [path for path in folder.rglob("*") if path.suffix in (".part", ".mp4", ".npz")] == []
        for left in folder.iterdir():
            shutil.rmtree(left)


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(Doctor, "run", lambda self: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.endswith("the output cannot be written (No space left on device); check the disk\n")


def test_a_small_address_space_is_one_line(tmp_path, speech, portrait_file, tiny_weights, monkeypatch, capsys):
    """As under `ulimit -v`. Native libraries would abort the process, so the limit is looked at first."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2_000_000_000, resource.RLIM_INFINITY))
    line = ["animate", str(portrait_file), str(speech), "-o", str(tmp_path / "a.mp4"), "--weights", str(tiny_weights)]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "limited to 2.0 GB" in said and "ulimit -v" in said


def test_too_little_memory_leaves_nothing(motion, tmp_path):
    """Native libraries abort the process at some allocations, so the exit code is not told."""
    before = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20),) * 2)
"""
    assert motion(before)[0] != 0
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 55), lambda: np.empty(1 << 55)])
def test_memory_that_is_not_there_is_one_line(allocate, monkeypatch, capsys):
    monkeypatch.setattr(Doctor, "run", lambda self: allocate())
    assert main(["doctor"]) == 1
    assert "not enough memory" in capsys.readouterr().err


def test_no_home_and_no_temporary_folder(motion, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CONFIG_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    assert motion()[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.npz"]


def test_a_clock_that_jumps_changes_nothing(motion, tmp_path):
    jumping = "import random, time; jumps = random.Random(0); time.time = lambda: jumps.uniform(0, 4e9)"
    assert motion()[0] == motion(jumping, "b.npz")[0] == 0
    first, second = (np.load(tmp_path / "out" / name)["expression"] for name in ("a.npz", "b.npz"))
    assert np.array_equal(first, second)


def test_two_processes_write_the_same_file(tmp_path):
    """The file is one of the two, whole, whoever comes last."""

    def write(letter: bytes) -> None:
        for _ in range(200):
            atomic_write(tmp_path / "a", lambda path: path.write_bytes(letter * 100_000))

    children = [start(lambda letter=letter: write(letter)) for letter in (b"x", b"y")]
    while not (tmp_path / "a").exists():
        time.sleep(0.001)
    for _ in range(200):
        assert set((tmp_path / "a").read_bytes()) in ({ord("x")}, {ord("y")})
        assert (tmp_path / "a").stat().st_size == 100_000
    assert [finish(child) for child in children] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_control_c_twice_leaves_nothing(tmp_path):
    def work() -> int:
        with VideoWriter(tmp_path / "a.mp4") as writer:
            while True:
                writer.write(np.zeros((64, 64, 3), np.uint8))

    child = start(work)
    time.sleep(0.5)
    os.kill(child, signal.SIGINT)
    time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGINT)
    assert finish(child) != 0
    assert list(tmp_path.iterdir()) == []


def test_a_failing_encoder_is_a_user_error(tmp_path, monkeypatch):
    import av

    def work() -> None:
        with VideoWriter(tmp_path / "a.mp4") as writer:
            writer.write(np.zeros((64, 64, 3), np.uint8))

            class Broken:
                codec_context = writer._video.codec_context

                def encode(self, frame: object) -> None:
                    raise av.ExternalError(1, "generic error in an external library")

            writer._video = Broken()
            writer.write(np.zeros((64, 64, 3), np.uint8))

    with pytest.raises(UserError, match="cannot be written"):
        work()
    assert list(tmp_path.iterdir()) == []
