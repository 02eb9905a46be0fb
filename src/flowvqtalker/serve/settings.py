"""What a server may be asked for: limits, and where things lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flowvqtalker.errors import UserError

__all__ = ["Settings", "parse_duration"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server.

    Attributes:
        data: folder of the database and all files.
        workers: processes that render.
        weights: folder of weights; None is the package's own.
        device, dtype: as those of ``animate``.
        tokens: who may use the server; none: everybody who reaches it.
        hosts: host names by which it may be addressed; empty: any.
        keep: seconds after which finished videos and unused uploads are removed.
        url_hosts: hosts that media may be fetched from; empty: URLs are refused.
        max_upload: bytes of a request.
        max_pixels: of an image, or of a frame of a clip.
        max_seconds: of speech and clips.
        max_samples: of one job.
        max_queue: jobs that wait or run, of all clients.
        max_client: the same, of one client.
        max_live: live sessions at the same time.
    """

    data: Path
    workers: int = 1
    weights: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    tokens: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    keep: float = 86_400.0
    url_hosts: tuple[str, ...] = ()
    max_upload: int = 256 << 20
    max_pixels: int = 50_000_000
    max_seconds: float = 3600.0
    max_samples: int = 8
    max_queue: int = 128
    max_client: int = 32
    max_live: int = 1


def parse_duration(text: str) -> float:
    """Seconds from a text such as 90s, 30m, 24h or 7d.

    Raises:
        UserError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise UserError(f"duration {text!r}: write a number and s, m, h or d, for instance 24h")
    return float(found[1]) * _UNITS[found[2]]
