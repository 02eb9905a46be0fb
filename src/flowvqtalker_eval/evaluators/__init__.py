"""Evaluators that this project trains itself, where published weights are missing."""

from __future__ import annotations

__all__ = ["STAGES"]

#: Training stage on the command line -> module.
STAGES = {
    "sync": "flowvqtalker_eval.evaluators.sync_training",
    "emotion": "flowvqtalker_eval.evaluators.emotion_training",
    "motion-emotion": "flowvqtalker_eval.evaluators.motion_emotion_training",
}
