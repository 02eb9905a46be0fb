"""Small studies for the tests: videos of a few frames, and keys and answers without any video."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from flowvqtalker.io.video import VideoWriter
from flowvqtalker_eval.study import clips
from flowvqtalker_eval.study.answers import Answer
from flowvqtalker_eval.study.key import Clip, Expected, Key
from flowvqtalker_eval.study.plan import make_plan

from ..conftest import babble, write_wav

METHODS = ("SecretNet", "Rival-2")
ITEMS = ("M003_happy_1", "W009_sad_2")


def write_video(
    path: Path, frames: int = 10, size: tuple[int, int] = (64, 64), sound: bool = True, seed: int = 0
) -> Path:
    """A few frames of coloured noise with babble."""
    speech = write_wav(path.with_suffix(".wav"), babble(frames / 25, seed=seed)) if sound else None
    generator = np.random.default_rng(seed)
    with VideoWriter(path, speech) as writer:
        for _ in range(frames):
            small = generator.integers(0, 256, (4, 4, 3), np.uint8)
            writer.write(np.kron(small, np.ones((size[1] // 4, size[0] // 4, 1), np.uint8)))
    if speech is not None:
        speech.unlink()
    return path


def write_methods(folder: Path, items: Iterable[str] = ITEMS, real: bool = True) -> list[str]:
    """Videos of every method in a folder each; the METHOD=FOLDER arguments without the real ones (in ``real``)."""
    for number, name in enumerate((*METHODS, "real") if real else METHODS):
        (folder / name).mkdir(parents=True)
        for place, item in enumerate(items):
            write_video(folder / name / f"{item}.mp4", seed=10 * number + place)
    return [f"{name}={folder / name}" for name in METHODS]


def quick_clips(monkeypatch) -> None:
    """Make the attention check short; the text still shows."""
    monkeypatch.setattr(clips, "_CHECK_SECONDS", 0.4)
    monkeypatch.setattr(clips, "_CHECK_FROM", 0.1)
    monkeypatch.setattr(clips, "_CHECK_SIDE", 128)


def make_key(
    methods=("A", "B"), items=("x", "y", "z"), emotions=("happy", "sad", "natural"), checks=1, speech=True
) -> Key:
    """A key as ``build`` makes it."""
    made = [
        Clip(
            id=f"{1000 * row + column:012x}",
            kind="rated",
            source=f"{method}/{item}.mp4",
            method=method,
            item=item,
            emotion=emotion,
        )
        for row, (item, emotion) in enumerate(zip(items, emotions, strict=True))
        for column, method in enumerate(methods)
    ]
    expected = Expected(lip_sync=2 if speech else None, quality=5, emotion="fear")
    extra = [
        Clip(id=f"{10**6 + number:012x}", kind="check", source="c.mp4", expected=expected) for number in range(checks)
    ]
    ids = [[clip.id for clip in made if clip.item == item] for item in items]
    plan = make_plan(ids, [clip.id for clip in extra], 8, len(made), random.Random(0))
    practice = Clip(id=f"{10**7:012x}", kind="practice", source="")
    clips = (*made, *extra, practice)
    return Key(study="0123456789", title="Faces", seed=1, speech=speech, methods=methods, clips=clips, plan=plan)


def answer(
    key: Key, clip: Clip, rater: str, lip_sync: int | None, quality: int, emotion: str, **more: object
) -> Answer:
    """One answer with everything that does not matter filled in."""
    usual: dict[str, object] = {
        "study": key.study,
        "rater": rater,
        "session": (rater.lower() + "abcdefghjkmnpqrs")[-16:],
        "clip": clip.id,
        "position": 1 + list(key.by_id).index(clip.id),
        "lip_sync": lip_sync,
        "quality": quality,
        "emotion": emotion,
        "seconds": 7.5,
        "plays": 1,
        "revision": 0,
        "problem": False,
        "answered": "2025-01-01T10:00:00.000Z",
    }
    return Answer.model_validate({**usual, **more})


def answers_of(
    key: Key, raters: Iterable[str], rate: Callable[[Clip, str], tuple[int | None, int, str]]
) -> list[Answer]:
    """Complete answers; attention checks are answered rightly."""
    found = []
    for rater in raters:
        for clip in key.by_id.values():
            expected = clip.expected
            values = (expected.lip_sync, expected.quality, expected.emotion) if expected else rate(clip, rater)
            found.append(answer(key, clip, rater, *values))
    return found
