"""Emotion columns: share of clips in which a classifier sees the requested emotion."""

from __future__ import annotations

from flowvqtalker_eval.evaluators.emotion import EmotionExtractor, EmotionScores
from flowvqtalker_eval.evaluators.motion_emotion import MotionEmotionExtractor
from flowvqtalker_eval.metrics.accuracy import accuracy_of
from flowvqtalker_eval.metrics.analysis import Array, Extractor
from flowvqtalker_eval.metrics.emotion_fan import EmotionFanExtractor, EmotionFanScores
from flowvqtalker_eval.metrics.mesh import FitExtractor, MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import (
    Measure,
    SetScore,
    landmark_extractors,
    need_weights,
)

__all__ = ["MEASURES"]


def _columns(key: str, title: str, about: str) -> tuple[Column, ...]:
    return (
        Column(key, f"{title} %", "higher", 1, f"requested emotion recognised by {about}"),
        Column(f"{key}_clips", f"{title} clips", None, 0, "number of labelled clips", extra=True),
    )


class _Accuracy(Measure):
    """Accuracy in percent, of labelled clips; a clip without a face counts as wrong.

    Attributes:
        array: the class probabilities (8,) of a clip.
    """

    array = ""

    def start(self) -> SetScore:
        def reduce(kept: list[tuple[Array, str | None]]) -> dict[str, float]:
            share, count = accuracy_of([scores for scores, _ in kept], [label for _, label in kept])
            key, clips = (column.key for column in self.columns)
            return {key: 100 * share, clips: float(count)} if count else {}

        return SetScore(lambda clips: (clips.generated.arrays[self.array], clips.pair.emotion), reduce)


class Emotion(_Accuracy):
    """Accuracy by our own classifier of faces."""

    name = array = "emotion"
    columns = _columns("acc_emo", "Acc_emo", "this project's own classifier of faces")

    def extractors(self) -> list[Extractor]:
        folder, device = self.options.weights, self.options.chosen_device()
        need_weights("emotion", "emotion", folder)
        return [MeshExtractor(), EmotionExtractor(folder, device), EmotionScores(folder, device)]


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
        need_weights("motion_emotion", "motion-emotion", folder)
        return [MeshExtractor(), FitExtractor(folder), MotionEmotionExtractor(folder)]


MEASURES: tuple[type[Measure], ...] = (Emotion, EmotionFan, MotionEmotion)
