"""Scores of generated motion beside the real clip, before any image is made; and a baseline.

Landmark distances are those of the ``eat`` protocol (``flowvqtalker_eval.metrics.motion``), from coefficients:
the face model has the real clip's pose and identity (true ρ and α), once with the true β and once with the generated
one. 68 of its projected vertices stand for dlib's points and are aligned as the protocol does. The unit is the
protocol's, pixels of the 128-pixel crop. It is what expression alone contributes: head motion and identity cost
nothing, nor do errors of rendering and detection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS, RIGID
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.speech.features import log_mel
from flowvqtalker_eval.metrics import beats, motion
from flowvqtalker_eval.metrics.align import align68
from flowvqtalker_eval.metrics.analysis import Array
from flowvqtalker_eval.metrics.landmarks68 import mesh68
from flowvqtalker_eval.metrics.motion import landmark_distance

__all__ = ["NearestSpeech", "coefficient_lmd", "correlation", "eye_closure", "motion_scores"]


def coefficient_lmd(face: FaceModel, alpha: Array, rho: Array, real: Array, generated: Array) -> tuple[float, float]:
    """M-LMD and F-LMD of generated expression on the true pose and identity.

    Arguments:
        face: the face model.
        alpha: (80,) true identity.
        rho: (T, 6) true pose.
        real, generated: (T, 64) true and generated β.
    """
    if not len(real) == len(generated) == len(rho) > 0:
        lengths = f"{len(real)}, {len(generated)} and {len(rho)}"
        raise UserError(f"true and generated expression and the pose must be equally long, got {lengths} frames")
    points = []
    for beta in (real, generated):
        with torch.inference_mode():
            mesh = face.project(*(torch.as_tensor(np.asarray(x, np.float32)) for x in (alpha, beta, rho)))
        points.append(align68(mesh68(mesh.numpy())))
    return landmark_distance(*points)


def speed(values: Array, fps: float = FPS) -> float:
    """Mean Euclidean distance that (T, D) moves per second; NaN for a single frame."""
    return motion.finite_mean(np.linalg.norm(np.diff(np.asarray(values, np.float64), axis=0), axis=1)) * fps


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two (T,); 0 if one of them does not move."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-9 and b.std() > 1e-9 else 0.0


def lip_opening(face: FaceModel, beta: Array) -> Array:
    """(T,) distance by which β parts the middles of the inner lips (vertices 13 and 14), beyond the mean face's."""
    gap = face.expression[:, 14, 1] - face.expression[:, 13, 1]
    return np.asarray(np.asarray(beta) @ gap.numpy())


def eye_closure(face: FaceModel, beta: Array) -> Array:
    """(T,) mean of the two ``eyeBlink`` blendshapes of β (T, 64), not clamped."""
    lids = face.arkit[[arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]].mean(0).numpy()
    return np.asarray(np.asarray(beta) @ lids[:-1] + lids[-1])


def motion_scores(
    face: FaceModel, real: Coefficients, samples: Sequence[Coefficients], wave: Array | None
) -> dict[str, float]:
    """Scores of one clip: means over its samples, and beside them what the real clip has.

    Arguments:
        face: the face model of the coefficients.
        real: the real clip at 25 fps, with its identity.
        samples: motion generated for the same speech with several seeds, as many frames each.
        wave: the speech (S,) at 16 kHz; None leaves out what needs it.

    Returns:
        numbers by name; NaN where one does not apply (a single sample has no diversity, silence no beat).
    """
    if not samples:
        raise UserError("there is no sample to score; give at least one")
    truth = motion.shape(face, real.expression, real.identity)
    opening = lip_opening(face, real.expression)
    found = []
    for sample in samples:
        mouth, whole = coefficient_lmd(face, real.identity, real.pose, real.expression, sample.expression)
        pose = motion.pose_distance(real.pose, sample.pose)
        own = lip_opening(face, sample.expression)
        generated = motion.shape(face, sample.expression, real.identity)
        scores = {
            "M-LMD": mouth,
            "F-LMD": whole,
            "lip-vertex error (%)": motion.lip_vertex_error(truth, generated),
            "AED": motion.expression_distance(real.expression, sample.expression),
            "AED L2": motion.expression_distance(real.expression, sample.expression, norm=2),
            "APD angles (deg)": pose.angles,
            "APD translation": pose.translation,
            "opening generated-real": correlation(own, opening),
            "opening range generated/real": _ratio(own.std(), opening.std()),
            "speed generated/real": _ratio(speed(sample.expression), speed(real.expression)),
        }
        found.append({**scores, **_of_clip(face, sample, generated, wave, "generated")})
    expressions = [sample.expression for sample in samples]
    return {
        **{name: _nanmean([scores[name] for scores in found]) for name in found[0]},
        **_of_clip(face, real, truth, wave, "real"),
        "diversity expression": motion.diversity(expressions),
        "diversity pose": motion.diversity([sample.pose for sample in samples]),
        "diversity eyes": motion.diversity([eye_closure(face, beta) for beta in expressions]),
    }


def _of_clip(face: FaceModel, clip: Coefficients, shape: Array, wave: Array | None, name: str) -> dict[str, float]:
    """How a clip moves, whatever the real one does, and how it goes with its sound."""
    found = {
        f"jitter acceleration {name}": motion.jitter(shape),
        f"jitter jerk {name}": motion.jitter(shape, 3),
        f"jitter static {name}": motion.jitter(shape[:, list(RIGID)]),
        f"head angle std {name} (deg)": float(motion.head_deviation(clip.pose).mean()),
    }
    if wave is None or len(clip) < 4:
        return found
    level = beats.loudness(wave)
    count = min(len(level), len(clip))
    audio = beats.audio_beats(wave)
    found[f"opening-loudness {name}"] = correlation(lip_opening(face, clip.expression)[:count], level[:count])
    lips = motion.shape(face, clip.expression)[:, list(LIPS)]
    for part, speed in (("head", beats.head_speed(face, clip.pose)), ("lips", beats.point_speed(lips))):
        moved = beats.motion_beats(speed)
        found[f"beat alignment {part} {name}"] = beats.beat_alignment(audio, moved)
        found[f"beat alignment {part} {name}, by chance"] = beats.chance(audio, moved, len(clip))
    return found


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 1e-9 else float("nan")


def _nanmean(values: list[float]) -> float:
    kept = [value for value in values if np.isfinite(value)]
    return float(np.mean(kept)) if kept else float("nan")


class NearestSpeech:
    """Baseline: the expression of the training clip that sounds most alike, piece by piece.

    Speech is cut into pieces of eight frames that overlap by half. The expression of each is that of the training piece
    with the nearest log-mel (20 bands, two columns per frame, each band less its mean over the clip); consecutive
    pieces are cross-faded.

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
        mel = log_mel(np.asarray(wave, np.float32)).reshape(-1, self.BANDS, 80 // self.BANDS).mean(-1)
        mel = mel - mel.mean(0)
        frames = np.arange(-(-len(wave) // 640))
        columns = [np.minimum((frames * 3.2 + shift).astype(int), len(mel) - 1) for shift in (0, 1.6)]
        feature: Array = np.concatenate([mel[column] for column in columns], axis=1)
        return feature

    def __call__(self, wave: Array) -> Array:
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

    def _search(self, wanted: Array, block: int = 8192) -> Array:
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
