"""Which marks a written video carries, and the one place that applies them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import check_output
from flowvqtalker.io.audio import Speech
from flowvqtalker.io.format import DEFAULT_VIDEO, VideoFormat
from flowvqtalker.io.image import ImageArray
from flowvqtalker.io.video import Result, write_video
from flowvqtalker.provenance.credentials import (
    SIGNED_SUFFIXES,
    Credential,
    SigningError,
    available,
    load_credential,
    sign,
)
from flowvqtalker.provenance.label import labelled
from flowvqtalker.provenance.watermark import Watermark, payload

__all__ = ["DEFAULT_MARKS", "Marks", "write_marked"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Marks of a written video.

    Attributes:
        mark: write the invisible watermark and, where c2pa-python is installed, content credentials.
        label: show a visible label in the corner.
        sign_cert: PEM file of the certificate chain that signs the content credentials; None takes a local one.
        sign_key: PEM file of its private key.
        timestamp_url: time stamp authority to ask for a time stamp; None writes none and needs no network.
        mark_id: number of 48 bits in the watermark, for instance of a job.

    Raises:
        UserError: if the options do not fit each other.
    """

    mark: bool = True
    label: bool = False
    sign_cert: Path | None = None
    sign_key: Path | None = None
    timestamp_url: str | None = None
    mark_id: int = 0

    def __post_init__(self) -> None:
        if (self.sign_cert is None) != (self.sign_key is None):
            raise UserError("--sign-cert and --sign-key belong together; give both or neither")
        if not self.mark and (self.sign_cert or self.timestamp_url or self.mark_id):
            raise UserError("--no-mark excludes --sign-cert, --sign-key, --timestamp-url and --mark-id; drop one")
        if not 0 <= self.mark_id < 2**48:
            raise UserError(f"mark_id must be from 0 to 2^48-1, got {self.mark_id}")
        if self.timestamp_url is not None and not self.timestamp_url.startswith(("http://", "https://")):
            raise UserError(f"timestamp_url must begin with http:// or https://, got {self.timestamp_url!r}")

    def credential(self, path: Path) -> Credential | None:
        """What signs a video; None where it carries no content credentials. Call it before the work begins.

        Raises:
            UserError: if the given certificate or key cannot be used.
        """
        asked = self.sign_cert is not None or self.timestamp_url is not None
        if not self.mark or not (asked or available()):
            return None
        if path.suffix.lower() not in SIGNED_SUFFIXES:
            if asked:
                raise UserError(f"{path}: only {', '.join(SIGNED_SUFFIXES)} can be signed; choose one of them")
            return None
        return load_credential(self.sign_cert, self.sign_key)


#: The marks of every video unless something else is asked for.
DEFAULT_MARKS = Marks()


def write_marked(
    frames: Iterable[ImageArray],
    path: Path,
    speech: str | Path | Speech | None,
    total: int,
    progress: Callable[[int, int], None] | None = None,
    marks: Marks = DEFAULT_MARKS,
    video: VideoFormat = DEFAULT_VIDEO,
) -> Result:
    """Stream frames into a file with marks; see :func:`flowvqtalker.io.video.write_video`.

    A video that cannot be signed at the end is kept, with its watermark and a warning.

    Raises:
        UserError: if the file cannot be written, or a given certificate cannot be used; then at once.
    """
    credential = marks.credential(check_output(path))

    def seal(temporary: Path, target: Path) -> None:
        assert credential is not None
        try:
            sign(temporary, target, credential, marks.timestamp_url)
        except SigningError as error:
            logger.warning("%s has a watermark but no content credentials (%s)", target, error)

    return write_video(
        labelled(frames) if marks.label else frames,
        path,
        speech,
        total,
        progress,
        video,
        mark=Watermark(payload(marks.mark_id)) if marks.mark else None,
        seal=seal if credential is not None else None,
    )
