"""Analysing a video: order of extractors, and the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.io.video import VideoWriter
from flowvqtalker_eval.metrics.analysis import (
    ClipExtractor,
    FrameExtractor,
    StreamExtractor,
    analyse,
    cached,
    read_wave,
)
from tests.conftest import babble, write_wav


def video(path: Path, levels: list[int], size: tuple[int, int] = (48, 32), speech: Path | None = None) -> Path:
    """A video of flat frames with these grey levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, speech) as writer:
        for level in levels:
            writer.write(np.full((size[1], size[0], 3), level, np.uint8))
    return path


class Level(FrameExtractor):
    """Mean grey level of each frame."""

    name = "level"
    gives = ("level",)

    def __init__(self, gain: float = 1.0) -> None:
        self.gain, self.calls = gain, 0

    def settings(self):
        return {"gain": self.gain}

    def __call__(self, frames, known):
        self.calls += 1
        return {"level": self.gain * frames.mean((1, 2, 3), dtype=np.float64)}


class Squared(FrameExtractor):
    """Builds on another extractor, and is given before it."""

    name = "squared"
    needs = ("level",)
    gives = ("squared",)

    def __init__(self) -> None:
        self.calls = 0

    def settings(self):
        return {}

    def __call__(self, frames, known):
        assert set(known) == {"level"} and len(known["level"]) == len(frames)
        self.calls += 1
        return {"squared": known["level"] ** 2}


class Loud(ClipExtractor):
    """Of a whole clip and its sound."""

    name = "loud"
    needs = ("squared",)
    gives = ("loud",)

    def __init__(self) -> None:
        self.calls = 0

    def settings(self):
        return {}

    def __call__(self, known, wave):
        self.calls += 1
        length = 0 if wave is None else len(wave)
        return {"loud": np.array([len(known["squared"]), length])}


class Streamed(StreamExtractor):
    """Sees the frames again."""

    name = "streamed"
    needs = ("level",)
    gives = ("seen",)

    def settings(self):
        return {}

    def __call__(self, frames, known, wave):
        return {"seen": np.array(sum(1 for _ in frames))}


def test_extractors_run_in_the_order_of_their_needs(tmp_path):
    path = video(tmp_path / "v.mp4", [10, 60, 110, 160, 210], speech=write_wav(tmp_path / "s.wav", babble(0.2)))
    found = analyse(path, [Loud(), Squared(), Streamed(), Level()], batch=2)
    assert (found.frames, found.size, found.fps) == (5, (48, 32), 25.0)
    assert np.allclose(found.arrays["level"], [10, 60, 110, 160, 210], atol=2)
    assert np.array_equal(found.arrays["squared"], found.arrays["level"] ** 2)
    assert found.arrays["loud"].tolist() == [5, 5 * 640] and found.arrays["seen"] == 5
    assert found.settings["level"] == {"gain": 1.0}
    silent = video(tmp_path / "silent.mp4", [10, 10])
    assert analyse(silent, [Loud(), Squared(), Level()]).arrays["loud"].tolist() == [2, 0]
    assert read_wave(silent, 2) is None


def test_what_an_extractor_needs_must_be_given(tmp_path):
    path = video(tmp_path / "v.mp4", [10])
    with pytest.raises(UserError, match="squared needs level"):
        analyse(path, [Squared()])
    with pytest.raises(UserError, match="does not exist"):
        analyse(tmp_path / "none.mp4", [Level()])


def test_cache_gives_equal_arrays_without_work(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60, 110]), tmp_path / "cache"
    first = analyse(path, [Level(), Squared(), Loud()], cache, batch=2)
    again = [Level(), Squared(), Loud()]
    second = analyse(path, again, cache)
    assert [e.calls for e in again] == [0, 0, 0]
    assert first.frames == second.frames and set(first.arrays) == set(second.arrays)
    for name, values in first.arrays.items():
        assert np.array_equal(values, second.arrays[name]) and values.dtype == second.arrays[name].dtype
    copied = tmp_path / "copy.mp4"  # the content counts, not the name
    copied.write_bytes(path.read_bytes())
    assert cached(copied, again, cache) is not None


def test_changed_settings_or_files_are_analysed_again(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60, 110]), tmp_path / "cache"
    analyse(path, [Level(), Squared()], cache)
    louder, squared = Level(gain=2.0), Squared()
    found = analyse(path, [louder, squared], cache)  # what builds on the changed one is made again as well
    assert louder.calls == 1 and squared.calls == 1
    assert np.allclose(found.arrays["squared"], found.arrays["level"] ** 2)
    level, squared = Level(), Squared()
    analyse(path, [level, squared], cache)  # the first results are still there
    assert level.calls == 0 and squared.calls == 0
    video(path, [10, 60, 111, 200])
    level = Level()
    assert analyse(path, [level], cache).frames == 4 and level.calls == 1


def test_new_extractor_uses_what_the_cache_has_of_others(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60, 110]), tmp_path / "cache"
    analyse(path, [Level()], cache)
    level, squared = Level(), Squared()
    found = analyse(path, [squared, level], cache, batch=2)
    assert level.calls == 0 and squared.calls == 2
    assert np.array_equal(found.arrays["squared"], found.arrays["level"] ** 2)


def test_damaged_cache_is_made_again(tmp_path):
    path, cache = video(tmp_path / "v.mp4", [10, 60]), tmp_path / "cache"
    analyse(path, [Level()], cache)
    for file in cache.rglob("level-*.npz"):
        file.write_bytes(b"no npz")
    level = Level()
    assert np.allclose(analyse(path, [level], cache).arrays["level"], [10, 60], atol=2) and level.calls == 1
