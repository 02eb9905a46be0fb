"""Cue sheets: emotions as tags with times, in plain lines or in subtitles (.srt, .vtt).

Plain lines begin with a time, in seconds or with colons; what follows the tag is for the reader. Lines without a tag
are skipped::

    0:00   [neutral] Good evening.
    0:03.5 [sad:0.5] It rained all day.
    0:07.2 [happy+surprised:1.2] And then!

In subtitles a tag may stand anywhere in the text: its time is interpolated by the characters before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from flowvqtalker.errors import UserError

__all__ = ["Cue", "is_cue_sheet", "read_cues"]

#: Number of the line, time in seconds, emotion (or mixture), and intensity as written; empty: the default.
Cue = tuple[int, float, str, str]

_TIME = r"(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d*)?)"
_TAG = re.compile(r"\[\s*([a-z+ ]+?)\s*(?::\s*([^\]]*?)\s*)?\]", re.IGNORECASE)
_LINE = re.compile(rf"\s*{_TIME}\s+(?=\[)")
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")


def is_cue_sheet(text: str) -> bool:
    """Whether a text is a cue sheet rather than a table: only cue sheets have brackets."""
    return "[" in text or "-->" in text


def read_cues(text: str) -> Iterator[Cue]:
    """The tags of a cue sheet in order.

    Raises:
        UserError: naming the line, for a tag without a time or two tags at one time.
    """
    block: list[tuple[int, str]] = []
    span: tuple[float, float] | None = None
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if found := _SPAN.match(line):
            span, block = (_seconds(*found.groups()[:3]), _seconds(*found.groups()[3:])), []
        elif span is not None and line.strip():
            block.append((number, line.strip()))
        elif span is not None:
            yield from _subtitle(block, *span)
            span = None
        elif tags := list(_TAG.finditer(line)):
            place = _LINE.match(line)
            if place is None or len(tags) > 1:
                what = "holds two tags" if place else "begins with no time"
                raise UserError(f"line {number} {what}; write one tag after a time, for instance 0:03.5 [sad:0.5]")
            yield number, _seconds(*place.groups()), _name(tags[0]), tags[0][2] or ""


def _subtitle(block: list[tuple[int, str]], start: float, end: float) -> Iterator[Cue]:
    """The tags of one subtitle, in time by the characters before each."""
    total = sum(len(_TAG.sub("", line)) for _, line in block)
    before = 0
    for number, line in block:
        for tag in _TAG.finditer(line):
            spoken = len(_TAG.sub("", line[: tag.start()]))
            yield number, start + (end - start) * (before + spoken) / max(total, 1), _name(tag), tag[2] or ""
        before += len(_TAG.sub("", line))


def _name(tag: re.Match[str]) -> str:
    return tag[1].lower().replace(" ", "")


def _seconds(hours: str | None, minutes: str | None, seconds: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds.replace(",", "."))
