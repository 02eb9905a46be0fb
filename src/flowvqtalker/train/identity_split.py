"""Keep smiles out of the identity of a single picture.

Fitted to one picture, a smile ends up in α by a quarter: the identity basis can widen mouths too. People who are seen
neutral and smiling show which directions of α that takes: the principal components of what their smiling α has and
their neutral α lacks. Kept in the face model as ``smile_leak``, these directions get a higher price when one picture is
fitted (:mod:`flowvqtalker.face.fit`); the expression basis stays as it is.

    flowvqtalker identity-split SHARD FACE_MODEL
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import tyro

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.fit import fit
from flowvqtalker.face.model import FaceModel

__all__ = ["SMILE", "IdentitySplit", "Pair", "find_leak", "find_pairs", "smile_share"]

logger = logging.getLogger(__name__)

#: The blendshapes of a smile.
SMILE = (arkit_index("mouthSmileLeft"), arkit_index("mouthSmileRight"))
#: Difference of the smile blendshape that makes two pictures of a person a pair.
_LEAST_SMILE = 0.25

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """One person, neutral and smiling: landmarks (478, 3) of both in crop pixels, the split, and the name."""

    identity: str
    split: str
    neutral: Floats
    smiling: Floats


def find_pairs(shard: Shard) -> list[Pair]:
    """The people of a shard of whom one picture smiles clearly more than another."""
    people: dict[tuple[str, str], list[int]] = {}
    for number in np.flatnonzero(shard.is_image).tolist():
        people.setdefault((str(shard.identity[number]), str(shard.split[number])), []).append(number)
    pairs = []
    for (identity, split), numbers in sorted(people.items()):
        rows = [int(shard.start[number]) for number in numbers]
        smiles = [float(np.mean(shard.blendshapes[row][list(SMILE)])) for row in rows]
        low, high = int(np.nanargmin(smiles)), int(np.nanargmax(smiles))
        if smiles[high] - smiles[low] >= _LEAST_SMILE:
            neutral, smiling = (np.asarray(shard.landmarks(rows[i]), np.float32) for i in (low, high))
            pairs.append(Pair(identity, split, neutral, smiling))
    return pairs


def smile_share(model: FaceModel, pair: Pair) -> float:
    """Share of the difference between a person's two pictures, in vertices, that is in the identity."""
    neutral, smiling = (fit(model, landmarks) for landmarks in (pair.neutral, pair.smiling))
    identity = torch.from_numpy(smiling.identity - neutral.identity) @ model.identity.flatten(1)
    expression = torch.from_numpy(smiling.expression[0] - neutral.expression[0]) @ model.expression.flatten(1)
    total = identity + expression
    return float(identity @ total / total.square().sum())


def find_leak(model: FaceModel, pairs: list[Pair], count: int = 8, penalty: float = 100.0) -> torch.Tensor:
    """``smile_leak`` (count, 80) of a face model.

    Arguments:
        model: without one.
        pairs: of training people, at least ``count``.
        count: number of directions.
        penalty: added to the precision of α along each.

    Raises:
        UserError: if there are too few pairs.
    """
    if len(pairs) < count:
        raise UserError(f"{count} people seen neutral and smiling are needed, the shard has {len(pairs)}")
    change = [fit(model, pair.smiling).identity - fit(model, pair.neutral).identity for pair in pairs]
    directions = np.linalg.svd(np.stack(change).astype(np.float64), full_matrices=False)[2][:count]
    return torch.from_numpy(np.sqrt(penalty) * directions).float()


@dataclass(frozen=True)
class IdentitySplit:
    """Learn which directions of the identity smiles leak into, and store them in the face model."""

    shard: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARD")]
    """Shard with pictures of people seen neutral and smiling."""
    face_model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FACE_MODEL")]
    """Face model to change in place."""

    def run(self) -> None:
        """Write the face model, and log the share of held-out smiles in the identity before and after."""
        model = FaceModel.load(self.face_model)
        model.smile_leak = torch.zeros(0, model.smile_leak.shape[1])
        pairs = find_pairs(Shard(self.shard))
        held_out = [pair for pair in pairs if pair.split == "val"]
        before = [smile_share(model, pair) for pair in held_out]
        model.smile_leak = find_leak(model, [pair for pair in pairs if pair.split == "train"])
        after = [smile_share(model, pair) for pair in held_out]
        model.save(self.face_model)
        shares = (f"{np.mean(part):.3f}" if part else "unknown" for part in (before, after))
        logger.info("%d held-out people: share of a smile in the identity %s, now %s", len(held_out), *shares)
