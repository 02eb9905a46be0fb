"""Split by identity: nobody who is trained on is validated on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

__all__ = ["split_of"]


def split_of(identity: str, held_out: Collection[str] = ()) -> str:
    """The split of everything that shows or voices one identity: ``"train"``, or for one in ten ``"val"``.

    A hash of the name decides, so the split needs no list, is the same on every machine and stays when identities are
    added. Published test sets have their own people: whoever is in ``held_out`` is never trained on either.
    """
    return "val" if identity in held_out or int(hashlib.sha1(identity.encode()).hexdigest(), 16) % 10 == 0 else "train"
