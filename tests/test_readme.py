"""Every command and the Python of the README run, on one second of speech."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from flowvqtalker import weights
from flowvqtalker.cli import main
from flowvqtalker.io.video import VideoWriter, probe

from .conftest import babble, write_wav

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path, monkeypatch, portrait_file, astronaut, tiny_weights):
    """A folder with the files that the README speaks of; the default weights are tiny ones."""
    from PIL import Image

    Image.fromarray(astronaut).save(tmp_path / "portrait.jpg", quality=95)
    write_wav(tmp_path / "speech.wav", babble(1.0))
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for _ in range(3):
            writer.write(astronaut)
    monkeypatch.chdir(tmp_path)
    default = weights.folder
    monkeypatch.setenv("FLOWVQTALKER_FACE_LANDMARKER", str(default() / weights.LANDMARKER))
    monkeypatch.setattr(weights, "folder", lambda path=None: default(tiny_weights if path is None else path))
    return tmp_path


@pytest.mark.slow
def test_commands_run(place):
    ran = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("flowvqtalker ")]
    names = ["animate", "animate", "motion", "track", "render", "verify", "doctor", "train", "evaluate"]
    assert [line[0] for line in ran] == names
    for line in ran:
        assert main(line) == 0, line
    assert probe("out.mp4").kind == "video"
    assert (place / "motion.csv").is_file()


def test_make_targets_exist():
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    if shutil.which("make") is None:
        pytest.skip("make is not installed here")
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_python_runs(place, capsys):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "64" in printed
    assert "(512, 512, 3)" in printed
    assert probe(place / "happy.mp4").sound


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
