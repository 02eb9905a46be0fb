"""Decoding and features: exact lengths, streams equal to wholes, memory that does not grow, clear refusals."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode
from flowvqtalker.speech import features

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
    with pytest.raises(UserError, match=f"silent from end to end .{message}"):
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


def reference_log_mel(wave: np.ndarray) -> np.ndarray:
    """The same spectrogram from torch's own STFT."""
    samples = torch.from_numpy(wave).double()
    emphasised = samples.clone()
    emphasised[1:] -= 0.97 * samples[:-1]
    window = torch.hann_window(800, dtype=torch.float64)
    spectrum = torch.stft(
        emphasised, 800, 200, window=window, center=True, pad_mode="constant", return_complex=True
    ).abs()
    decibels = 20 * torch.log10((spectrum.T @ torch.from_numpy(features.mel_filters())).clamp_min(1e-5)) - 20
    return ((decibels + 100) * 0.08 - 4).clamp(-4, 4).numpy()


def test_log_mel_is_what_the_definition_says():
    wave = babble(1.3).astype(np.float32)
    mel = features.log_mel(wave)
    assert mel.shape == (1 + len(wave) // 200, 80)
    np.testing.assert_allclose(mel, reference_log_mel(wave), atol=1e-5)


def test_mel_filters_follow_slaney():
    filters = features.mel_filters()
    assert filters.shape == (401, 80)
    np.testing.assert_allclose(filters.sum(0)[20:] * 20.0, 1.0, atol=0.06)  # unit area, bins are 20 Hz apart
    peaks = filters.argmax(0) * 20
    assert np.all(np.diff(peaks) >= 0)
    assert filters[: 55 // 20 + 1].sum() == 0
    assert filters[7600 // 20 + 1 :].sum() == 0
    below = np.diff(peaks[peaks < 1000])
    assert below.max() - below.min() <= 20  # evenly spaced below 1 kHz


def test_a_tone_lights_its_band():
    time = np.arange(16_000) / 16_000
    band = features.log_mel((0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32))[40].argmax()
    assert abs(int(features.mel_filters()[:, band].argmax()) * 20 - 1000) <= 40


def test_silence_is_the_floor():
    assert np.all(features.log_mel(np.zeros(8_000, np.float32)) == -4)


@pytest.mark.parametrize("samples", [1, 100, 639, 640, 641, 16_000, 16_001])
def test_one_window_for_each_video_frame(samples):
    wave = babble(1.1)[:samples].astype(np.float32)
    windows = features.windows(wave)
    assert windows.shape == (-(-samples // 640), 80, 16)
    assert windows.dtype == torch.float32
    mel = features.log_mel(wave)
    for frame in (0, 1, 2, len(windows) // 2, len(windows) - 1):
        if frame < len(windows):
            start = int(80 * ((frame - 2) / 25))
            columns = [min(max(c, 0), len(mel) - 1) for c in range(start, start + 16)]
            assert torch.equal(windows[frame], torch.from_numpy(mel[columns].T.copy()))


@pytest.mark.parametrize("size", [1, 7, 199, 200, 640, 3333, 16_000])
def test_features_of_a_stream_are_those_of_the_whole(size):
    wave = babble(0.3 if size == 1 else 2.2)[3:].astype(np.float32)
    blocks = [wave[start : start + size] for start in range(0, len(wave), size)]
    assert torch.equal(torch.cat(list(features.stream_windows(blocks))), features.windows(wave))


def test_a_stream_is_early():
    stream = features.FeatureStream()
    wave = babble(1.0).astype(np.float32)
    assert len(stream.push(wave)) >= 25 - 6  # everything but the last 0.24 s
    stream.finish()
    with pytest.raises(RuntimeError, match="finished"):
        stream.push(wave)


def test_memory_of_a_stream_does_not_grow():
    def peak(seconds: int) -> int:
        block = babble(1.0).astype(np.float32)
        tracemalloc.start()
        count = sum(len(w) for w in features.stream_windows(block for _ in range(seconds)))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == seconds * 25
        return top

    features.mel_filters()
    assert peak(120) < 1.2 * peak(10)
