"""Columns about emotion: share of clips in which a classifier sees the emotion that was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowvqtalker.errors import MissingDependency
from flowvqtalker.metrics.accuracy import CLASSES
from flowvqtalker.metrics.analysis import AnyExtractor, Array, Settings
from flowvqtalker.metrics.measures.base import Both, Whole
from flowvqtalker.metrics.measures.motion import Fitted
from flowvqtalker.metrics.report import Column

__all__ = ["MEASURES"]


class _Shares:
    """Share of the clips that are right, in percent; clips without one of the eight labels do not count."""

    def __init__(self, key: str, array: str) -> None:
        self.key, self.array = key, array
        self.right: list[bool] = []

    def add(self, both: Both) -> None:
        """One more clip."""
        scores = both.made.arrays[self.array]
        if both.pair.emotion in CLASSES and scores.size == len(CLASSES) and np.isfinite(scores).all():
            self.right.append(CLASSES[int(scores.argmax())] == both.pair.emotion)

    def result(self) -> dict[str, float]:
        """The share and its denominator."""
        if not self.right:
            return {}
        return {self.key: 100.0 * sum(self.right) / len(self.right), f"{self.key}_clips": float(len(self.right))}


class MotionEmotionExtractor:
    """``motion_emotion`` (8,): probabilities of the classes from ``expression``; NaN where there is no face.

    Arguments:
        weights: folder of weights; None is that of the package.
    """

    name = "motion_emotion"
    needs: tuple[str, ...] = ("expression",)

    def __init__(self, weights: Any = None) -> None:
        self._weights = weights
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_weights": self._weights, "_model": None}

    def settings(self) -> Settings:
        """The weights."""
        from flowvqtalker import weights

        return {"weights": weights.manifest(self._weights)["motion_emotion.safetensors"].sha256[:16]}

    def __call__(self, known: dict[str, Array], wave: Array | None) -> dict[str, Array]:
        """Of a whole clip."""
        import torch

        if self._model is None:
            from flowvqtalker.metrics.motion_emotion import load_motion_emotion

            self._model = load_motion_emotion(self._weights)
        beta = known["expression"]
        beta = beta[np.isfinite(beta).all(1)]
        if not len(beta):
            return {"motion_emotion": np.full(len(CLASSES), np.nan, np.float32)}
        with torch.inference_mode():
            return {"motion_emotion": self._model.classify(torch.from_numpy(beta)).numpy()}


class MotionEmotion(Fitted):
    """Accuracy from the tracked expression alone."""

    name = "motion-emotion"
    columns = (
        Column("acc_motion", "Acc β %", "higher", 1, "emotion seen by our classifier of the tracked expression"),
        Column("acc_motion_clips", "Acc β clips", None, 0, "how many labelled clips that is", extra=True),
    )

    def extractors(self) -> list[AnyExtractor]:
        """Fit and classes."""
        _needs_weights("motion_emotion", "motion-emotion", self.weights)
        return [*super().extractors(), MotionEmotionExtractor(self.weights)]

    def start(self) -> Whole:
        """Of all clips."""
        return _Shares("acc_motion", "motion_emotion")


def _needs_weights(name: str, stage: str, folder: Any) -> None:
    from flowvqtalker import weights

    if f"{name}.safetensors" not in weights.manifest(folder):
        raise MissingDependency(f"the weights {name} are missing; train them with `flowvqtalker train {stage}`")


MEASURES: tuple[type[Any], ...] = (MotionEmotion,)
