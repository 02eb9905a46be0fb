"""The key of a study: which opaque clip shows which method. It stays with whoever runs the study."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError

__all__ = ["CHOICES", "KEY_FILE", "LABELS", "PAGE_FOLDER", "SCALE", "Clip", "Emotion", "Expected", "Key", "Rating"]
__all__ += ["Frozen", "reasons"]

#: The eight emotions to choose from: those of MEAD. ``natural`` is a way of speaking, not an emotion to recognise.
CHOICES = EMOTIONS[:8]
#: Their names on the page.
LABELS = dict(
    zip(CHOICES, ("Angry", "Contemptuous", "Disgusted", "Afraid", "Happy", "Neutral", "Sad", "Surprised"), strict=True)
)
#: Both ratings are absolute category ratings from 1 (worst) to 5 (best).
SCALE = (1, 2, 3, 4, 5)
#: Name of the key in a study's folder, beside the folder of the page.
KEY_FILE = "key.json"
#: Name of the folder of the page: all that participants may see.
PAGE_FOLDER = "page"

Rating = Annotated[int, Field(ge=SCALE[0], le=SCALE[-1])]
Emotion = Literal[CHOICES]  # type: ignore[valid-type]


class Frozen(BaseModel):
    """A record that cannot be changed and has no other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Expected(Frozen):
    """The answers that an attention check asks for."""

    lip_sync: Rating | None
    quality: Rating
    emotion: Emotion


class Clip(Frozen):
    """One video of the page.

    Attributes:
        id: opaque name, also of the file.
        kind: ``rated``; ``check``, an attention check; or ``practice``, which is not stored.
        source: file that it was made from.
        method: name of the method, empty unless rated.
        item: name of the content, the same for all methods, empty unless rated.
        emotion: intended emotion, empty unless rated; ``natural`` counts for the ratings only.
        expected: right answers of an attention check.
    """

    id: str
    kind: Literal["rated", "check", "practice"]
    source: str
    method: str = ""
    item: str = ""
    emotion: str = ""
    expected: Expected | None = None

    @model_validator(mode="after")
    def _complete(self) -> Clip:
        if (self.kind == "check") != (self.expected is not None):
            raise ValueError(f"clip {self.id} of kind {self.kind} has the wrong expected answers")
        return self


class Key(Frozen):
    """Everything about a study that its page does not tell.

    Attributes:
        study: identifier, also in the page and in every answer.
        title: of the page.
        seed: that names and orders were drawn with.
        speech: whether lip synchronisation is asked for.
        methods: in the order of the table; the real videos last.
        clips: all videos.
        plan: orders of clips, as identifiers; the participant's code chooses one.
    """

    format: Literal["flowvqtalker-study-key/1"] = "flowvqtalker-study-key/1"
    study: str
    title: str
    seed: int
    speech: bool
    methods: tuple[str, ...]
    clips: tuple[Clip, ...]
    plan: tuple[tuple[str, ...], ...]

    @model_validator(mode="after")
    def _known_methods(self) -> Key:
        if {clip.method for clip in self.clips if clip.kind == "rated"} - set(self.methods):
            raise ValueError("a clip's method is not listed")
        return self

    @cached_property
    def by_id(self) -> dict[str, Clip]:
        """The clips that are answered, by identifier: rated ones and attention checks."""
        return {clip.id: clip for clip in self.clips if clip.kind != "practice"}

    @cached_property
    def checks(self) -> dict[str, Expected]:
        """Right answers of the attention checks, by identifier."""
        return {clip.id: clip.expected for clip in self.clips if clip.expected is not None}

    @cached_property
    def items(self) -> tuple[str, ...]:
        """Names of the contents."""
        return tuple(sorted({clip.item for clip in self.clips if clip.kind == "rated"}))

    def save(self, path: str | Path) -> None:
        """Write as JSON, readable by the owner alone where the file system can."""
        path = Path(path)
        path.touch(mode=0o600)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Key:
        """Read a key, given itself or the study's folder.

        Raises:
            UserError: if there is no key, or it is damaged.
        """
        path = Path(path)
        if path.is_dir():
            path = path / KEY_FILE
        if not path.is_file():
            raise UserError(f"key {path} does not exist; give the {KEY_FILE} that `study build` wrote")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"key {path} is damaged ({reasons(error)}); take the one that `study build` wrote"
            ) from error


def reasons(error: ValidationError) -> str:
    """The first problem of invalid data, in one line."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    place = ".".join(map(str, found[0]["loc"]))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place + ': ' if place else ''}{found[0]['msg']}{more}"
