"""The scripts in runs/, from folders as MEAD, HDTF and FFHQ have them to tables and figures, at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from flowvqtalker.io import audio
from flowvqtalker.io.video import VideoWriter

from .conftest import write_wav
from .forked import commands

REPOSITORY = Path(__file__).parents[1]


def write_clip(path: Path, portrait: np.ndarray, speech: Path | None, seed: int, frames: int = 26) -> None:
    """The portrait, moved and scaled a little from frame to frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, speech, preset="ultrafast") as writer:
        for t in range(frames):
            angle, scale = 3 * np.sin(seed + t / 4), 1 + 0.02 * np.sin(t / 3)
            matrix = cv2.getRotationMatrix2D((256, 200), angle, scale)
            writer.write(cv2.warpAffine(portrait, matrix, (512, 512), borderMode=cv2.BORDER_REPLICATE))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray, sample_speech: Path) -> Path:
    """Small trees with the names of the published data sets."""
    root = tmp_path_factory.mktemp("data")
    wave = audio.load(sample_speech)
    speech = write_wav(root / "speech.wav", wave[16_000 : 16_000 + 26 * 640])
    for seed, (who, emotion) in enumerate([("M003", "happy"), ("M011", "angry"), ("W011", "neutral")]):
        take = f"{emotion}/level_1/001"
        write_clip(root / "MEAD" / who / "video/front" / f"{take}.mp4", astronaut, None, seed)
        sound = root / "MEAD" / who / "audio" / f"{take}.wav"
        sound.parent.mkdir(parents=True)
        sound.write_bytes(speech.read_bytes())
    write_clip(root / "HDTF" / "RD_Radio11_001.mp4", astronaut, speech, 3)
    write_clip(root / "HDTF" / "WRA_TestPerson_000.mp4", astronaut, speech, 4)
    faces = root / "FFHQ" / "00000"
    faces.mkdir(parents=True)
    for number in range(12):
        cv2.imwrite(str(faces / f"{number:05d}.png"), np.roll(astronaut[..., ::-1], number, axis=1))
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work") / "paper"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Runs a script."""
    folder = tmp_path_factory.mktemp("bin")
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def call(script: str, *arguments: str | Path, zoom: str = "mouth") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZOOM": zoom, "PATH": path}
        command = ["bash", str(REPOSITORY / "runs" / script), *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]

    one = folder / "nproc"  # every worker of `prepare` imports everything anew
    one.write_text("#!/bin/sh\necho 1\n")
    one.chmod(0o755)
    with commands(folder):
        yield call


@pytest.mark.slow
def test_weights_of_the_paper(data: Path, work: Path, run: Callable[..., None]) -> None:
    run("paper_weights.sh", data / "MEAD", data / "HDTF", data / "FFHQ", work, "configs/toy")
    entries = json.loads((work / "weights" / "manifest.json").read_text())
    assert {"codebook.safetensors", "vqig.safetensors", "expflow.safetensors", "poseflow.safetensors"} <= set(entries)
    rows = [row.split(",") for row in (work / "shard" / "identities.csv").read_text().splitlines()]
    people = {row[2]: row[3] for row in rows}
    assert people["Radio11"] == "val"  # of the published test list; its hash says train
    assert people["MEAD_M011"] == "train"


@pytest.mark.slow
def test_tables_and_figures(data: Path, work: Path, run: Callable[..., None]) -> None:
    run("table1.sh", data / "MEAD", data / "HDTF", work, "--limit", "1", "--seconds", "1", "--jobs", "1")
    assert "animate" in (work / "table1" / "mead" / "table1.md").read_text()
    assert "animate" in (work / "table1" / "hdtf" / "table1.md").read_text()
    run("table2.sh", work)
    assert (work / "study" / "key.json").is_file()
    run("figures.sh", work, zoom="none")  # nobody finds a face in what toy weights draw
    for number in (4, 5, 6, 7):
        assert (work / "figures" / f"fig{number}.png").stat().st_size > 10_000
