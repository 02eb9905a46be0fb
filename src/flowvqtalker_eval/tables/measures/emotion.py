"""Emotion columns: share of clips in which a classifier sees the requested emotion."""

from __future__ import annotations

import numpy as np

from flowvqtalker_eval.evaluators.motion_emotion import MotionEmotionExtractor
from flowvqtalker_eval.metrics import expression_networks as published
from flowvqtalker_eval.metrics.accuracy import CLASSES, accuracy_of
from flowvqtalker_eval.metrics.analysis import Array, Extractor
from flowvqtalker_eval.metrics.emotion_fan import EmotionFanExtractor, EmotionFanScores
from flowvqtalker_eval.metrics.mesh import FitExtractor, MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, SetScore, landmark_extractors, need_weights

__all__ = ["MEASURES"]


def _columns(key: str, title: str, about: str) -> tuple[Column, ...]:
    return (
        Column(key, f"{title} %", "higher", 1, f"requested emotion recognised by {about}"),
        Column(f"{key}_clips", f"{title} clips", None, 0, "number of labelled clips", extra=True),
    )


class _Accuracy(Measure):
    """Accuracy in percent, of clips with a label that the classifier knows; a clip without a face counts as wrong.

    Attributes:
        array: the class probabilities (C,) of a clip, or (T, C) of its frames, NaN where there are none.
        classes: the C classes.
    """

    array = ""
    classes: tuple[str, ...] = CLASSES

    def start(self) -> SetScore:
        def keep(clips: ClipPair) -> tuple[Array, str | None]:
            frames = np.atleast_2d(clips.generated.arrays[self.array])
            seen = frames[np.isfinite(frames).all(1)]
            return (seen.mean(0) if len(seen) else frames[0] * np.nan), clips.pair.emotion

        def reduce(kept: list[tuple[Array, str | None]]) -> dict[str, float]:
            share, count = accuracy_of([scores for scores, _ in kept], [label for _, label in kept], self.classes)
            key, clips = (column.key for column in self.columns)
            return {key: 100 * share, clips: float(count)} if count else {}

        return SetScore(keep, reduce)


class _Published(_Accuracy):
    """Accuracy by a published expression network: the mean of its probabilities over a clip's frames.

    Attributes:
        network: one of :data:`flowvqtalker_eval.metrics.expression_networks.NETWORKS`.
    """

    network = ""
    classes = published.CLASSES

    def extractors(self) -> list[Extractor]:
        need_weights(self.array, self.options.weights)
        return [MeshExtractor(), published.ExpressionExtractor(self.network, self.options.weights)]


class FaceApi(_Published):
    """Accuracy by face-api's network."""

    name, network, array = "emotion-face-api", "face-api", "expression_face_api"
    columns = _columns("acc_face_api", "Acc emo (face-api)", "the expression network of face-api")


class Fer(_Published):
    """Accuracy by fer's network."""

    name, network, array = "emotion-fer", "fer", "expression_fer"
    columns = _columns("acc_fer", "Acc emo (fer)", "the expression network of fer")


class EmotionFan(_Accuracy):
    """Accuracy by Emotion-FAN's published weights."""

    name, array = "emotion-fan", "emotion_fan"
    columns = _columns("acc_fan", "Acc_FAN", "Emotion-FAN")

    def extractors(self) -> list[Extractor]:
        path, device = self.options.emotion_fan, self.options.chosen_device()
        return [*landmark_extractors(self.options), EmotionFanExtractor(path, device), EmotionFanScores(path)]


class MotionEmotion(_Accuracy):
    """Accuracy from the tracked expression alone."""

    name, array = "motion-emotion", "motion_emotion"
    columns = _columns("acc_motion", "Acc β", "our classifier of the tracked expression")

    def extractors(self) -> list[Extractor]:
        folder = self.options.weights
        need_weights("motion_emotion", folder)
        return [MeshExtractor(), FitExtractor(folder), MotionEmotionExtractor(folder)]


MEASURES: tuple[type[Measure], ...] = (FaceApi, Fer, EmotionFan, MotionEmotion)
