"""Options of the motion, declared once for the command line and for Python."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from flowvqtalker.errors import UserError

# Without torch, so that --help stays quick.
if TYPE_CHECKING:
    from torch import Tensor

    from flowvqtalker.io.coefficients import Coefficients
    from flowvqtalker.motion.emotion import EmotionTrack

    Reference: TypeAlias = str | Path | Tensor
    Course: TypeAlias = str | Path | EmotionTrack
    HeadMotion: TypeAlias = str | Path | Coefficients
else:
    Reference = Course = HeadMotion = Any

__all__ = ["FILES", "LIMITS", "MotionChoices", "MotionOptions", "check_limits", "lowest"]

#: Options that may name a file.
FILES = ("emotion_reference", "reference_neutral", "emotion_track", "pose_from")

#: Largest values; for the smallest see :func:`lowest`.
LIMITS = {
    "valence": 1.0,
    "arousal": 1.0,
    "intensity": 2.0,
    "temperature": 2.0,
    "articulation": 3.0,
    "blink_rate": 60.0,
    "pose_scale": 2.0,
    "pose_temperature": 2.0,
    "manifold": 1.0,
}


def lowest(name: str) -> float:
    """Smallest value of a number of :data:`LIMITS`."""
    return -LIMITS[name] if name in ("valence", "arousal") else 0.0


def check_limits(**given: float | None) -> None:
    """Raise a :class:`UserError` for a number that lies outside its limits; None lies inside."""
    for name, value in given.items():
        if value is not None and not lowest(name) <= value <= LIMITS[name]:
            raise UserError(
                f"{name} must be between {lowest(name):g} and {LIMITS[name]:g}, got {value:g}", code="out_of_range"
            )


class MotionChoices(TypedDict, total=False):
    """Fields of :class:`MotionOptions` as keywords of :class:`~flowvqtalker.pipeline.Talker`; None changes nothing."""

    emotion: str | None
    emotion_reference: Reference | None
    reference_neutral: Reference | None
    emotion_track: Course | None
    valence: float | None
    arousal: float | None
    intensity: float | None
    temperature: float | None
    articulation: float | None
    blink_rate: float | None
    seed: int | None
    pose_scale: float | None
    fixed_pose: bool | None
    pose_from: HeadMotion | None
    emotional_head: bool | None


@dataclass(frozen=True, kw_only=True)
class MotionOptions:
    """Options of the motion. None means the default of the weights.

    Raises:
        UserError: for an unknown emotion, a number out of its limits, or choices that exclude each other.
    """

    emotion: str | None = None
    """One of the nine, a mixture as happy:0.7,surprised:0.3, or auto: heard in the voice. Default: neutral, or that of
    the reference."""
    emotion_reference: Reference | None = None
    """Image or clip of anyone, to take the emotion from."""
    reference_neutral: Reference | None = None
    """Image or clip of the same person with a neutral face. Default: it is estimated from the reference."""
    emotion_track: Course | None = None
    """Emotion over time: csv file with the columns time (seconds), emotion and optionally intensity, or a text of cues
    as 0:03.5 [sad:0.5]."""
    valence: float | None = None
    """How pleasant, -1 to 1, instead of an emotion; with arousal, 0 and 0 is neutral."""
    arousal: float | None = None
    """How excited, -1 to 1, instead of an emotion."""
    intensity: float = 1.0
    """Strength of the emotion: 0 is neutral, 1 as learnt, at most 2."""
    temperature: float | None = None
    """How much the motion varies: 0 (the most likely motion) to 2. Default: what suits the weights."""
    articulation: float | None = None
    """How far the lips move with the speech: 0 (not at all) to 3. Default: what suits the weights."""
    blink_rate: float | None = None
    """Blinks per minute, 0 to 60. Default: as in the clips that the weights were trained on."""
    seed: int = 0
    """Another seed gives another sample; the same seed gives the same motion on the same kind of processor."""
    pose_scale: float = 1.0
    """Factor on the movement of the head, 0 (still) to 2."""
    fixed_pose: bool = False
    """Hold the head still; the face moves and the eyes blink."""
    pose_from: HeadMotion | None = None
    """Clip or motion file (.npz, .csv) to take the movement of the head from; repeated if shorter than the speech."""
    emotional_head: bool = False
    """Let the emotion change head and blinks too: anger lowers the head, happiness and fear move it more, fear and
    surprise blink less."""

    def __post_init__(self) -> None:
        if self.emotion is not None:
            from flowvqtalker.motion.emotion import AUTO, parse_emotion

            auto = self.emotion == AUTO
            alone = auto or max(parse_emotion(self.emotion)) < 1  # parsed in any case, so that a wrong name is refused
            if alone and self.emotion_reference is not None:
                raise UserError(
                    f"emotion {self.emotion!r}: a reference goes with one emotion or with none; leave this out"
                )
        if self.reference_neutral is not None and self.emotion_reference is None:
            raise UserError("reference_neutral needs emotion_reference; give both, of one person")
        ways = ("emotion", "emotion_reference", "emotion_track", "valence", "arousal")
        given = [name for name in ways if getattr(self, name) is not None]
        for one, other in itertools.combinations(given, 2):
            if (one, other) not in (("emotion", "emotion_reference"), ("valence", "arousal")):
                raise UserError(f"{one} and {other} exclude each other; give one")
        if self.fixed_pose and self.pose_from is not None:
            raise UserError("fixed_pose and pose_from exclude each other; give one")
        if not 0 <= self.seed < 2**62:
            raise UserError(f"seed must be a number from 0 to 2**62 - 1, got {self.seed}")
        check_limits(
            valence=self.valence,
            arousal=self.arousal,
            intensity=self.intensity,
            temperature=self.temperature,
            articulation=self.articulation,
            blink_rate=self.blink_rate,
            pose_scale=self.pose_scale,
        )

    def updated(self, given: MotionChoices) -> MotionOptions:
        """These options, with those that were given (are not None) in place of its own.

        Raises:
            UserError: as the constructor.
        """
        kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **kept)
