"""The key of a study: which opaque clip shows which method. It stays with whoever runs the study."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError

__all__ = ["CHOICES", "KEY_FILE", "LABELS", "PAGE_FOLDER", "SCALE", "Clip", "Expected", "Key"]

#: The eight emotions to choose from: those of MEAD. ``natural`` is a way of speaking, not an emotion to recognise.
CHOICES = EMOTIONS[:8]
#: What the page calls them.
LABELS = dict(
    zip(CHOICES, ("Angry", "Contemptuous", "Disgusted", "Afraid", "Happy", "Neutral", "Sad", "Surprised"), strict=True)
)
#: Both ratings are absolute category ratings from 1 (worst) to 5 (best).
SCALE = (1, 2, 3, 4, 5)
#: Name of the key in a study's folder, beside the folder of the page.
KEY_FILE = "key.json"
#: Name of the folder of the page: all that participants may see.
PAGE_FOLDER = "page"

_FORMAT = "flowvqtalker-study-key/1"
_KINDS = ("rated", "check", "practice")


@dataclass(frozen=True)
class Expected:
    """What an attention check asks for."""

    lip_sync: int | None
    quality: int
    emotion: str


@dataclass(frozen=True)
class Clip:
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
    kind: str
    source: str
    method: str = ""
    item: str = ""
    emotion: str = ""
    expected: Expected | None = None


@dataclass(frozen=True)
class Key:
    """Everything about a study that its page does not tell.

    Attributes:
        study: identifier, also in the page and in every answer.
        title: of the page.
        seed: that the names and orders were drawn with.
        speech: whether lip synchronisation is asked for.
        methods: in the order of the table; the real videos last.
        clips: all videos.
        plan: orders of clips, as identifiers; one is chosen by the participant's code.
    """

    study: str
    title: str
    seed: int
    speech: bool
    methods: tuple[str, ...]
    clips: tuple[Clip, ...]
    plan: tuple[tuple[str, ...], ...]

    @cached_property
    def by_id(self) -> dict[str, Clip]:
        """Clips that are answered, by identifier: the rated ones and the attention checks."""
        return {clip.id: clip for clip in self.clips if clip.kind != "practice"}

    @cached_property
    def items(self) -> tuple[str, ...]:
        """Names of the contents."""
        return tuple(sorted({clip.item for clip in self.clips if clip.kind == "rated"}))

    def save(self, path: str | Path) -> None:
        """Write as JSON, readable by the owner alone where the file system can."""
        path = Path(path)
        path.touch(mode=0o600)
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

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
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
                raise UserError(f"{path} is not the key of a study; give the {KEY_FILE} that `study build` wrote")
            clips = tuple(_clip(entry) for entry in content.pop("clips"))
            methods = tuple(content.pop("methods"))
            plan = tuple(tuple(row) for row in content.pop("plan"))
            key = cls(clips=clips, methods=methods, plan=plan, **content)
        except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"key {path} is damaged ({error}); take the one that `study build` wrote") from error
        if {clip.method for clip in clips if clip.kind == "rated"} - set(methods):
            raise UserError(f"key {path} is damaged (a clip's method is not listed); take the one `study build` wrote")
        return key


def _clip(entry: dict[str, Any]) -> Clip:
    expected = entry.pop("expected", None)
    clip = Clip(**entry, expected=Expected(**expected) if expected else None)
    if clip.kind not in _KINDS or (clip.kind == "check") != (clip.expected is not None):
        raise ValueError(f"clip {clip.id}")
    return clip
