"""The commands `live` and `say`, and what they write to."""

from __future__ import annotations

import io
import sys
import wave
from types import SimpleNamespace

import av
import numpy as np
import pytest

from flowvqtalker.cli import main
from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.live.engine import LiveFrame, State
from flowvqtalker.live.outputs import StreamWriter

from ..conftest import babble


def measured(path):
    """Presentation times of the images, and seconds of sound."""
    with av.open(str(path)) as file:
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    with av.open(str(path)) as file:
        samples = sum(frame.samples for frame in file.decode(audio=0))
    return np.array(times), samples / 48_000


@pytest.mark.parametrize("name", ["a.ts", "a.mp4", "a.mkv"])
def test_a_stream_can_be_played(tmp_path, name):
    with StreamWriter(str(tmp_path / name), 48_000) as writer:
        for tick in range(25):
            image = None if tick % 2 else np.full((512, 512, 3), 4 * tick, np.uint8)
            sound = np.full(1920, 0.1, np.float32)
            motion = Motion(None, None)  # type: ignore[arg-type]
            writer.write(LiveFrame(image, sound, tick / 25, State.IDLE, motion))
    times, seconds = measured(tmp_path / name)
    assert len(times) == 13 and times[0] < 0.03
    np.testing.assert_allclose(np.diff(times)[1:], 0.08, atol=0.002)
    assert seconds == pytest.approx(1.0, abs=0.05)


def test_a_target_that_cannot_be_is_refused(tmp_path):
    for target, message in (("a.txt", "give - "), (str(tmp_path / "no" / "a.ts"), "cannot be opened")):
        with pytest.raises(UserError, match=message):
            StreamWriter(target, 48_000)


def test_raw_samples_become_a_video(tiny_weights, portrait_file, tmp_path, monkeypatch):
    raw = (babble(0.6, rate=22_050) * 20_000).astype("<i2").tobytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    out = tmp_path / "out.ts"
    options = ["--rate", "22050", "-o", str(out), "--weights", str(tiny_weights), "--fps", "5", "--device", "cpu"]
    assert main(["live", str(portrait_file), "-", *options]) == 0
    times, seconds = measured(out)
    assert len(times) >= 1 and seconds > 1.5  # the speech and the second after it


def test_what_live_cannot_take_is_named(portrait_file, capsys):
    assert main(["live", str(portrait_file), "speech.wav"]) == 2
    assert main(["live", "nobody.jpg", "-", "-o", "-"]) == 2
    assert main(["live", str(portrait_file), "-", "-o", "out.txt"]) == 2
    said = capsys.readouterr().err
    assert "for a file use `animate`" in said and "nobody.jpg does not exist" in said and "out.txt: give" in said


def test_say_writes_sound_and_names_what_it_cannot_do(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    out = tmp_path / "a.wav"
    assert main(["say", "Good morning, everybody.", "--voice", "de+f3", "-o", str(out)]) == 0
    with wave.open(str(out)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert 0.8 < len(samples) / file.getframerate() < 4
    assert np.abs(samples).max() > 3000
    for text, options in (
        ("Hi", ["--voice", "xx"]),
        (" ", []),
        ("Hi", ["--speed", "5"]),
        ("Hi", ["--portrait", "a.png"]),
    ):
        assert main(["say", text, "-o", str(tmp_path / "b.wav"), *options]) == 2
    said = capsys.readouterr().err
    assert all(
        part in said for part in ("no voice 'xx'", "nothing to say", "speed must be", "give --portrait with a video")
    )
    assert not (tmp_path / "b.wav").exists()
