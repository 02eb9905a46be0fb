"""Figure 5: trace maps and correlation maps, and its command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker_eval.figures import pose, style

pytest.importorskip("matplotlib")

SPEECH = Path(__file__).parents[2] / "src/flowvqtalker/assets/sample_speech.ogg"


def check_files(path: Path) -> None:
    """Both files are there and hold something, nothing else lies beside them."""
    png, pdf = path.with_suffix(".png"), path.with_suffix(".pdf")
    pixels = np.asarray(Image.open(png).convert("L"))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 200
    assert pixels.std() > 10
    assert pdf.read_bytes().startswith(b"%PDF")
    assert sorted(file.name for file in path.parent.iterdir() if path.stem in file.name) == [pdf.name, png.name]


def test_a_trace_is_the_maximum_over_time() -> None:
    points = np.array([[[100.0, 100.0], [400.0, 300.0]], [[104.0, 100.0], [400.0, 300.0]]])
    both = pose.trace_map(points, size=256)
    assert np.array_equal(both, np.maximum(pose.trace_map(points[:1], 256), pose.trace_map(points[1:], 256)))
    assert both[150, 200] == 1  # a point of 512 pixels on a canvas of 256
    assert both[50, 50] == 1 and both[50, 52] == 1
    assert both[200, 50] == 0
    assert (both > 0).sum() < 60


def test_frames_without_a_face_and_points_beyond_the_canvas_leave_no_trace() -> None:
    points = np.array([[[100.0, 100.0]], [[np.nan, np.nan]], [[1e9, -1e9]]])
    assert np.array_equal(pose.trace_map(points), pose.trace_map(points[:1]))
    with pytest.raises(UserError, match=r"\(T, P, 2\)"):
        pose.trace_map(np.zeros((5, 2)))


def test_the_correlation_map_finds_a_known_lag() -> None:
    rng = np.random.default_rng(0)
    sound = np.abs(rng.standard_normal(400))
    rho = np.zeros((400, 6))
    steps = np.zeros(400)
    steps[5:] = sound[:-5]  # yaw moves five frames after the sound
    rho[:, 1] = np.cumsum(steps * rng.choice([-1, 1], 400)) * 0.01
    rho[:, 2] = 0.1  # roll never moves
    rho[:, 0] = np.cumsum(rng.standard_normal(400))
    found = pose.correlation_map(sound, rho)
    assert found.shape == (3, 31)
    assert found[1].argmax() - 15 == 5
    assert found[1, 20] == pytest.approx(1)
    assert np.abs(np.delete(found[1], 20)).max() < 0.4
    assert np.isnan(found[2]).all()
    assert np.abs(found[0]).max() < 0.4


def test_a_single_window_is_the_plain_correlation() -> None:
    rng = np.random.default_rng(1)
    sound, rho = rng.standard_normal(30), np.cumsum(rng.standard_normal((30, 6)), axis=0)
    found = pose.correlation_map(sound, rho, lags=2)
    moved = np.abs(np.diff(rho[:, 0]))
    assert found[0, 2] == pytest.approx(np.corrcoef(sound[1:], moved)[0, 1])
    assert found[0, 4] == pytest.approx(np.corrcoef(sound[1:-2], moved[2:])[0, 1])
    assert found[0, 0] == pytest.approx(np.corrcoef(sound[3:], moved[:-2])[0, 1])


def test_frames_without_a_voice_are_left_out_and_short_clips_refused() -> None:
    rng = np.random.default_rng(2)
    sound, rho = rng.standard_normal(40), np.cumsum(rng.standard_normal((40, 6)), axis=0)
    voiced = np.where(np.arange(40) % 5 == 0, np.nan, sound)
    kept = ~np.isnan(voiced[1:])
    moved = np.abs(np.diff(rho[:, 1]))
    found = pose.correlation_map(voiced, rho, lags=0)
    assert found[1, 0] == pytest.approx(np.corrcoef(sound[1:][kept], moved[kept])[0, 1])
    assert np.isnan(pose.correlation_map(np.full(40, np.nan), rho)).all()
    with pytest.raises(UserError, match="longer clip"):
        pose.correlation_map(sound[:18], rho)


def test_the_figure_is_written_as_png_and_pdf(tmp_path) -> None:
    rng = np.random.default_rng(0)
    trace = pose.trace_map(rng.uniform(100, 400, (5, 30, 2)))
    maps = {"level": rng.uniform(-0.5, 0.5, (3, 31))}
    panels = [
        pose.Panel("real", trace, np.array([1.0, 2.0, 3.0]), maps),
        pose.Panel("silent", trace, np.array([1.0, 2.0, 3.0])),
    ]
    assert style.save(pose.make(panels), tmp_path / "a.pdf") == (tmp_path / "a.png", tmp_path / "a.pdf")
    check_files(tmp_path / "a.png")
    before = (tmp_path / "a.pdf").read_bytes()
    style.save(pose.make(panels), tmp_path / "a.png")
    assert (tmp_path / "a.pdf").read_bytes() == before
    style.save(pose.make(panels[1:]), tmp_path / "b.png")  # without any sound: traces alone
    check_files(tmp_path / "b.png")
    with pytest.raises(UserError, match="no motion"):
        pose.make([])


def test_the_command_draws_motion_files_and_seeds(tmp_path, tiny_weights) -> None:
    pytest.importorskip("librosa")
    rng = np.random.default_rng(0)
    rho = np.cumsum(rng.standard_normal((60, 6)) * 0.003, axis=0).astype(np.float32)
    rho[:, 5] += 10
    made = Coefficients(np.zeros((60, 64), np.float32), rho, np.zeros(80, np.float32))
    made.save(tmp_path / "made.npz")
    import wave

    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        t = np.arange(16000 * 2) / 16000
        tone = 8000 * np.sin(2 * np.pi * (120 + 20 * np.sin(4 * t)) * t) * (1 + np.sin(9 * t)) / 2
        file.writeframes(tone.astype(np.int16).tobytes())
    command = pose.Pose(
        motion=(f"ours={tmp_path / 'made.npz'}",),
        speech=tmp_path / "speech.wav",
        seeds=(0,),
        output=tmp_path / "pose.png",
        weights=tiny_weights,
    )
    command.run()
    check_files(tmp_path / "pose.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no speech to generate motion from"),
        ({"motion": ("made.npz",)}, "NAME=PATH"),
        ({"motion": ("ours=missing.npz",)}, "does not exist"),
        ({"speech": Path("missing.wav")}, "does not exist"),
        ({"speech": SPEECH, "emotion": "bored"}, "unknown emotion"),
        ({"output": Path("pose.svg")}, r"\.png, \.pdf"),
        ({"output": Path("/nowhere/at/all/pose.png")}, "no folder"),
    ],
)
def test_bad_input_of_the_command(options, message) -> None:
    with pytest.raises(UserError, match=message):
        pose.Pose(**options).figure()
