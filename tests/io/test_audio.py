"""Decoding: exact lengths, streams equal to wholes, memory that does not grow, clear refusals."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode
from flowvqtalker.io.media import Timeline
from flowvqtalker.io.video import VideoWriter, probe, read_video

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


def clip(path: Path, sounds: dict[str, tuple[float, np.ndarray]], first_frame: float = 0.0) -> Path:
    """A video of 50 frames with audio tracks, name -> (start in seconds, samples at 16 kHz); the last is default."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0"})
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        tracks = []
        for name in sounds:
            track = container.add_stream("flac" if path.suffix == ".mkv" else "aac", rate=16_000, layout="mono")
            track.metadata["title"] = name
            track.disposition = track.disposition.default if name == list(sounds)[-1] else type(track.disposition)(0)
            tracks.append(track)
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(first_frame * 25) + number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for track, (start, samples) in zip(tracks, sounds.values(), strict=True):
            resampler = av.AudioResampler(format=track.codec_context.format, layout="mono", rate=16_000)
            for place in range(0, len(samples) - 1023, 1024):
                if not np.isfinite(samples[place]):  # a gap: these time stamps are left out
                    continue
                part = samples[None, place : place + 1024].astype(np.float32)
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.rate, frame.time_base = 16_000, Fraction(1, 16_000)
                for ready in resampler.resample(frame):
                    ready.pts = round(start * 16_000) + place
                    container.mux(track.encode(ready))
            container.mux(track.encode(None))
    return path


def tone_at(second: float, length: float = 2.0) -> np.ndarray:
    """Silence with a tenth of a second of tone."""
    wave = np.zeros(round(length * 16_000))
    place = round(second * 16_000)
    wave[place : place + 1600] = 0.5 * np.sin(2 * np.pi * 500 * np.arange(1600) / 16_000)
    return wave


def onset(wave: np.ndarray) -> float:
    return float(np.flatnonzero(np.abs(wave) > 0.2)[0] / 16_000)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize(("sound", "picture"), [(0.0, 0.0), (0.75, 0.0), (0.0, 0.6)])
def test_sound_and_picture_stay_in_step(tmp_path, suffix, sound, picture):
    """Sound that starts later or earlier than the picture keeps its place on the file's clock."""
    path = clip(tmp_path / f"a{suffix}", {"speech": (sound, tone_at(0.5))}, picture)
    assert onset(decode.load(path)) == pytest.approx(sound + 0.5, abs=0.03)
    levels = [frame.mean() for frame in read_video(path)]
    assert len(levels) == round(25 * picture) + 50
    assert [round(level / 4) for level in levels[round(25 * picture) :]][::10] == [0, 10, 20, 30, 40]
    assert np.ptp(levels[: round(25 * picture) + 1]) < 1  # the first frame, until the second


def test_sound_that_starts_late_stays_late_in_our_own_video(tmp_path):
    path = clip(tmp_path / "a.mkv", {"speech": (0.75, tone_at(0.5))})
    with VideoWriter(tmp_path / "out.mp4", decode.scan(path)) as writer:
        for _ in range(50):
            writer.write(np.zeros((64, 64, 3), np.uint8))
    assert onset(decode.load(tmp_path / "out.mp4")) == pytest.approx(1.25, abs=0.03)


def test_gaps_are_silence(tmp_path):
    wave = tone_at(1.5)
    wave[4096:16384] = np.nan
    path = clip(tmp_path / "a.mkv", {"speech": (0.0, wave)})
    assert onset(decode.load(path)) == pytest.approx(1.5, abs=0.01)


def test_time_stamps_that_cannot_be_true_are_left(tmp_path):
    path = clip(tmp_path / "a.mkv", {"speech": (0.0, tone_at(0.5))})
    with av.open(str(path)) as container:
        timeline = Timeline(container, container.streams.video[0], container.streams.audio[0])
        assert timeline.place(0.04, 0.0) == pytest.approx(0.04)
        assert timeline.place(1e6, 0.08) == 0.08  # far beyond the file's length
        assert timeline.place(1e6 + 0.04, 0.12) == pytest.approx(0.12)
        assert timeline.place(3.0, 0.16) == 0.16  # back again
        assert timeline.place(None, 0.2) == 0.2


def test_the_track_that_a_player_plays(tmp_path):
    path = clip(tmp_path / "a.mkv", {"silence": (0.0, np.zeros(32_000)), "speech": (0.0, tone_at(1.0))})
    assert onset(decode.load(path)) == pytest.approx(1.0, abs=0.01)
    assert decode.scan(path, 1).samples == decode.scan(path).samples
    with pytest.raises(UserError, match=r"audio track 0 of .* is silent .* choose another of its 2 tracks"):
        decode.scan(path, 0)
    with pytest.raises(UserError, match=r"no audio track 2; choose --audio-track from 0 \(silence flac\), 1 \(speech"):
        decode.scan(path, 2)


def test_opposite_phases_do_not_cancel(tmp_path, caplog):
    voice = babble(1.0)
    path = write_wav(tmp_path / "a.wav", np.stack([0.8 * voice, -0.8 * voice], axis=1))
    speech = decode.scan(path)
    assert speech.channel is not None
    assert "cancel" in caplog.text
    wave = np.concatenate(list(decode.stream(speech)))
    np.testing.assert_allclose(np.abs(wave), np.abs(0.8 * voice), atol=1e-3)
    assert decode.sound_format(speech) == (16_000, "mono")
    one_side = decode.load(write_wav(tmp_path / "b.wav", np.stack([voice, 0 * voice], axis=1)))
    np.testing.assert_allclose(one_side, voice * 0.5**0.5, atol=1e-3)


def test_surround_sound_keeps_the_voice_and_does_not_clip(tmp_path):
    voice = babble(1.0, 48_000) * 1.5
    channels = np.stack([voice, voice, voice, voice, voice, voice])
    path = encode(tmp_path / "a.wav", channels, "pcm_s16le", 48_000, "5.1")
    frames = [frame.to_ndarray() for frame in decode.resampled(path, 48_000, "stereo")]
    stereo = np.concatenate(frames, axis=1)
    assert np.abs(stereo).max() <= np.abs(channels).max() + 1e-3
    centre = np.zeros_like(channels)
    centre[2] = voice
    wave = decode.load(encode(tmp_path / "b.wav", centre, "pcm_s16le", 48_000, "5.1"))
    assert np.abs(wave).max() == pytest.approx(np.abs(voice).max(), rel=0.1)


def test_bad_samples_are_cleaned_for_every_consumer(tmp_path, caplog):
    """NaN and infinity, before resampling would spread them, and AAC refuse them; 16-bit numbers stored as floats."""
    samples = babble(0.5, 44_100)[None].astype(np.float32)
    samples[0, 5000], samples[0, 9000] = np.nan, np.inf
    path = encode(tmp_path / "a.wav", samples, "pcm_f32le", 44_100)
    speech = decode.scan(path)
    assert "2 samples that are not numbers" in caplog.text
    assert speech.peak < 1
    with VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for _ in range(speech.frames):
            writer.write(np.zeros((64, 64, 3), np.uint8))
    assert np.abs(decode.load(tmp_path / "out.mp4")).max() < 1
    loud = encode(tmp_path / "b.wav", babble(0.5)[None] * 32_767, "pcm_f32le", 16_000)
    assert np.abs(decode.load(loud)).max() == pytest.approx(1, abs=0.01)


def test_a_cover_picture_is_no_video(tmp_path):
    path = encode(tmp_path / "a.mp3", babble(0.5, 48_000)[None], "libmp3lame", 48_000)
    cover = tmp_path / "c.jpg"
    Image.new("RGB", (32, 32)).save(cover)
    data = cover.read_bytes()
    body = b"\0image/jpeg\0\x03\0" + data
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes((len(frame) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    (tmp_path / "b.mp3").write_bytes(b"ID3\x03\0\0" + size + frame + path.read_bytes())
    assert decode.scan(tmp_path / "b.mp3").seconds == pytest.approx(0.5, abs=0.06)
    with pytest.raises(UserError, match="neither an image nor a video"):
        probe(tmp_path / "b.mp3")
