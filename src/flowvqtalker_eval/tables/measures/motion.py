"""Motion columns: expression, pose, lips, jitter, blinks, beats, diversity."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any

import numpy as np

from flowvqtalker.loading import load_face_model
from flowvqtalker_eval.metrics import beats, motion
from flowvqtalker_eval.metrics.analysis import Array, Extractor, Settings
from flowvqtalker_eval.metrics.mesh import FitExtractor, MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, SetScore

__all__ = ["MEASURES"]


class _Fitted(Measure):
    """A measure of the fitted expression β and pose ρ."""

    def extractors(self) -> list[Extractor]:
        return [MeshExtractor(), FitExtractor(self.options.weights)]


class Coefficients(_Fitted):
    """AED and APD."""

    name = "coefficients"
    columns = (
        Column("aed", "AED", "lower", 3, "mean |β̂ - β| over frames and 64 coefficients, standard deviations of faces"),
        Column("apd", "APD", "lower", 2, "mean absolute difference of pitch, yaw and roll, degrees"),
        Column("apd_translation", "APD t", "lower", 4, "the same of (tx, ty, tz), eye distances", extra=True),
    )

    def pair(self, clips: ClipPair) -> dict[str, float]:
        pose = motion.pose_distance(*clips.paired("pose"))
        expression = motion.expression_distance(*clips.paired("expression"))
        return {"aed": expression, "apd": pose.angles, "apd_translation": pose.translation}


class Lips(_Fitted):
    """LVE."""

    name = "lve"
    columns = (
        Column("lve", "LVE", "lower", 2, "largest lip vertex error per frame, mean over frames, % of the eye distance"),
    )  # fmt: skip

    @cached_property
    def _face(self) -> Any:
        return load_face_model(self.options.weights)

    def pair(self, clips: ClipPair) -> dict[str, float]:
        identity = clips.real.arrays["identity"]
        real, generated = clips.paired("expression")
        seen = np.isfinite(real).all(1) & np.isfinite(generated).all(1)
        if not np.isfinite(identity).all() or not seen.any():
            return {"lve": float("nan")}
        shapes = [motion.shape(self._face, beta[seen], identity) for beta in (real, generated)]
        return {"lve": motion.lip_vertex_error(*shapes)}


class Jitter(_Fitted):
    """Jitter, and how much the head moves."""

    name = "jitter"
    columns = (
        Column("jitter", "Jitter", None, 2, "mean landmark acceleration in the head's frame, eye distances / s²"),
        Column("jitter_bone", "Jitter bone", "lower", 2, "the same of landmarks over bone, ideally zero", extra=True),
        Column("head", "Head", None, 2, "standard deviation of pitch, yaw and roll within a clip, degrees", extra=True),
    )

    def pair(self, clips: ClipPair) -> dict[str, float]:
        mesh, pose = (clips.generated.arrays[name] for name in ("mesh", "pose"))
        if not np.isfinite(mesh).all((1, 2)).any():
            return {}
        found = motion.landmark_jitter(mesh)
        return {
            "jitter": found["face"],
            "jitter_bone": found["bone"],
            "head": float(motion.head_deviation(pose).mean()),
        }


class Blinks(Measure):
    """Blinks per minute over all clips."""

    name = "blinks"
    columns = (Column("blinks", "Blinks", None, 1, "per minute, over all clips together, from landmarks of the lids"),)

    def extractors(self) -> list[Extractor]:
        return [MeshExtractor()]

    def start(self) -> SetScore:
        def keep(clips: ClipPair) -> Array | None:
            mesh = clips.generated.arrays["mesh"]
            return motion.eye_closure_of_landmarks(mesh) if np.isfinite(mesh).all((1, 2)).any() else None

        return SetScore(keep, lambda closures: {"blinks": motion.blink_rate(closures)})


class Beats(_Fitted):
    """Beat alignment of head and speech."""

    name = "beats"
    columns = (
        Column("beat", "BA", "higher", 3, "beat alignment of head and speech onsets (Bailando's, at 25 fps)"),
        Column("beat_chance", "BA chance", None, 3, "BA of the same motion shifted at random", extra=True),
    )  # fmt: skip

    def extractors(self) -> list[Extractor]:
        return [*super().extractors(), beats.BeatExtractor(self.options.weights)]

    def settings(self) -> Settings:
        return {"tolerance_frames": beats.TOLERANCE}

    def pair(self, clips: ClipPair) -> dict[str, float]:
        audio, head = (clips.generated.arrays[name] for name in ("audio_beats", "head_beats"))
        if len(audio) == 0:
            return {}
        chance = beats.chance(audio, head, clips.generated.frames)
        return {"beat": beats.beat_alignment(audio, head), "beat_chance": chance}


class Diversity(_Fitted):
    """Distance between samples of one item with different seeds."""

    name = "diversity"
    columns = (
        Column("diversity_expression", "Div β", None, 2, "mean ‖β - β'‖ of samples with different seeds, over frames"),
        Column("diversity_pose", "Div ρ", None, 2, "the same of (pitch, yaw, roll), degrees"),
    )

    def start(self) -> SetScore:
        def keep(clips: ClipPair) -> tuple[str, Array, Array] | None:
            if clips.pair.seed is None or clips.same:
                return None
            arrays = clips.generated.arrays
            return clips.pair.name, arrays["expression"], np.degrees(arrays["pose"][:, :3])

        return SetScore(keep, _diversity)


def _diversity(samples: list[tuple[str, Array, Array]]) -> dict[str, float]:
    groups: dict[str, list[tuple[Array, Array]]] = defaultdict(list)
    for name, expression, angles in samples:
        groups[name].append((expression, angles))
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return {}
    values = np.array([[motion.diversity([sample[k] for sample in group]) for k in range(2)] for group in several])
    with np.errstate(invalid="ignore"):
        beta, rho = np.nanmean(values, axis=0)
    return {"diversity_expression": float(beta), "diversity_pose": float(rho)}


MEASURES: tuple[type[Measure], ...] = (Coefficients, Lips, Jitter, Blinks, Beats, Diversity)
