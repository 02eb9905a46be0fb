"""Lip-sync columns: our sync expert, and SyncNet if its weights are available."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, Extractor, Frames, Settings, StreamExtractor, Wave
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, Options, landmark_extractors, need_weights

__all__ = ["MEASURES", "SyncNetExtractor"]


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
        """Mouths and their embeddings."""
        from flowvqtalker_eval.evaluators.sync_expert import MouthExtractor, SyncExpertExtractor

        need_weights("sync", "sync", self.options.weights)
        return [MeshExtractor(), MouthExtractor(), SyncExpertExtractor(self.options.weights)]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Of the generated clip."""
        from flowvqtalker_eval.evaluators.sync_expert import sync_expert_score

        arrays = clips.generated.arrays
        video, audio = arrays["sync_expert_video"], arrays["sync_expert_audio"]
        if not np.isfinite(video).all(1).any():  # no sound, too short, or no face
            return {}
        return self.values(sync_expert_score(video, audio))


class SyncNetExtractor(StreamExtractor):
    """``syncnet_curve`` (31,): mean distance of lips and sound for each shift; empty if nothing can be compared.

    Raises:
        MissingDependency: if the weights are not found.
    """

    name = "syncnet"
    needs: tuple[str, ...] = ("landmarks68",)
    gives = ("syncnet_curve",)

    def __init__(self, options: Options) -> None:
        from flowvqtalker_eval.metrics.syncnet import find_syncnet

        self._path, self._sha256 = find_syncnet(options.syncnet)
        self._crop, self._device = options.protocol, options.device
        self._model: Any = None

    def settings(self) -> Settings:
        """Weights, crop and shifts."""
        from flowvqtalker_eval.metrics.sync import REACH

        return {"weights": self._sha256[:16], "crop": self._crop, "reach": REACH}

    def __call__(self, frames: Iterable[Frames], known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        """The curve of one clip."""
        if self._model is None:
            from flowvqtalker.loading import choose_device
            from flowvqtalker_eval.metrics.syncnet import SyncNet

            self._model = SyncNet(self._path, self._crop, device=choose_device(self._device))
        if wave is None or not np.isfinite(known["landmarks68"]).all((1, 2)).any():
            return {"syncnet_curve": np.zeros(0)}
        try:
            return {"syncnet_curve": self._model.score(frames, known["landmarks68"], wave).curve}
        except UserError:  # a clip of six frames or less
            return {"syncnet_curve": np.zeros(0)}


class SyncNet(_Sync):
    """LSE-C, LSE-D and offset by SyncNet's published weights."""

    name = "syncnet"
    columns = (
        Column("lse_c", "LSE-C", "higher", 3, "SyncNet's confidence"),
        Column("lse_d", "LSE-D", "lower", 3, "SyncNet's distance"),
        Column("lse_offset", "LSE offset", None, 1, "mean over clips of SyncNet's |offset|, frames"),
    )

    def extractors(self) -> list[Extractor]:
        """Landmarks and SyncNet's curve."""
        return [*landmark_extractors(self.options), SyncNetExtractor(self.options)]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Of the generated clip."""
        from flowvqtalker_eval.metrics.sync import score_curve

        curve = clips.generated.arrays["syncnet_curve"]
        return self.values(score_curve(curve, clips.generated.frames)) if len(curve) else {}


MEASURES: tuple[type[Measure], ...] = (SyncExpert, SyncNet)
