"""Columns about emotion: share of clips in which a classifier sees the emotion that was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowvqtalker.errors import MissingDependency
from flowvqtalker_eval.metrics.accuracy import CLASSES, accuracy_of
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, Extractor, Settings
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import Both, Measure, Options, Whole, landmark_extractors
from flowvqtalker_eval.tables.measures.motion import Fitted

__all__ = ["MEASURES"]


class _Shares:
    """Share of the clips that are right, in percent; a clip without a face is wrong, one without a label left out."""

    def __init__(self, key: str, array: str) -> None:
        self.key, self.array = key, array
        self.scores: list[Array] = []
        self.labels: list[str | None] = []

    def add(self, both: Both) -> None:
        """One more clip."""
        self.scores.append(both.made.arrays[self.array])
        self.labels.append(both.pair.emotion)

    def result(self) -> dict[str, float]:
        """The share and its denominator."""
        share, count = accuracy_of(self.scores, self.labels)
        return {self.key: 100 * share, f"{self.key}_clips": float(count)} if count else {}


class Emotion(Measure):
    """Accuracy by our own classifier of faces."""

    name = "emotion"
    columns = (
        Column(
            "acc_emo", "Acc_emo %", "higher", 1, "emotion that was asked for, seen by this project's own classifier"
        ),
        Column("acc_emo_clips", "Acc_emo clips", None, 0, "how many labelled clips that is", extra=True),
    )

    def __init__(self, options: Options) -> None:
        self.options = options

    def extractors(self) -> list[Extractor]:
        """Features of faces and classes."""
        from flowvqtalker.loading import choose_device
        from flowvqtalker_eval.evaluators.emotion import EmotionExtractor, EmotionScores

        folder, device = self.options.weights, str(choose_device(self.options.device))
        _needs_weights("emotion", "emotion", folder)
        return [MeshExtractor(), EmotionExtractor(folder, device), EmotionScores(folder, device)]

    def start(self) -> Whole:
        """Of all clips."""
        return _Shares("acc_emo", "emotion")


class EmotionFan(Measure):
    """Accuracy by Emotion-FAN's published weights."""

    name = "emotion-fan"
    columns = (
        Column("acc_fan", "Acc_FAN %", "higher", 1, "emotion that was asked for, seen by Emotion-FAN"),
        Column("acc_fan_clips", "Acc_FAN clips", None, 0, "how many labelled clips that is", extra=True),
    )

    def __init__(self, options: Options) -> None:
        self.options = options

    def extractors(self) -> list[Extractor]:
        """Features of faces and classes."""
        from flowvqtalker.loading import choose_device
        from flowvqtalker_eval.metrics.emotion_fan import EmotionFanExtractor, EmotionFanScores

        path, device = self.options.emotion_fan, str(choose_device(self.options.device))
        return [*landmark_extractors(self.options), EmotionFanExtractor(path, device), EmotionFanScores(path)]

    def start(self) -> Whole:
        """Of all clips."""
        return _Shares("acc_fan", "emotion_fan")


class MotionEmotionExtractor(ClipExtractor):
    """``motion_emotion`` (8,): probabilities of the classes from ``expression``; NaN where there is no face.

    Arguments:
        weights: folder of weights; None is that of the package.
    """

    name = "motion_emotion"
    needs: tuple[str, ...] = ("expression",)
    gives = ("motion_emotion",)

    def __init__(self, weights: Any = None) -> None:
        self._weights = weights
        self._model: Any = None

    def settings(self) -> Settings:
        """The weights."""
        from flowvqtalker import weights

        return {"weights": weights.manifest(self._weights)["motion_emotion.safetensors"].sha256[:16]}

    def __call__(self, known: dict[str, Array], wave: Array | None) -> dict[str, Array]:
        """Of a whole clip."""
        if self._model is None:
            from flowvqtalker_eval.evaluators.motion_emotion import load_motion_emotion

            self._model = load_motion_emotion(self._weights)
        beta = known["expression"]
        beta = beta[np.isfinite(beta).all(1)]
        if not len(beta):
            return {"motion_emotion": np.full(len(CLASSES), np.nan, np.float32)}
        return {"motion_emotion": self._model.classify(beta)}


class MotionEmotion(Fitted):
    """Accuracy from the tracked expression alone."""

    name = "motion-emotion"
    columns = (
        Column("acc_motion", "Acc β %", "higher", 1, "emotion seen by our classifier of the tracked expression"),
        Column("acc_motion_clips", "Acc β clips", None, 0, "how many labelled clips that is", extra=True),
    )

    def extractors(self) -> list[Extractor]:
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


MEASURES: tuple[type[Any], ...] = (Emotion, EmotionFan, MotionEmotion)
