"""Scores of generated motion beside the real clip, before any picture is made; and two baselines for them.

Landmark distances are those of the ``eat`` protocol (:mod:`flowvqtalker_eval.metrics.lmd`), computed from coefficients: the
face model is posed and shaped as in the real clip (true ρ and α), once with the true β and once with the generated β,
and projected; 68 of its vertices stand for dlib's points (:data:`flowvqtalker_eval.metrics.landmarks68.MESH68`) and are
aligned and centred as the protocol does. The unit is the protocol's, pixels of the 128-pixel crop. Head motion and
identity cost nothing here, and neither do errors of rendering and detection: it is what the expression alone
contributes, less than the same motion gets when it is measured on videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS, RIGID
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker_eval.metrics import beats, motion

__all__ = ["LandmarkDistance", "NearestSpeech", "coefficient_landmarks", "coefficient_lmd", "motion_scores"]

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LandmarkDistance:
    """M-LMD and F-LMD in pixels of the 128-pixel crop, means over frames."""

    mouth: float
    face: float


def coefficient_landmarks(face: FaceModel, alpha: Array, beta: Array, rho: Array) -> Array:
    """The 68 landmarks (T, 68, 2) of α (80,), β (T, 64) and ρ (T, 6) in pixels of the 512-pixel crop."""
    from flowvqtalker_eval.metrics.landmarks68 import mesh68

    with torch.inference_mode():
        a, b, r = (torch.as_tensor(np.asarray(x, np.float32)) for x in (alpha, beta, rho))
        mesh = face.project(a, b, r).numpy()
    return mesh68(mesh)


def coefficient_lmd(face: FaceModel, alpha: Array, rho: Array, real: Array, made: Array) -> LandmarkDistance:
    """M-LMD and F-LMD of generated expression on the true pose and identity.

    Arguments:
        face: the face model.
        alpha: (80,) true identity.
        rho: (T, 6) true pose.
        real, made: (T, 64) true and generated β.
    """
    from flowvqtalker_eval.metrics.align import align68
    from flowvqtalker_eval.metrics.lmd import landmark_distance

    if not len(real) == len(made) == len(rho) > 0:
        lengths = f"{len(real)}, {len(made)} and {len(rho)}"
        raise UserError(f"true and generated expression and the pose must be equally long, got {lengths} frames")
    theirs, ours = (align68(coefficient_landmarks(face, alpha, beta, rho)) for beta in (real, made))
    return LandmarkDistance(*landmark_distance(theirs, ours))


def motion_scores(
    face: FaceModel, real: Coefficients, takes: Sequence[Coefficients], wave: Array | None
) -> dict[str, float]:
    """Scores of one clip: of its takes, means over them, and beside them what the real clip has.

    Arguments:
        face: the face model of the coefficients.
        real: the real clip, at 25 fps, with its identity.
        takes: motion generated for the same speech with several seeds, as many frames each.
        wave: the speech (S,) at 16 kHz; None leaves out what needs it.

    Returns:
        numbers by name; NaN where a measure does not apply (one take has no diversity, silence has no beat). Of
        ratios, generated / real.
    """
    if not takes:
        raise UserError("there is no take to score; give at least one")
    truth = motion.shape(face, real.expression, real.identity)
    opening = motion.lip_opening(face, real.expression)
    found: list[dict[str, float]] = []
    for take in takes:
        lmd = coefficient_lmd(face, real.identity, real.pose, real.expression, take.expression)
        pose = motion.pose_distance(real.pose, take.pose)
        own = motion.lip_opening(face, take.expression)
        made = motion.shape(face, take.expression, real.identity)
        shaking = motion.jitter(made)
        scores = {
            "M-LMD": lmd.mouth,
            "F-LMD": lmd.face,
            "lip-vertex error (%)": motion.lip_vertex_error(truth, made),
            "AED": motion.expression_distance(real.expression, take.expression),
            "AED L2": motion.expression_distance(real.expression, take.expression, norm=2),
            "APD angles (deg)": pose.angles,
            "APD translation": pose.translation,
            "opening generated-real": motion.correlation(own, opening),
            "opening range generated/real": _ratio(own.std(), opening.std()),
            "speed generated/real": _ratio(motion.speed(take.expression), motion.speed(real.expression)),
            "jitter acceleration generated": shaking.acceleration,
            "jitter jerk generated": shaking.jerk,
            "jitter static generated": motion.jitter(made[:, list(RIGID)]).acceleration,
            "head angle std generated (deg)": float(motion.head_deviation(take.pose).mean()),
        }
        found.append({**scores, **_heard(face, take, wave, "generated")})
    with np.errstate(invalid="ignore"):
        mean = {name: _nanmean([scores[name] for scores in found]) for name in found[0]}
    shaking = motion.jitter(truth)
    return {
        **mean,
        "jitter acceleration real": shaking.acceleration,
        "jitter jerk real": shaking.jerk,
        "jitter static real": motion.jitter(truth[:, list(RIGID)]).acceleration,
        "head angle std real (deg)": float(motion.head_deviation(real.pose).mean()),
        **_heard(face, real, wave, "real"),
        "diversity expression": motion.diversity([take.expression for take in takes]),
        "diversity pose": motion.diversity([take.pose for take in takes]),
        "diversity eyes": motion.diversity([motion.eye_closure(face, take.expression) for take in takes]),
    }


def _heard(face: FaceModel, clip: Coefficients, wave: Array | None, name: str) -> dict[str, float]:
    """What ties a clip to its sound."""
    if wave is None or len(clip) < 4:
        return {}
    level = beats.loudness(wave)
    count = min(len(level), len(clip))
    opening = motion.lip_opening(face, clip.expression)[:count]
    audio = beats.audio_beats(wave)
    head = beats.motion_beats(beats.head_speed(face, clip.pose))
    lips = beats.motion_beats(beats.point_speed(motion.shape(face, clip.expression)[:, list(LIPS)]))
    return {
        f"opening-loudness {name}": motion.correlation(opening, level[:count]),
        f"beat alignment head {name}": beats.beat_alignment(audio, head),
        f"beat alignment head {name}, by chance": beats.chance(audio, head, len(clip)),
        f"beat alignment lips {name}": beats.beat_alignment(audio, lips),
        f"beat alignment lips {name}, by chance": beats.chance(audio, lips, len(clip)),
    }


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 1e-9 else float("nan")


def _nanmean(values: list[float]) -> float:
    kept = [value for value in values if np.isfinite(value)]
    return float(np.mean(kept)) if kept else float("nan")


class NearestSpeech:
    """Baseline: the expression of the training clip that sounds most alike, piece by piece.

    Speech is cut into pieces of eight frames that overlap by half. For each, the piece of the training clips whose
    log-mel (20 bands, two columns a frame, each band's mean over its clip taken off) has the least Euclidean distance
    is looked up, and their expressions are faded into one another.

    Arguments:
        clips: (wave, expression) of the training clips: (T * 640,) at 16 kHz and (T, 64).
        step: frames from one piece that is searched to the next.
    """

    LENGTH, HOP, BANDS = 8, 4, 20

    def __init__(self, clips: Iterable[tuple[Array, Array]], step: int = 2) -> None:
        pieces, places = [], []
        expressions: list[Array] = []
        start = 0
        for wave, expression in clips:
            feature = self._features(wave)[: len(expression)]
            for t in range(0, min(len(feature), len(expression)) - self.LENGTH + 1, step):
                pieces.append(feature[t : t + self.LENGTH].ravel().astype(np.float16))
                places.append(start + t)
            expressions.append(np.asarray(expression, np.float32))
            start += len(expression)
        if not pieces:
            raise UserError(f"no training clip has {self.LENGTH} frames of speech to search")
        self._pieces = np.stack(pieces)
        self._places = np.array(places)
        self._expression = np.concatenate(expressions)

    def _features(self, wave: Array) -> Array:
        """(T, 40) of speech."""
        from flowvqtalker.speech.features import log_mel

        mel = log_mel(np.asarray(wave, np.float32)).reshape(-1, self.BANDS, 80 // self.BANDS).mean(-1)
        mel = mel - mel.mean(0)
        frames = np.arange(-(-len(wave) // 640))
        columns = [np.minimum((frames * 3.2 + shift).astype(int), len(mel) - 1) for shift in (0, 1.6)]
        feature: Array = np.concatenate([mel[column] for column in columns], axis=1)
        return feature

    def __call__(self, wave: Array) -> npt.NDArray[np.float32]:
        """Expression (T, 64) for speech (S,); T = ceil(S / 640)."""
        feature = self._features(wave)
        count = len(feature)
        if count < self.LENGTH:
            feature = np.pad(feature, ((0, self.LENGTH - count), (0, 0)), mode="edge")
        starts = [*range(0, len(feature) - self.LENGTH, self.HOP), len(feature) - self.LENGTH]
        wanted = np.stack([feature[t : t + self.LENGTH].ravel() for t in starts]).astype(np.float32)
        nearest = self._search(wanted)
        total, weight = np.zeros((len(feature), 64)), np.zeros((len(feature), 1))
        fade = np.minimum(np.arange(self.LENGTH), np.arange(self.LENGTH)[::-1])[:, None] + 0.5
        for t, place in zip(starts, self._places[nearest], strict=True):
            total[t : t + self.LENGTH] += fade * self._expression[place : place + self.LENGTH]
            weight[t : t + self.LENGTH] += fade
        return (total / weight)[:count].astype(np.float32)

    def _search(self, wanted: npt.NDArray[np.float32], block: int = 8192) -> npt.NDArray[np.intp]:
        """Number of the nearest stored piece of each of (Q, F), in memory bounded by the block."""
        best, index = np.full(len(wanted), np.inf), np.zeros(len(wanted), np.intp)
        for start in range(0, len(self._pieces), block):
            part = self._pieces[start : start + block].astype(np.float32)
            squared = (part**2).sum(1) - 2 * wanted @ part.T
            here = squared.argmin(1)
            value = squared[np.arange(len(wanted)), here]
            index = np.where(value < best, start + here, index)
            best = np.minimum(value, best)
        return index
