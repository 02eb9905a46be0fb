"""Marks that say a video is generated: content credentials, invisible watermark, visible label; and their check."""

from flowvqtalker.provenance.marks import DEFAULT_MARKS, Marks, write_marked
from flowvqtalker.provenance.verify import Report, verify

__all__ = ["DEFAULT_MARKS", "Marks", "Report", "verify", "write_marked"]
