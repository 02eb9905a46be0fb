"""Columns about lips and sound: our sync expert, and SyncNet where its weights are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.analysis import Array, Extractor, Settings, StreamExtractor
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import Both, Measure, Options, landmark_extractors

__all__ = ["MEASURES", "SyncNetExtractor"]


def _columns(key: str, title: str, about: str) -> tuple[Column, ...]:
    return (
        Column(f"{key}_confidence", f"{title}-C", "higher", 3, f"confidence of {about}"),
        Column(f"{key}_distance", f"{title}-D", "lower", 3, f"distance of {about}"),
        Column(f"{key}_offset", f"{title} offset", None, 1, "mean over clips of |offset|, frames; 0 is in step"),
    )


def _values(key: str, score: Any) -> dict[str, float]:
    return {
        f"{key}_confidence": score.confidence,
        f"{key}_distance": score.distance,
        f"{key}_offset": float(abs(score.offset)),
    }


class SyncExpert(Measure):
    """Confidence, distance and offset by our own small expert."""

    name = "sync"
    columns = _columns("sync", "SyncExpert", "lips and sound by this project's own expert (not SyncNet's scale)")

    def __init__(self, options: Options) -> None:
        self.weights = options.weights

    def extractors(self) -> list[Extractor]:
        """Mouths and their embeddings."""
        from flowvqtalker import weights
        from flowvqtalker_eval.evaluators.sync_expert import MouthExtractor, SyncExpertExtractor

        if "sync.safetensors" not in weights.manifest(self.weights):
            raise MissingDependency("the sync expert's weights are missing; train them with `flowvqtalker train sync`")
        return [MeshExtractor(), MouthExtractor(), SyncExpertExtractor(self.weights)]

    def pair(self, both: Both) -> dict[str, float]:
        """Of the generated clip."""
        from flowvqtalker_eval.evaluators.sync_expert import sync_expert_score

        video, audio = both.made.arrays["sync_expert_video"], both.made.arrays["sync_expert_audio"]
        if not np.isfinite(video).all(1).any():  # no sound, too short, or no face
            return {}
        return _values("sync", sync_expert_score(video, audio))


class SyncNetExtractor(StreamExtractor):
    """``syncnet_curve`` (31,): mean distance of lips and sound for each shift; empty where nothing can be compared.

    Arguments:
        weights: ``syncnet_v2.model``; None looks in the usual places.
        crop: ``eat`` or ``native``.
        device: where it runs.

    Raises:
        MissingDependency: if the weights are nowhere.
    """

    name = "syncnet"
    needs: tuple[str, ...] = ("landmarks68",)
    gives = ("syncnet_curve",)

    def __init__(self, weights: Path | None, crop: str, device: str = "cpu") -> None:
        from flowvqtalker_eval.metrics.syncnet import find_syncnet

        self._path, self._sha256 = find_syncnet(weights)
        self._crop, self._device = crop, device
        self._model: Any = None

    def settings(self) -> Settings:
        """Weights, crop and shifts."""
        from flowvqtalker_eval.metrics.sync import REACH

        return {"weights": self._sha256[:16], "crop": self._crop, "reach": REACH}

    def __call__(
        self, frames: Iterable[npt.NDArray[np.uint8]], known: dict[str, Array], wave: npt.NDArray[np.float32] | None
    ) -> dict[str, Array]:
        """The curve of one clip."""
        if self._model is None:
            from flowvqtalker.loading import choose_device
            from flowvqtalker_eval.metrics.syncnet import SyncNet

            self._model = SyncNet(
                self._path, "eat" if self._crop == "eat" else "native", device=choose_device(self._device)
            )
        if wave is None or not np.isfinite(known["landmarks68"]).all((1, 2)).any():
            return {"syncnet_curve": np.zeros(0)}
        try:
            return {"syncnet_curve": self._model.score(frames, known["landmarks68"], wave).curve}
        except UserError:  # a clip of six frames or less
            return {"syncnet_curve": np.zeros(0)}


class SyncNet(Measure):
    """LSE-C, LSE-D and offset by SyncNet's published weights."""

    name = "syncnet"
    columns = (
        Column("lse_c", "LSE-C", "higher", 3, "SyncNet's confidence"),
        Column("lse_d", "LSE-D", "lower", 3, "SyncNet's distance"),
        Column("lse_offset", "LSE offset", None, 1, "mean over clips of SyncNet's |offset|, frames"),
    )

    def __init__(self, options: Options) -> None:
        self.options = options

    def extractors(self) -> list[Extractor]:
        """Landmarks and SyncNet's curve."""
        curve = SyncNetExtractor(self.options.syncnet, self.options.protocol, self.options.device)
        return [*landmark_extractors(self.options), curve]

    def pair(self, both: Both) -> dict[str, float]:
        """Of the generated clip."""
        from flowvqtalker_eval.metrics.sync import score_curve

        curve = both.made.arrays["syncnet_curve"]
        if len(curve) == 0:
            return {}
        score = score_curve(curve, both.made.frames)
        return {"lse_c": score.confidence, "lse_d": score.distance, "lse_offset": float(abs(score.offset))}


MEASURES: tuple[type[Any], ...] = (SyncExpert, SyncNet)
