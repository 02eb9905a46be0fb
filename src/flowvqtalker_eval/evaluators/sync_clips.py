"""Command ``sync-clips``: align each clip's sound with its lips, by the sync expert.

``prepare`` finds one lag for a whole collection; single clips can still be off by some frames, which blurs what lips
are learnt from the sound. This finds the lag of each clip with speech and mouths
(:mod:`flowvqtalker_eval.evaluators.mouths`) and writes ``lags.npz`` beside the shard: ``offset``, frames by which the
sound comes before the lips, and ``confidence``. A shard with this file shifts its sound by the lag
(:meth:`flowvqtalker.data.shards.Shard.wave`) where the expert is sure of a small one; a larger one is more likely
wrong.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flowvqtalker.data.extract import save_npz
from flowvqtalker.data.shards import LAGS, Shard
from flowvqtalker.errors import UserError
from flowvqtalker_eval.evaluators.mouths import mouths_of
from flowvqtalker_eval.evaluators.sync_expert import load_sync_expert, sync_expert_score

__all__ = ["SyncClips"]

logger = logging.getLogger(__name__)

_SHORTEST = 20  # frames; shorter clips are left as they are


@dataclass(frozen=True, kw_only=True)
class SyncClips:
    """Find the lag between lips and sound of each clip of a shard."""

    shard: Path
    """The shard, with mouths (`flowvqtalker prepare-mouths`)."""
    weights: Path | None = None
    """Folder with the sync expert. Default: inside the package."""

    def run(self) -> int:
        """Write ``lags.npz``; returns how many clips it shifts.

        Raises:
            UserError: if there is no shard, or it has no mouths.
        """
        shard = Shard(self.shard)
        mouths = mouths_of(shard)
        expert = load_sync_expert(self.weights)
        offset, confidence = np.zeros(len(shard), np.int64), np.zeros(len(shard), np.float32)
        numbers = [n for n in shard.select(speech=True, is_image=False, min_length=_SHORTEST).tolist() if n in mouths]
        if not numbers:
            raise UserError(f"{self.shard} has no mouths; cut them with `flowvqtalker prepare-mouths`")
        for number in tqdm(numbers, desc="sync", unit="clip", disable=None):
            with torch.inference_mode():
                embedded = expert.embed(np.asarray(mouths[number]), shard.wave(number, stored=True))
            score = sync_expert_score(*embedded)
            offset[number], confidence[number] = score.offset, score.confidence
        save_npz(self.shard / LAGS, {"offset": offset, "confidence": confidence})
        shifted = int((Shard(self.shard).lags != 0).sum())
        logger.info("%s: %d of %d clips are shifted", self.shard / LAGS, shifted, len(numbers))
        return shifted
