"""The watermark: what it carries, what it costs, what it survives, and what is never taken for it."""

from __future__ import annotations

import io

import av
import cv2
import numpy as np
import pytest

from flowvqtalker.provenance.code import CODE_BITS, decode, encode
from flowvqtalker.provenance.watermark import Watermark, detect, payload, to_luma

MESSAGE = payload(0x1234_5678_9ABC)


def moving(image: np.ndarray, count: int = 24) -> list[np.ndarray]:
    """Luma of a picture that sways like a head, with a little camera noise."""
    random = np.random.default_rng(0)
    frames = []
    for k in range(count):
        shift = np.float32([[1, 0, 3 * np.sin(k / 4)], [0, 1, 2 * np.cos(k / 5)]])
        moved = cv2.warpAffine(to_luma(image), shift, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
        frames.append(np.clip(moved + random.normal(0, 1, moved.shape), 0, 255).astype(np.uint8))
    return frames


def marked(frames: list[np.ndarray], message: int = MESSAGE) -> list[np.ndarray]:
    mark, copies = Watermark(message), [frame.copy() for frame in frames]
    for frame in copies:
        mark(frame)
    return copies


def h264(frames: list[np.ndarray], crf: int, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Luma after H.264, scaled to (width, height) before."""
    if size is not None:
        frames = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    height, width = frames[0].shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "gray"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def frames(astronaut: np.ndarray) -> list[np.ndarray]:
    """A face that fills the frame, as the product writes it."""
    face = cv2.resize(astronaut[20:276, 100:356], (512, 512), interpolation=cv2.INTER_CUBIC)
    return moving(face)


@pytest.fixture(scope="module")
def stamped(frames: list[np.ndarray]) -> list[np.ndarray]:
    """The same with the mark."""
    return marked(frames)


@pytest.mark.parametrize("message", [0, 2**64 - 1, 0x0123_4567_89AB_CDEF])
def test_code_corrects_errors(message):
    word = encode(message)
    assert word.shape == (CODE_BITS,) and (np.abs(word) == 1).all()
    assert decode(word) == message
    wrong = np.random.default_rng(1).permutation(CODE_BITS)[:4]  # the free distance is 10
    broken = word.copy()
    broken[wrong] *= -1
    assert decode(broken) == message
    noisy = word + np.random.default_rng(2).normal(0, 0.6, CODE_BITS)
    assert (np.sign(noisy) != word).sum() >= 3 and decode(noisy) == message


@pytest.mark.parametrize("message", [-1, 2**64])
def test_code_refuses_what_does_not_fit(message):
    with pytest.raises(ValueError, match="64 bits"):
        encode(message)


def test_identifier_must_fit():
    assert payload(2**48 - 1) >> 48 == payload(0) >> 48
    with pytest.raises(ValueError, match="48 bits"):
        payload(2**48)


@pytest.mark.parametrize("identifier", [0, 1, 2**48 - 1])
def test_payload_comes_back(frames, identifier):
    found = detect(marked(frames[:3], payload(identifier)))
    assert found.found and found.identifier == identifier and found.frames == 3


def test_one_frame_is_enough(frames):
    assert detect(marked(frames[:1])).message == MESSAGE


def test_is_invisible(frames, stamped):
    for plain, mark in zip(frames, stamped, strict=True):
        error = plain.astype(float) - mark
        assert 10 * np.log10(255**2 / np.mean(error**2)) >= 45
        assert np.abs(error).max() <= 12


def test_does_not_flicker(frames):
    still = marked([frames[0]] * 5)
    assert all(np.array_equal(still[0], frame) for frame in still)


@pytest.mark.parametrize(("crf", "size", "least"), [(23, None, 0.98), (28, None, 0.95), (33, None, 0.85)])
def test_survives_compression(stamped, crf, size, least):
    found = detect(h264(stamped, crf, size))
    assert (np.sign(found.soft) == encode(MESSAGE)).mean() >= least
    assert found.found and found.message == MESSAGE


@pytest.mark.parametrize("size", [(256, 256), (360, 360), (480, 360), (1024, 1024)])
def test_survives_a_change_of_size(stamped, size):
    found = detect(h264(stamped, 23, size))
    assert found.message == MESSAGE and found.found


@pytest.mark.parametrize("box", [(26, 486, 26, 486), (0, 486, 0, 486), (30, 490, 7, 467)])
def test_survives_a_crop(stamped, box):
    top, bottom, left, right = box
    found = detect(h264([frame[top:bottom, left:right] for frame in stamped], 23))
    assert found.message == MESSAGE and found.found
    assert np.mean(np.sign(found.soft) == encode(MESSAGE)) > 0.97


@pytest.mark.parametrize("shape", [(360, 640), (719, 405), (128, 96)])
def test_any_size_can_be_marked(astronaut, shape):
    luma = cv2.resize(to_luma(astronaut), shape[::-1], interpolation=cv2.INTER_AREA)
    assert detect(marked([luma])).message == MESSAGE


def test_brightness_may_change(stamped):
    for gain in (0.9, 1.1):
        changed = [np.clip(frame * gain, 0, 255).astype(np.uint8) for frame in stamped]
        assert detect(changed).message == MESSAGE


def test_survives_mirroring(stamped):
    found = detect(h264([np.ascontiguousarray(frame[:, ::-1]) for frame in stamped], 23))
    assert found.message == MESSAGE and found.found


def test_marks_a_later_window(frames):
    """Ten unmarked seconds do not hide the mark of what follows."""
    small = [cv2.resize(frame, (128, 128), interpolation=cv2.INTER_AREA) for frame in frames]
    assert detect(small[:1] * 250 + marked(small)).found


def test_unmarked_frames_are_not_taken_for_marked(frames):
    assert not detect(frames).found
    random = np.random.default_rng(0)
    scores = []
    for k in range(0, 200, 2):
        crop = cv2.resize(frames[0][k : k + 200, k : k + 220], (128, 128))
        picture = crop if k % 4 else random.integers(0, 256, (128, 128)).astype(np.uint8)
        found = detect([picture])
        scores.append(found.score)
        assert not found.found
    assert abs(np.mean(scores[::2])) < 0.4 and 0.7 < np.std(scores[::2]) < 1.3  # as z-scores are


@pytest.mark.parametrize("level", [0, 16, 128, 255])
def test_flat_frames(level):
    plain = np.full((512, 512), level, np.uint8)
    assert not detect([plain]).found
    if level == 128:
        assert detect(marked([plain])).message == MESSAGE


def test_no_frame():
    with pytest.raises(ValueError, match="no frame"):
        detect([])
