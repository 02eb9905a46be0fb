"""Stage ``motion-emotion``: which emotion a sequence of expression coefficients β shows, by logistic regression.

β is read through the face model's linear map to the ARKit blendshapes, without its clamp to [0, 1]: one unit means the
same everywhere on the face there, so unseen people are classified better than from β itself. The features are mean,
standard deviation and quantiles over time of each blendshape.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from flowvqtalker import weights
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import EXPRESSION, FaceModel
from flowvqtalker_eval.metrics.accuracy import CLASSES, score
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, Settings, Wave

__all__ = [
    "MIRRORED",
    "Config",
    "Labelled",
    "MotionEmotion",
    "MotionEmotionExtractor",
    "load_clips",
    "load_motion_emotion",
    "run",
]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

_QUANTILES = (0.1, 0.5, 0.9)
_SHORTEST = 12  # frames of a clip
_PER_PERSON = 2  # largest number of clips of one person and class, so that nobody dominates an accuracy
_SWAP = {name: name.replace("Left", "?").replace("Right", "Left").replace("?", "Right") for name in ARKIT_NAMES}
_REPORT = """# Emotion from expression coefficients

Pooled over the folds; nobody is in the training data of the model that classifies them.

"""
#: Number of the blendshape that each is in the mirror (``mouthSmileLeft`` is ``mouthSmileRight`` there).
MIRRORED = [ARKIT_NAMES.index(_SWAP[name]) if _SWAP[name] in ARKIT_NAMES else i for i, name in enumerate(ARKIT_NAMES)]


@dataclass(frozen=True)
class Config:
    """Configuration of the stage."""

    shards: tuple[Path, ...] = (Path("data/shard"),)
    """Folders of `flowvqtalker prepare`."""
    face_model: Path | None = None
    """Face model of the shards; None: the package's own."""
    l2: float = 0.1
    """Weight of half the squared coefficients beside the mean cross-entropy."""
    folds: int = 5
    """Folds by identity of the cross-validation before the final fit; 0: none."""


@dataclass(frozen=True)
class MotionEmotion:
    """The classifier: the map from β to blendshapes, mean and scale of the features, and the regression.

    Shapes: basis (64, 52), bias (52,), mean and scale (260,), coef (8, 260) and intercept (8,) in the order of CLASSES.
    """

    basis: Floats
    bias: Floats
    mean: Floats
    scale: Floats
    coef: Floats
    intercept: Floats

    def classify(self, expression: Floats) -> Floats:
        """Probabilities (8,) of a sequence (T, 64) of β, T of at least 1."""
        features = (statistics(expression, self.basis, self.bias) - self.mean) / self.scale
        return np.asarray(softmax(self.coef @ features + self.intercept), np.float32)


def statistics(expression: Floats, basis: Floats, bias: Floats) -> Floats:
    """Mean, standard deviation and quantiles over time (5 * 52,) of the blendshapes of β (T, 64).

    Raises:
        UserError: if the shape is another.
    """
    if expression.ndim != 2 or expression.shape[1] != EXPRESSION or not len(expression):
        raise UserError(f"expression of shape (T, {EXPRESSION}) is needed, got {expression.shape}")
    shapes = np.asarray(expression, np.float64) @ basis + bias
    return np.concatenate([shapes.mean(0), shapes.std(0), *np.quantile(shapes, _QUANTILES, axis=0)])


def load_motion_emotion(path: str | Path | None = None) -> MotionEmotion:
    """The trained classifier of a folder of weights (None: the package's own).

    Raises:
        UserError: if it is missing or does not fit.
    """
    tensors, _ = weights.load("motion_emotion", path)
    try:
        return MotionEmotion(**{name: tensor.double().numpy() for name, tensor in tensors.items()})
    except TypeError as error:
        raise weights.mismatch("motion_emotion", str(error), path) from error


@dataclass(frozen=True)
class Labelled:
    """Clips with a label.

    Attributes:
        labels: (n,) class numbers.
        identities: (n,) who each clip shows.
        measured: (n,) the clips that accuracies count: natural speech is learnt as neutral, but never measured.
    """

    labels: Ints
    identities: Array
    measured: npt.NDArray[np.bool_]

    def folds(self, count: int) -> list[tuple[Ints, Ints]]:
        """Numbers of the clips to train on and to test on; classes are spread evenly, people never split.

        Raises:
            UserError: if there are fewer people than folds, or fewer than two folds.
        """
        from sklearn.model_selection import StratifiedGroupKFold

        people = len(set(self.identities))
        if not 2 <= count <= people:
            raise UserError(f"folds must be at least 2 and at most the number of people ({people}), got {count}")
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
        return list(splitter.split(self.labels, self.labels, self.identities))


def load_clips(shards: tuple[Path, ...]) -> tuple[list[Floats], Labelled]:
    """β (T, 64) of labelled clips, and their labels; at most two of one person and emotion.

    Raises:
        UserError: if the clips show fewer than two emotions.
    """
    found = [
        (shard, int(number))
        for shard in map(Shard, shards)
        for number in shard.select(is_image=False, min_length=_SHORTEST)
        if shard.emotion[number] >= 0
    ]
    seen: Counter[tuple[str, int]] = Counter()
    kept = []
    for shard, number in found:
        key = str(shard.identity[number]), int(shard.emotion[number])
        seen[key] += 1
        if seen[key] <= _PER_PERSON:
            kept.append((shard, number, *key))
    emotions = np.array([emotion for *_, emotion in kept], np.int64)
    natural = emotions == EMOTIONS.index("natural")
    labels = np.where(natural, CLASSES.index("neutral"), emotions)
    if len(set(labels.tolist())) < 2:
        raise UserError("the shards hold clips of fewer than two emotions; label them in clips.csv and prepare again")
    clips: list[Floats] = [np.array(shard.expression[shard.rows(number)], np.float64) for shard, number, *_ in kept]
    return clips, Labelled(labels, np.array([who for _, _, who, _ in kept]), ~natural)


def fit(features: Floats, labels: Ints, l2: float) -> Any:
    """A scikit-learn pipeline fitted to clips and their mirror images, the classes balanced."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mirrored = features.reshape(len(features), -1, len(ARKIT_NAMES))[:, :, MIRRORED].reshape(features.shape)
    x, y = np.concatenate([features, mirrored]), np.tile(labels, 2)
    regression = LogisticRegression(C=1 / (l2 * len(x)), class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), regression).fit(x, y)


def run(config: Config, out: Path, resume: bool = False) -> dict[str, float]:
    """Cross-validate if asked to, then fit to the training split; writes ``weights.safetensors`` and ``report.md``."""
    from safetensors.numpy import save_file

    from flowvqtalker.loading import load_face_model

    face = FaceModel.load(config.face_model) if config.face_model is not None else load_face_model()
    basis, bias = face.arkit[:, :-1].mT.double().numpy(), face.arkit[:, -1].double().numpy()
    expressions, data = load_clips(config.shards)
    features = np.stack([statistics(one, basis, bias) for one in expressions])
    results: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    if config.folds:
        chances = np.zeros((len(features), len(CLASSES)))
        for train, held in data.folds(config.folds):
            model = fit(features[train], data.labels[train], config.l2)
            chances[np.ix_(held, model.classes_)] = model.predict_proba(features[held])
        counted = data.measured
        accuracy = score(data.labels[counted], chances[counted].argmax(1), data.identities[counted].tolist())
        (out / "report.md").write_text(f"{_REPORT}{accuracy.text()}", encoding="utf-8")
        (out / "report.json").write_text(json.dumps(accuracy.to_dict(), indent=1) + "\n", encoding="utf-8")
        logger.info("%s", accuracy.text())
        results = {"pooled": accuracy.accuracy, "pooled_balanced": accuracy.balanced}
    train = np.flatnonzero([split_of(who) == "train" for who in data.identities])
    scaler, regression = (step for _, step in fit(features[train], data.labels[train], config.l2).steps)
    if tuple(regression.classes_) != tuple(range(len(CLASSES))):
        raise UserError(f"the training split must show all of {', '.join(CLASSES)}; label more clips and prepare again")
    classifier = MotionEmotion(basis, bias, scaler.mean_, scaler.scale_, regression.coef_, regression.intercept_)
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in vars(classifier).items()}
    save_file(arrays, out / "weights.safetensors")
    about = {"stage": "motion-emotion", "step": 0, "scores": results, "config": {"l2": config.l2}}
    (out / "config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return results


class MotionEmotionExtractor(ClipExtractor):
    """``motion_emotion`` (8,): class probabilities from ``expression``; NaN without a face.

    Arguments:
        weights: folder of weights; None is that of the package.
    """

    name = "motion_emotion"
    needs: tuple[str, ...] = ("expression",)
    gives = ("motion_emotion",)

    def __init__(self, weights: Path | None = None) -> None:
        self._weights = weights

    def settings(self) -> Settings:
        return {"weights": weights.manifest(self._weights)["motion_emotion.safetensors"].sha256[:16]}

    def __call__(self, known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        if self._model is None:
            self._model = load_motion_emotion(self._weights)
        beta = known["expression"]
        beta = beta[np.isfinite(beta).all(1)]
        if not len(beta):
            return {"motion_emotion": np.full(len(CLASSES), np.nan, np.float32)}
        return {"motion_emotion": self._model.classify(beta)}
