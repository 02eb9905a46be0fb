"""Splits by identity: nobody who is trained on is validated on; and the published splits of MEAD and HDTF."""

from __future__ import annotations

import hashlib

__all__ = ["MEAD_TEST", "mead_split", "split_of"]

#: Subjects of MEAD that EDTalk and EAT (and, with the same authors, FlowVQTalker) keep for testing.
MEAD_TEST = ("M003", "M030", "W009", "W015")


def split_of(identity: str) -> str:
    """The split of everything that shows (or speaks with) one identity: ``"train"`` or ``"val"``, one in ten.

    A hash of the name decides, so the split needs no list, is the same on every machine, and does not change when
    identities are added.
    """
    return "val" if int(hashlib.sha1(identity.encode()).hexdigest(), 16) % 10 == 0 else "train"


def mead_split(subject: str) -> str:
    """The published split of a MEAD subject (``M003`` ... ``W040``): ``"train"`` or ``"test"``."""
    return "test" if subject in MEAD_TEST else "train"
