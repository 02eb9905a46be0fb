"""Lip-sync columns: our sync expert, and SyncNet if its weights are available."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowvqtalker_eval.evaluators.sync_expert import MouthExtractor, SyncExpertExtractor, sync_expert_score
from flowvqtalker_eval.metrics.analysis import Extractor
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.metrics.sync import score_curve
from flowvqtalker_eval.metrics.syncnet import SyncNetExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, landmark_extractors, need_weights

__all__ = ["MEASURES"]


class _Sync(Measure):
    """Confidence, distance and offset; the columns come in this order."""

    def values(self, score: Any) -> dict[str, float]:
        """Values by column of a sync score."""
        found = score.confidence, score.distance, float(abs(score.offset))
        return {column.key: value for column, value in zip(self.columns, found, strict=True)}


class SyncExpert(_Sync):
    """Our own small sync expert."""

    name = "sync"
    columns = (
        Column("sync_confidence", "SyncExpert-C", "higher", 3, "confidence of this project's own sync expert"),
        Column("sync_distance", "SyncExpert-D", "lower", 3, "its distance of lips and sound (not on SyncNet's scale)"),
        Column("sync_offset", "SyncExpert offset", None, 1, "mean over clips of |offset|, frames; 0 is in sync"),
    )

    def extractors(self) -> list[Extractor]:
        need_weights("sync", self.options.weights)
        return [MeshExtractor(), MouthExtractor(), SyncExpertExtractor(self.options.weights)]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        arrays = clips.generated.arrays
        video, audio = arrays["sync_expert_video"], arrays["sync_expert_audio"]
        if not np.isfinite(video).all(1).any():  # no sound, too short, or no face
            return {}
        return self.values(sync_expert_score(video, audio))


class SyncNet(_Sync):
    """LSE-C, LSE-D and offset by SyncNet's published weights."""

    name = "syncnet"
    columns = (
        Column("lse_c", "LSE-C", "higher", 3, "SyncNet's confidence"),
        Column("lse_d", "LSE-D", "lower", 3, "SyncNet's distance"),
        Column("lse_offset", "LSE offset", None, 1, "mean over clips of SyncNet's |offset|, frames"),
    )

    def extractors(self) -> list[Extractor]:
        curve = SyncNetExtractor(self.options.syncnet, self.options.protocol, self.options.chosen_device())
        return [*landmark_extractors(self.options), curve]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        curve = clips.generated.arrays["syncnet_curve"]
        return self.values(score_curve(curve)) if len(curve) else {}


MEASURES: tuple[type[Measure], ...] = (SyncExpert, SyncNet)
