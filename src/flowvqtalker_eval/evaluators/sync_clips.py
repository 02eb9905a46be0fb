"""Bring each clip's sound into step with its lips, by the sync expert.

    flowvqtalker sync-clips --shard SHARD

``prepare`` finds the lag of a collection; single clips of it can still be some frames off, which blurs what lips are
learnt from the sound. This finds the lag of each clip with speech and mouths (:mod:`flowvqtalker_eval.evaluators.mouths`) and
writes it beside the shard as ``lags.npz``: ``offset``, frames that the sound comes before the lips, and ``confidence``
of every clip. A shard that has it gives its speech moved by it (:meth:`flowvqtalker.data.shards.Shard.wave`), where the
expert is sure of a small lag; a larger one is more likely wrong.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from flowvqtalker.data.shards import LAGS, Shard
from flowvqtalker.errors import UserError
from flowvqtalker_eval.evaluators.mouths import mouths_of
from flowvqtalker_eval.evaluators.sync_expert import load_sync_expert, sync_expert_score

__all__ = ["SyncClips", "find_lags"]

logger = logging.getLogger(__name__)

#: Clips with fewer frames are left as they are.
_SHORTEST = 20


@dataclass(frozen=True)
class SyncClips:
    """Find the lag of each clip of a shard and write it beside it."""

    shard: Path
    """The shard, with mouths."""
    weights: Path | None = None
    """Folder with the sync expert; default: inside the package."""


def find_lags(config: SyncClips) -> int:
    """Write ``lags.npz``; returns how many clips will be moved.

    Raises:
        UserError: if there is no shard, or it has no mouths.
    """
    shard = Shard(config.shard)
    mouths = mouths_of(shard)
    expert = load_sync_expert(config.weights)
    offset, confidence = np.zeros(len(shard), np.int64), np.zeros(len(shard), np.float32)
    numbers = [n for n in shard.select(speech=True, picture=False, min_length=_SHORTEST).tolist() if n in mouths]
    if not numbers:
        raise UserError(f"{config.shard} has no mouths; cut them with flowvqtalker prepare-mouths")
    for number in tqdm(numbers, desc="resync", unit="clip", disable=None):
        with torch.inference_mode():
            embedded = expert.embed(np.asarray(mouths[number]), shard.wave(number, stored=True))
        score = sync_expert_score(*embedded)
        offset[number], confidence[number] = score.offset, score.confidence
    beside = config.shard / (LAGS + ".part")
    with open(beside, "wb") as file:
        np.savez(file, offset=offset, confidence=confidence)
    beside.replace(config.shard / LAGS)
    moved = int((Shard(config.shard).lags != 0).sum())
    logger.info("%s: %d of %d clips will be moved", config.shard / LAGS, moved, len(numbers))
    return moved


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    find_lags(tyro.cli(SyncClips))
