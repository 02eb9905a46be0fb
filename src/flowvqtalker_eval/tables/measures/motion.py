"""Columns about motion: expression, pose, lips, unsteadiness, blinks, beats, diversity, detection."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency
from flowvqtalker_eval.metrics import motion
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, Extractor, Settings
from flowvqtalker_eval.metrics.mesh import FitExtractor, MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import Both, Measure, Options, Whole

__all__ = ["MEASURES", "BeatExtractor", "Fitted"]


class Fitted(Measure):
    """Whatever is computed from β and ρ."""

    def __init__(self, options: Options) -> None:
        self.weights = options.weights
        self._face: Any = None

    @property
    def face(self) -> Any:
        """The face model."""
        if self._face is None:
            from flowvqtalker.loading import load_face_model

            self._face = load_face_model(self.weights)
        return self._face

    def extractors(self) -> list[Extractor]:
        """Mesh and fit."""
        return [MeshExtractor(), FitExtractor(self.weights)]


class Coefficients(Fitted):
    """AED and APD."""

    name = "coefficients"
    columns = (
        Column("aed", "AED", "lower", 3, "mean |β̂ - β| over frames and 64 coefficients, standard deviations of faces"),
        Column("apd", "APD", "lower", 2, "mean absolute difference of pitch, yaw and roll, degrees"),
        Column("apd_translation", "APD t", "lower", 4, "the same of (tx, ty, tz), eye distances", extra=True),
    )

    def pair(self, both: Both) -> dict[str, float]:
        """From ``expression`` and ``pose``."""
        pose = motion.pose_distance(*both.paired("pose"))
        return {
            "aed": motion.expression_distance(*both.paired("expression")),
            "apd": pose.angles,
            "apd_translation": pose.translation,
        }


class Lips(Fitted):
    """LVE."""

    name = "lve"
    columns = (
        Column(
            "lve",
            "LVE",
            "lower",
            2,
            "largest error of a lip vertex in a frame, mean over frames, % of the eyes' distance",
        ),
    )

    def pair(self, both: Both) -> dict[str, float]:
        """From ``expression`` on the real clip's ``identity``."""
        identity = both.real.arrays["identity"]
        if not np.isfinite(identity).all():
            return {"lve": float("nan")}
        real, made = both.paired("expression")
        seen = np.isfinite(real).all(1) & np.isfinite(made).all(1)
        if not seen.any():
            return {"lve": float("nan")}
        shapes = [motion.shape(self.face, beta[seen], identity) for beta in (real, made)]
        return {"lve": motion.lip_vertex_error(*shapes)}


class Steadiness(Fitted):
    """Jitter, and how much the head moves."""

    name = "jitter"
    columns = (
        Column(
            "jitter", "Jitter", None, 2, "mean acceleration of the landmarks in the head's frame, eye distances / s²"
        ),
        Column(
            "jitter_bone", "Jitter bone", "lower", 2, "the same of landmarks over bone, which should rest", extra=True
        ),
        Column("head", "Head", None, 2, "standard deviation of pitch, yaw and roll within a clip, degrees", extra=True),
    )

    def pair(self, both: Both) -> dict[str, float]:
        """From ``mesh`` and ``pose`` of the generated clip."""
        mesh = both.made.arrays["mesh"]
        if not np.isfinite(mesh).all((1, 2)).any():
            return {}
        found = motion.landmark_jitter(mesh)
        return {
            "jitter": found["face"].acceleration,
            "jitter_bone": found["static"].acceleration,
            "head": float(motion.head_deviation(both.made.arrays["pose"]).mean()),
        }


class Blinks(Measure):
    """Blinks a minute over all clips."""

    name = "blinks"
    columns = (
        Column("blinks", "Blinks", None, 1, "a minute, over all clips together, from the lids' landmarks"),
    )  # fmt: skip

    def __init__(self, options: Options) -> None:
        del options

    def extractors(self) -> list[Extractor]:
        """The mesh."""
        return [MeshExtractor()]

    def start(self) -> Whole:
        """Of all clips."""
        return _BlinkSet()


class _BlinkSet:
    def __init__(self) -> None:
        self.closures: list[Array] = []

    def add(self, both: Both) -> None:
        mesh = both.made.arrays["mesh"]
        if np.isfinite(mesh).all((1, 2)).any():
            self.closures.append(motion.shut_from_landmarks(mesh))

    def result(self) -> dict[str, float]:
        return {"blinks": motion.blink_rate(self.closures) if self.closures else float("nan")}


class BeatExtractor(ClipExtractor):
    """Beats of the sound and of the head: ``audio_beats`` (n,), ``head_beats`` (m,), in frames."""

    name = "beats"
    needs: tuple[str, ...] = ("pose",)
    gives = ("audio_beats", "head_beats")

    def __init__(self, weights: str | Path | None = None) -> None:
        if importlib.util.find_spec("librosa") is None:  # to be known before anything is decoded
            raise MissingDependency("beats need librosa; run `pip install 'flowvqtalker[eval]'`")
        self._weights = weights
        self._model: Any = None

    def settings(self) -> Settings:
        """librosa's version and the scales of time."""
        from importlib.metadata import version

        from flowvqtalker_eval.metrics import beats

        return {"librosa": version("librosa"), "smoothing_frames": beats.SMOOTHING}

    def __call__(self, known: dict[str, Array], wave: npt.NDArray[np.float32] | None) -> dict[str, Array]:
        """Nothing where there is no sound, or no movement can be seen."""
        from flowvqtalker_eval.metrics import beats

        pose = known["pose"]
        nothing = np.zeros(0)
        pairs = np.asarray(np.isfinite(pose).all(1))
        if wave is None or len(pose) < 3 or not (pairs[1:] & pairs[:-1]).any():
            return {"audio_beats": nothing, "head_beats": nothing}
        if self._model is None:
            from flowvqtalker.loading import load_face_model

            self._model = load_face_model(self._weights)
        speed = beats.head_speed(self._model, pose)
        return {"audio_beats": beats.audio_beats(wave), "head_beats": beats.motion_beats(speed)}


class Beats(Fitted):
    """Beat alignment of head and speech."""

    name = "beats"
    columns = (
        Column("beat", "BA", "higher", 3, "beat alignment of head and speech onsets (Bailando's, at 25 fps)"),
        Column("beat_chance", "BA chance", None, 3, "BA of the same motion shifted at random", extra=True),
    )  # fmt: skip

    def extractors(self) -> list[Extractor]:
        """Beats, from the pose."""
        return [*super().extractors(), BeatExtractor(self.weights)]

    def settings(self) -> Settings:
        """The score's tolerance."""
        from flowvqtalker_eval.metrics import beats

        return {"tolerance_frames": beats.TOLERANCE}

    def pair(self, both: Both) -> dict[str, float]:
        """Of the generated clip."""
        from flowvqtalker_eval.metrics import beats

        audio, head = both.made.arrays["audio_beats"], both.made.arrays["head_beats"]
        if len(audio) == 0:
            return {}
        return {
            "beat": beats.beat_alignment(audio, head),
            "beat_chance": beats.chance(audio, head, both.made.frames),
        }


class Diversity(Fitted):
    """How far takes of one item with different seeds lie apart."""

    name = "diversity"
    columns = (
        Column("diversity_expression", "Div β", None, 2, "mean ‖β - β'‖ of takes with different seeds, over frames"),
        Column("diversity_pose", "Div ρ", None, 2, "the same of (pitch, yaw, roll), degrees"),
    )

    def start(self) -> Whole:
        """Of all takes."""
        return _TakeSet()


class _TakeSet:
    def __init__(self) -> None:
        self.takes: dict[str, list[tuple[Array, Array]]] = defaultdict(list)

    def add(self, both: Both) -> None:
        if both.pair.seed is not None and not both.same:
            arrays = both.made.arrays
            self.takes[both.pair.name].append((arrays["expression"], np.degrees(arrays["pose"][:, :3])))

    def result(self) -> dict[str, float]:
        groups = [takes for takes in self.takes.values() if len(takes) > 1]
        if not groups:
            return {}
        values = np.array([[motion.diversity([take[k] for take in takes]) for k in range(2)] for takes in groups])
        with np.errstate(invalid="ignore"):
            beta, rho = np.nanmean(values, axis=0)
        return {"diversity_expression": float(beta), "diversity_pose": float(rho)}


MEASURES: tuple[type[Any], ...] = (Coefficients, Lips, Steadiness, Blinks, Beats, Diversity)
