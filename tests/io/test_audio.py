"""Decoding: exact lengths, streams equal to wholes, memory that does not grow, clear refusals."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode

from ..conftest import babble, write_wav


def encode(path: Path, samples: np.ndarray, codec: str, rate: int, layout: str = "mono") -> Path:
    """Write (channels, n) float32 samples with a codec of PyAV's."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), format="fltp", layout=layout)
        frame.rate = rate
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for part in (frame, None):
            for resampled in resampler.resample(part):
                container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_wav_of_any_rate_keeps_its_length_and_level(tmp_path, rate):
    time = np.arange(rate) / rate
    wave = decode.load(write_wav(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate))
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) <= 1
    assert np.sqrt((wave[1600:-1600] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)


def test_sixteen_kilohertz_wav_is_not_changed(tmp_path):
    samples = babble(0.5)
    wave = decode.load(write_wav(tmp_path / "a.wav", samples))
    np.testing.assert_allclose(wave, samples, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.ogg", "libopus"), ("a.m4a", "aac")]
)
def test_usual_formats_are_read(tmp_path, name, codec):
    samples = babble(2.0, 48_000)
    speech = decode.scan(encode(tmp_path / name, np.stack([samples, samples]), codec, 48_000, "stereo"))
    assert speech.seconds == pytest.approx(2.0, abs=0.06)  # a codec's own padding
    assert speech.frames == -(-speech.samples // 640)


def test_bundled_speech_is_ten_seconds(sample_speech):
    speech = decode.scan(sample_speech)
    assert speech.seconds == pytest.approx(10.0, abs=0.02)
    assert speech.frames == 250
    assert 0.5 < speech.peak <= 1


def test_blocks_are_the_whole(sample_speech):
    whole = decode.load(sample_speech)
    blocks = list(decode.stream(sample_speech, seconds=0.37))
    assert {len(block) for block in blocks[:-1]} == {round(0.37 * 16_000)}
    assert np.array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read as audio"),
        (b"this is no sound at all" * 50, "cannot be read as audio"),
    ],
)
def test_files_that_are_no_audio_are_refused(tmp_path, content, message):
    path = tmp_path / "speech.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        decode.scan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="folder"):
        decode.scan(tmp_path)


def test_video_without_sound_is_refused(tmp_path):
    path = tmp_path / "mute.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="no audio track"):
        decode.scan(path)


def test_zero_seconds_are_refused(tmp_path):
    with pytest.raises(UserError, match="0 seconds"):
        decode.scan(write_wav(tmp_path / "empty.wav", np.zeros(0)))


@pytest.mark.parametrize(("level", "message"), [(0.0, "digital silence"), (3e-4, "peak -7[01] dBFS")])
def test_silence_from_end_to_end_is_refused(tmp_path, level, message):
    tone = level * np.sin(np.arange(16_000))
    with pytest.raises(UserError, match=f"silent throughout .{message}"):
        decode.scan(write_wav(tmp_path / "silent.wav", tone))


def test_one_word_in_silence_is_enough(tmp_path):
    wave = np.zeros(32_000)
    wave[20_000:22_000] = 0.1 * np.sin(np.arange(2_000) * 0.3)
    assert decode.scan(write_wav(tmp_path / "word.wav", wave)).frames == 50


def test_damaged_packets_are_skipped(tmp_path, caplog):
    path = encode(tmp_path / "a.mp3", babble(3.0, 48_000)[None], "libmp3lame", 48_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    assert 2.5 < decode.scan(path).seconds < 3.1


def test_samples_that_are_no_numbers_become_silence(tmp_path):
    samples = babble(0.5)[None].astype(np.float32)
    samples[0, 100:110] = np.nan
    path = encode(tmp_path / "a.wav", samples, "pcm_f32le", 16_000)
    wave = decode.load(path)
    assert np.isfinite(wave).all()
    assert np.all(wave[100:110] == 0)
