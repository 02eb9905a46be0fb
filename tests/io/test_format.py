"""Frame rates and sizes of written videos."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion, resampled
from flowvqtalker.io.format import PRESETS, VideoFormat
from flowvqtalker.io.video import write_video


def _motion(count: int) -> Motion:
    """Coefficients that equal the frame's number."""
    line = torch.arange(count, dtype=torch.float32)[:, None]
    return Motion(line.expand(-1, 64), line.expand(-1, 6))


@pytest.mark.parametrize("fps", [12.5, 25.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_resampled_motion_is_the_line_it_was_for_any_blocks(fps: float, count: int) -> None:
    whole = _motion(count)
    wanted = np.minimum(np.arange(VideoFormat(fps=fps).frames(count)) * 25 / fps, count - 1)
    for size in (1, 3, count):
        blocks = [Motion(whole.expression[i : i + size], whole.pose[i : i + size]) for i in range(0, count, size)]
        found = Motion.join(resampled(blocks, fps))
        assert found.fps == fps
        assert np.allclose(found.expression[:, 5].numpy(), wanted, atol=1e-4)
        assert np.allclose(found.pose[:, 0].numpy(), wanted, atol=1e-4)


def test_resampled_motion_does_not_wait_for_the_end() -> None:
    seen: list[int] = []

    def blocks():
        for number in range(4):
            seen.append(number)
            yield _motion(5)

    first = next(resampled(blocks(), 12.5))
    assert seen == [0] and len(first) == 3


def test_no_motion_gives_no_motion() -> None:
    assert list(resampled([], 30)) == []


def test_counts_cover_the_speech() -> None:
    assert [VideoFormat(fps=fps).frames(25) for fps in (12.5, 25.0, 30.0)] == [13, 25, 30]
    assert VideoFormat(preset="fast").rate == Fraction(25, 2)
    assert VideoFormat(preset="fast", fps=30).rate == 30


@pytest.mark.parametrize(
    ("values", "named"),
    [({"fps": 24}, "12.5, 25, 30"), ({"size": 300}, "256, 512"), ({"preset": "slow"}, "quality, fast")],
)
def test_other_values_are_refused_with_the_choices(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        VideoFormat(**values)


def test_fast_video_has_its_rate_size_and_length(tmp_path) -> None:
    video = VideoFormat(preset="fast")
    frames = [np.full((512, 512, 3), 8 * i, np.uint8) for i in range(10)]
    result = write_video(video.resized(frames), tmp_path / "a.mp4", None, 10, video=video)
    assert (result.frames, result.width, result.height) == (10, PRESETS["fast"].size, PRESETS["fast"].size)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(25, 2)
        assert float(stream.duration * stream.time_base) == pytest.approx(0.8)


def test_whole_images_have_no_size() -> None:
    from flowvqtalker.options import AnimateArguments

    assert AnimateArguments(full=True, preset="fast").video() == VideoFormat(preset="fast")
    with pytest.raises(UserError, match="--full"):
        AnimateArguments(full=True, size=256).video()
