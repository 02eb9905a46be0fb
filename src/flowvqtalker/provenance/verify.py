"""Tell whether a file carries our marks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowvqtalker.errors import MissingDependency
from flowvqtalker.io.image import read_image
from flowvqtalker.io.video import probe, read_video
from flowvqtalker.provenance.credentials import read_credentials
from flowvqtalker.provenance.watermark import detect, to_luma

__all__ = ["Report", "verify"]


@dataclass(frozen=True)
class Report:
    """Marks of a file.

    Attributes:
        path: the file.
        marked: whether it has a watermark of ours, or valid content credentials that state a generated file.
        watermark: found, identifier (of 48 bits; None without a mark), score (4.75 is needed, of a crop 6.3) and frames
            that voted.
        credentials: see :func:`flowvqtalker.provenance.credentials.read_credentials`; None if there are none.
        note: why content credentials were not looked for; None if they were.
    """

    path: str
    marked: bool
    watermark: dict[str, Any]
    credentials: dict[str, Any] | None
    note: str | None = None

    def json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def text(self) -> str:
        """The report for a reader, three lines."""
        seen, signed = self.watermark, self.credentials
        mark = f"yes, identifier {seen['identifier']}" if seen["found"] else "none"
        if signed is None:
            credentials = self.note or "none"
        else:
            origin = "generated" if signed["generated"] else "origin not stated"
            credentials = f"{signed['state']}, {origin}, {signed['generator']}, signed by {signed['issuer']}"
        return (
            f"{self.path}: {'marked' if self.marked else 'not marked'}\n"
            f"watermark: {mark} (score {seen['score']:.1f}, {seen['frames']} frames)\n"
            f"content credentials: {credentials}"
        )


def verify(path: str | Path) -> Report:
    """Look for a watermark and for content credentials in an image or video, in memory that does not grow.

    Raises:
        UserError: if the file is neither an image nor a video.
    """
    frames = iter([read_image(path)]) if probe(path).kind == "image" else read_video(path)
    found = detect(to_luma(frame) for frame in frames)
    note = None
    try:
        credentials = read_credentials(path)
    except MissingDependency as error:
        credentials, note = None, str(error)
    stated = credentials is not None and credentials["generated"] and credentials["state"] in ("Valid", "Trusted")
    watermark = {
        "found": found.found,
        "identifier": found.identifier if found.found else None,
        "score": round(float(np.float64(found.score)), 2),
        "frames": found.frames,
    }
    return Report(str(path), found.found or stated, watermark, credentials, note)
