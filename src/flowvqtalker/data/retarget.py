"""Emotional versions of neutral talking clips: beta(t) + s(t) Delta_e (ours).

Few people are filmed both neutral and emotional, so a flow cannot learn from real clips what an emotion adds to a face.
Here it is added: prototypes of the emotions in ARKit blendshapes (after EMFACS), mixed with acted differences from the
actor's neutral (RAVDESS action units, if given), are solved for beta through the face model's blendshape map and its
vertices. Each clip draws its own: every blendshape varies in strength, the two sides differ a little, and s(t) has an
onset, an apex that follows the voice's energy, and at times a decay. A component of the mixture stays a distribution,
not one mask.

The mouth keeps its phonemes: a difference parts the lips by a small fixed distance or not at all.

References:
    Friesen and Ekman, EMFACS-7, 1983. Livingstone and Russo, RAVDESS, PLoS ONE 13(5), 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES, arkit_index
from flowvqtalker.face.model import FaceModel

__all__ = [
    "PROTOTYPES",
    "RetargetConfig",
    "Retargeter",
    "acted_differences",
    "emotion_of",
    "envelope",
    "solve_expression",
]

Floats = npt.NDArray[np.float32]

#: What an emotion adds to a neutral face, in ARKit blendshapes (both sides, unless one is named).
PROTOTYPES: Mapping[str, Mapping[str, float]] = {
    "angry": {
        **{"browDown": 1.2, "browInnerUp": -0.15, "browOuterUp": -0.15, "eyeSquint": 0.35, "noseSneer": 0.35},
        **{"mouthPress": 0.35, "mouthFrown": 0.35, "mouthSmile": -0.1, "mouthShrugLower": 0.2, "jawOpen": 0.15},
    },
    "disgusted": {
        **{"noseSneer": 0.8, "mouthUpperUp": 0.6, "browDown": 0.0, "eyeSquint": 0.3, "cheekSquint": 0.45},
        **{"mouthFrown": 0.3, "mouthShrugUpper": 0.3, "mouthShrugLower": 0.6, "mouthSmile": -0.05},
    },
    "fear": {
        **{"browInnerUp": 0.85, "browOuterUp": 0.35, "browDown": 0.05, "eyeWide": 0.6, "eyeSquint": -0.2},
        **{"eyeBlink": -0.15, "mouthStretch": 0.4, "mouthLowerDown": 0.2, "mouthSmile": -0.15, "mouthFrown": 0.1},
        **{"jawOpen": 0.25},
    },
    "happy": {"mouthSmile": 0.9, "cheekSquint": 0.6, "eyeSquint": 0.4, "mouthUpperUp": 0.35, "mouthDimple": 0.2},
    "sad": {
        **{"browInnerUp": 0.7, "browDown": 0.15, "browOuterUp": -0.25, "mouthFrown": 0.6, "mouthShrugLower": 0.5},
        **{"mouthPress": 0.15, "eyeBlink": 0.12, "eyeLookDown": 0.15, "mouthSmile": -0.15, "mouthRollLower": 0.1},
    },
    "surprised": {
        **{"browInnerUp": 0.9, "browOuterUp": 0.85, "browDown": -0.1, "eyeWide": 0.7, "eyeSquint": -0.2},
        **{"eyeBlink": -0.15, "jawOpen": 0.35, "mouthSmile": -0.1},
    },
    "contempt": {
        **{"mouthSmileLeft": 0.45, "mouthDimpleLeft": 0.5, "mouthPressLeft": 0.4, "mouthSmileRight": -0.05},
        **{"browOuterUpRight": 0.2, "eyeSquint": 0.2},
    },
}
#: Vertices that move together: how far right and down, relative to the group.
_GROUPS: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "corner": {61: (1, 1), 57: (0.8, 0.9), 186: (0.7, 0.5), 43: (0.8, 0.9)},
    "upper lip": {37: (1, 1), 39: (1, 1.1), 40: (1, 1.1), 0: (0, 0.9), 13: (0, 0.6), 185: (1, 0.5)},
    "nose": {48: (1, 1), 64: (1.5, 1.1), 98: (1.2, 1), 129: (0.8, 0.9), 206: (0, 1), 205: (0, 1)},
    "jaw": {152: (0, 1), 200: (0, 1), 17: (0, 0.9)},
    "upper lid": {159: (1, 1), 158: (1, 0.9), 160: (1, 0.9)},
    "lower lid": {145: (1, 1), 153: (1, 0.9), 144: (1, 0.9)},
}
#: What it also moves, where the blendshape map hardly sees it (nose, lids, corners of the mouth): group or vertex -> to
#: the right and down in eye distances. Of symmetric emotions the side left in the image is listed; :data:`_MIRROR` has
#: the other's. "neutral" is what the flow's neutral keeps of a smile.
_MOVES: Mapping[str, Mapping[str | int, tuple[float, float]]] = {
    "angry": {
        **{"corner": (0.0, 0.075), "upper lip": (0.0, -0.02), "nose": (-0.02, -0.025), "jaw": (0.0, 0.05)},
        **{107: (0.045, 0.085), 55: (0.052, 0.095), 66: (0.026, 0.068), 105: (0.008, 0.04)},
    },
    "disgusted": {
        **{"corner": (0.01, 0.1), "upper lip": (0, -0.05), "nose": (-0.02, -0.075), "jaw": (0, -0.02)},
        **{55: (0, 0.01), 107: (0, 0.005), 66: (0, 0), 105: (0, -0.01)},  # lowered brows are anger
    },
    "fear": {
        **{"corner": (-0.04, 0.11), "upper lid": (0, -0.055), "lower lid": (0, 0.008), "jaw": (0, 0.06)},
        **{55: (0.024, -0.08), 107: (0.024, -0.096)},
    },
    "happy": {"corner": (-0.11, -0.1), 50: (0.0, -0.04), 205: (-0.008, -0.048)},
    "sad": {
        **{"corner": (0.005, 0.085), 55: (0.024, -0.08), 107: (0.016, -0.08), 46: (0.0, 0.032), 53: (0.0, 0.024)},
        **{17: (0.0, -0.032), 84: (0.0, -0.032)},
    },
    "surprised": {
        **{"corner": (0.02, 0.08), "upper lid": (0, -0.045), "lower lid": (0, 0), "jaw": (0, 0.11)},
        **{55: (0.0, -0.096), 107: (0.0, -0.128), 105: (0.0, -0.128), 66: (0.0, -0.128)},
        **{52: (0.0, -0.112), 53: (0.0, -0.096)},
    },
    "contempt": {
        **{291: (0.08, -0.08), 287: (0.064, -0.072), 410: (0.064, -0.048), 273: (0.048, -0.064)},
        **{"corner": (0.0, 0.0)},  # one corner alone rises
    },
    "neutral": {"corner": (0, 0.055), 50: (0, 0.03), 205: (0.006, 0.03)},
}
#: How far it parts the lips, in eye distances; the others not at all. Times the mean strength this is about what real
#: clips show (0.03 to 0.06 more than neutral ones; in RAVDESS, AU25 and AU26 rise as well). More costs closed sounds.
_OPENING: Mapping[str, float] = {"angry": 0.05, "fear": 0.045, "happy": 0.025, "surprised": 0.065}
_MIRROR: Mapping[int, int] = {
    **{0: 0, 13: 13, 17: 17, 152: 152, 200: 200},  # in the middle
    **{37: 267, 39: 269, 40: 270, 43: 273, 46: 276, 48: 278, 50: 280, 52: 282, 53: 283, 55: 285, 57: 287, 61: 291},
    **{64: 294, 66: 296, 84: 314, 98: 327, 105: 334, 107: 336, 129: 358, 144: 373, 145: 374, 153: 380, 158: 385},
    **{159: 386, 160: 387, 185: 409, 186: 410, 205: 425, 206: 426},
}
#: Weight of a vertex beside a blendshape, both squared: 0.05 eye distances count as much as a blendshape of 1.1.
_MOVE_WEIGHT = 480.0
#: Weight of the lips' opening, squared.
_OPENING_WEIGHT = 4000.0
#: Action units of RAVDESS's clip means (OpenFace) and the blendshapes that show them; 0 to 5 becomes 0 to 1.7.
_UNITS: Mapping[str, str] = {
    **{"AU01": "browInnerUp", "AU02": "browOuterUp", "AU04": "browDown", "AU05": "eyeWide", "AU06": "cheekSquint"},
    **{"AU07": "eyeSquint", "AU09": "noseSneer", "AU10": "mouthUpperUp", "AU12": "mouthSmile", "AU14": "mouthDimple"},
    **{"AU15": "mouthFrown", "AU17": "mouthShrugLower", "AU20": "mouthStretch", "AU23": "mouthPress"},
}
_UNIT_SCALE = 3.0
#: RAVDESS's emotion codes, 1-based in the third field of a clip's name.
_CODES = ("neutral", "neutral", "happy", "sad", "angry", "fear", "disgusted", "surprised")
_FPS = 25


@dataclass(frozen=True)
class RetargetConfig:
    """How emotional clips are made of calm ones."""

    copies: int = 1
    """Emotional versions of each calm clip with speech, each of an emotion drawn anew; 0: none."""
    strength: tuple[float, float] = (1.1, 1.6)
    """Range of the apex, in prototypes."""
    acted: float = 0.25
    """Share of the difference that comes from RAVDESS's actors, where their action units are given."""
    vary: float = 0.25
    """Standard deviation of the logarithm of each blendshape's own strength."""
    one_sided: float = 0.08
    """Standard deviation of the difference between the two sides."""
    action_units: Path | None = None
    """RAVDESS's `clip_means.npz` (names, clips, means); None: prototypes alone."""


def _shape_vector(shapes: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """(52,) of names with or without a side."""
    vector = np.zeros(len(ARKIT_NAMES))
    for name, value in shapes.items():
        sides = [name] if name in ARKIT_NAMES else [f"{name}Left", f"{name}Right"]
        vector[[arkit_index(side) for side in sides]] = value
    return vector


def _both_sides(listed: Mapping[str | int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """The moves of the vertices, with those of the other side, if the side left in the image is listed."""
    moves: dict[int, tuple[float, float]] = {}
    for key, (right, down) in listed.items():
        group = {key: (1.0, 1.0)} if isinstance(key, int) else _GROUPS[key]
        moves |= {vertex: (x * right, y * down) for vertex, (x, y) in group.items()}
    mirrored = {_MIRROR[vertex]: (-right, down) for vertex, (right, down) in moves.items() if vertex in _MIRROR}
    middle = {vertex: (0.0, down) for vertex, (_, down) in moves.items() if _MIRROR.get(vertex) == vertex}
    return {**mirrored, **moves, **middle}


def _unit_vectors(names: Sequence[str]) -> npt.NDArray[np.float64]:
    """(n, 52) blendshapes per unit of intensity of action units ("AU04_r"); zeros for those without one."""
    shown = (_UNITS.get(name[:4]) for name in names)
    return np.stack([_shape_vector({} if name is None else {name: 1 / _UNIT_SCALE}) for name in shown])


def emotion_of(name: str) -> str:
    """Emotion of a recording of RAVDESS by its name; calm is neutral."""
    return _CODES[int(name.split("-")[2]) - 1]


def acted_differences(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Differences (n, 52) in blendshapes of RAVDESS's emotional clips from their actor's neutral, by emotion.

    Raises:
        UserError: if the file does not hold them.
    """
    try:
        with np.load(path) as file:
            names, clips, means = (file[key] for key in ("names", "clips", "means"))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no action units of RAVDESS ({error}); give clip_means.npz") from error
    turn = _unit_vectors([str(name) for name in names])
    fields = [str(clip).split("-") for clip in clips]
    emotion = np.array([emotion_of(str(clip)) for clip in clips])
    actor = np.array([field[6][:2] for field in fields])
    neutral = {one: means[(actor == one) & (emotion == "neutral")].mean(0) for one in set(actor)}
    found = {}
    for name in sorted(set(emotion) - {"neutral"}):
        rows = np.flatnonzero(emotion == name)
        found[name] = (means[rows] - np.stack([neutral[actor[row]] for row in rows])) @ turn
    return found


def solve_expression(
    face: FaceModel,
    shapes: npt.NDArray[np.floating],
    moves: Mapping[int, tuple[float, float]],
    ridge: float = 0.03,
    opening: tuple[Floats, float] | None = None,
) -> Floats:
    """Difference of beta (64,) that shows differences of blendshapes and moves vertices, by ridge regression.

    Arguments:
        face: the face model.
        shapes: (52,) differences of blendshapes.
        moves: vertex -> (right, down) in eye distances.
        ridge: penalty on the squared coefficients.
        opening: direction (64,) of beta whose product with beta parts the lips, and that product, which is then exact.
    """
    turn = face.arkit[:, :-1].cpu().numpy().astype(np.float64)
    weight = np.ones(len(turn))
    weight[[i for i, name in enumerate(ARKIT_NAMES) if name.startswith("eyeLook")]] = 0.2
    weight[[i for i, name in enumerate(ARKIT_NAMES) if name.startswith("jaw") or name == "mouthClose"]] = 1.5
    # Neutral is no expression, and the tracker reports hardly any sneer: its map would ask for the impossible.
    weight[[i for i, name in enumerate(ARKIT_NAMES) if name == "_neutral" or name.startswith("noseSneer")]] = 0
    rows = face.expression[:, list(moves), :2].flatten(1).T.cpu().numpy().astype(np.float64)
    design = np.concatenate([turn, rows])
    target = np.concatenate([np.asarray(shapes, np.float64), np.array(list(moves.values())).reshape(-1)])
    weight = np.concatenate([weight, np.full(len(rows), _MOVE_WEIGHT)])
    if opening is not None:
        design, target = np.vstack([design, opening[0]]), np.append(target, opening[1])
        weight = np.append(weight, _OPENING_WEIGHT)
    gram = design.T @ (design * weight[:, None]) + ridge * np.eye(design.shape[1])
    solved = np.linalg.solve(gram, design.T @ (weight * target))
    if opening is not None:
        gap, wanted = opening
        solved += (wanted - solved @ gap) / (gap @ gap) * gap
    return solved.astype(np.float32)


def envelope(length: int, energy: Floats | None, random: np.random.Generator) -> Floats:
    """Strength (T,) of an emotion over a clip, at most 1.15: onset, apex and decay, and more where the voice is loud.

    Arguments:
        length: T frames at 25 fps.
        energy: (T,) loudness of the voice, any unit; None: it plays no part.
        random: of everything that is random.
    """
    time = np.arange(length) / _FPS
    strength = np.ones(length)
    if random.random() < 0.4:  # most of a performance is apex: a clip shows the rise less often than not
        start, rise = random.uniform(-0.2, min(0.6, time[-1] / 2)), random.uniform(0.3, 0.7)
        strength *= _smooth((time - start) / rise)
    if random.random() < 0.2 and time[-1] > 0.8:
        start, fall = random.uniform(0.5, 1.0) * time[-1], random.uniform(0.5, 1.2)
        strength *= 1 - 0.7 * _smooth((time - start) / fall)
    if energy is not None and length > 8 and float(np.std(energy)) > 0:
        loud = np.convolve(np.pad((energy - energy.mean()) / energy.std(), 6, mode="edge"), np.ones(13) / 13, "valid")
        strength *= 1 + 0.15 * np.clip(loud, -1, 1)
    return strength.astype(np.float32)


def _smooth(x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    x = np.clip(x, 0, 1)
    step: npt.NDArray[np.floating] = x * x * (3 - 2 * x)
    return step


class Retargeter:
    """Draws what an emotion adds to a neutral clip.

    Arguments:
        face: face model of the coefficients.
        gap: (64,) whose product with beta is how far the lips are apart; None: differences open them as they like.
        config: see :class:`RetargetConfig`.
    """

    def __init__(self, face: FaceModel, gap: Floats | None, config: RetargetConfig | None = None) -> None:
        self.config = config or RetargetConfig()
        self._face = face
        self._gap = gap
        self._prototypes = {name: _shape_vector(PROTOTYPES.get(name, {})) for name in _MOVES}
        self._moves = {name: _both_sides(moves) for name, moves in _MOVES.items()}
        given = self.config.action_units
        self._acted = {} if given is None else acted_differences(given)

    def difference(self, emotion: str, random: np.random.Generator | None = None) -> Floats:
        """Difference (64,) of beta from neutral at the apex; without a generator the prototype itself."""
        target, moves, strength = self._prototypes[emotion], self._moves[emotion], 1.0
        if random is not None:
            config = self.config
            target = target * np.exp(config.vary * random.standard_normal(len(target)))
            acted = self._acted.get(emotion)
            if acted is not None:
                target = (1 - config.acted) * target + config.acted * acted[random.integers(len(acted))]
            lean = config.one_sided * random.standard_normal()
            sides = [lean if n.endswith("Left") else -lean if n.endswith("Right") else 0.0 for n in ARKIT_NAMES]
            target = target * (1 + np.array(sides))
            share = float(np.exp(config.vary * random.standard_normal()))
            moves = {vertex: (share * right, share * down) for vertex, (right, down) in moves.items()}
            strength = random.uniform(*config.strength)
        opening = None if self._gap is None else (self._gap, _OPENING.get(emotion, 0.0))
        beta: Floats = (strength * solve_expression(self._face, target, moves, opening=opening)).astype(np.float32)
        return beta

    def action_units(self, names: Sequence[str]) -> Floats:
        """Differences (n, 64) of beta that show one unit of intensity of action units; lips stay as far apart."""
        opening = None if self._gap is None else (self._gap, 0.0)
        return np.stack([solve_expression(self._face, one, {}, opening=opening) for one in _unit_vectors(names)])

    def __call__(
        self, frames: Floats, emotion: str, random: np.random.Generator, energy: Floats | None = None
    ) -> Floats:
        """An emotional version (T, 64) of a calm clip's beta (T, 64).

        Arguments:
            frames: the calm clip.
            emotion: a key of :data:`PROTOTYPES`.
            random: of everything that is random.
            energy: (T,) loudness of its speech.
        """
        strength = envelope(len(frames), energy, random)
        return (frames + strength[:, None] * self.difference(emotion, random)).astype(np.float32)

    def mean_differences(self, count: int = 60) -> dict[int, Floats]:
        """Mean difference (64,) of the emotions' apexes from neutral, by class number.

        Of neutral: what takes the rest of a smile off, which a portrait's texture and the data's neutral clips keep.
        """
        drawn = {
            name: [self.difference(name, np.random.default_rng([number])) for number in range(count)]
            for name in self.emotions()
        }
        means: dict[int, Floats] = {
            EMOTIONS.index(name): np.mean(values, 0, dtype=np.float32) for name, values in drawn.items()
        }
        return {**means, EMOTIONS.index("neutral"): self.difference("neutral")}

    def emotions(self) -> Sequence[str]:
        """The emotions that it can show, in the package's order."""
        return [name for name in EMOTIONS if name in PROTOTYPES]
