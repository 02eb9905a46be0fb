"""Stage ``face-model``: learn the linear 3D morphable model from tracked faces (numpy; a minute on one core)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES, arkit_index, fit_arkit
from flowvqtalker.face.fit import Fitter, reprojection_error
from flowvqtalker.face.geometry import Floats, rotation_vectors, tangents, unproject
from flowvqtalker.face.model import EXPRESSION, IDENTITY, FaceModel
from flowvqtalker.face.topology import (
    EYE_CORNERS,
    INNER_LIPS,
    LEFT_EYE,
    LIDS,
    LIPS,
    MOUTH_CORNERS,
    RIGHT_EYE,
    RIGID,
    VERTICES,
    strip,
    surface_triangles,
)
from flowvqtalker.train.config import check, to_dict
from flowvqtalker.train.face_statistics import Group, remove_rigid, rigid_objects, separate
from flowvqtalker.train.face_tracks import Track, read_tracks

__all__ = ["Config", "evaluate", "learn", "run"]

_log = logging.getLogger(__name__)

# Turn of the head from one frame to the next, in radians.
_FAST_TURN = 0.03

_REPORTED = ("jawOpen", "mouthSmileLeft", "browDownLeft", "eyeBlinkLeft")


@dataclass(frozen=True)
class Config:
    """Configuration of the face model's stage."""

    tracks: tuple[Path, ...] = ()
    """Folders of .npz files as `flowvqtalker track --landmarks-only` writes them."""
    tables: tuple[Path, ...] = ()
    """CSV files with the columns file, identity, source."""
    frames: int = 48
    """Frames per clip: evenly spread pairs of neighbours."""
    clips: int = 150
    """Clips per source, so that large sources do not drown small ones."""
    source_share: float = 0.15
    """Largest share of one source in the statistics of the expression."""
    image_share: float = 0.15
    """Share of the single images in the statistics of the expression."""
    max_yaw: float = 35.0
    """Frames turned further (degrees) are left out: the tracker guesses the far cheek."""
    rounds: int = 1
    """Rounds of fitting with the model and learning it again; more than one changes nothing."""
    dimensions: int = 300
    """Size of the space in which identity and expression are separated; 300 keep 99.99 % of the variance."""
    noise: float = 0.003
    """Standard deviation of a landmark coordinate around the model, in distances between the outer eye corners; larger
    values make a fit rely more on the priors."""

    def __post_init__(self) -> None:
        check(
            (self.frames > 0, f"frames must be positive, got {self.frames}"),
            (self.clips > 0, f"clips must be positive, got {self.clips}"),
            (0 < self.source_share <= 1, f"source_share must be in (0, 1], got {self.source_share}"),
            (0 <= self.image_share <= 1, f"image_share must be in [0, 1], got {self.image_share}"),
            (self.rounds >= 0, f"rounds must not be negative, got {self.rounds}"),
            (self.dimensions >= IDENTITY, f"dimensions must be at least {IDENTITY}, got {self.dimensions}"),
            (self.noise > 0, f"noise must be positive, got {self.noise}"),
        )


def run(config: Config, out: Path, resume: bool = False) -> dict[str, float]:
    """Learn the model from the training split and measure it on the held-out identities.

    Writes into ``out``: ``weights.safetensors`` with ``config.json`` (for ``flowvqtalker weights-add``), the same
    weights as ``face_model.safetensors`` (for later stages), and ``report.json``.

    Returns:
        the report, see :func:`evaluate`.
    """
    del resume  # a minute of work starts again
    tracks = read_tracks(config.tracks, config.tables, frames=config.frames, clips=config.clips, max_yaw=config.max_yaw)
    kept = [track for track in tracks if track.split == "train"]
    held = [track for track in tracks if track.split == "val"]
    _log.info("%d clips and images of %d people", len(kept), len({track.identity for track in kept}))
    model = learn(kept, config)
    out.mkdir(parents=True, exist_ok=True)
    model.save(out / "weights.safetensors")
    model.save(out / "face_model.safetensors")
    report = evaluate(FaceModel.load(out / "face_model.safetensors"), held) if held else {}
    for name, value in report.items():
        _log.info("%-45s %.4f", name, value)
    # Names of the folders only: their paths would describe this machine.
    places = {key: [path.name for path in getattr(config, key)] for key in ("tracks", "tables")}
    about = {"stage": "face-model", "step": 0, "config": {**to_dict(config), **places}, "report": report}
    for name, content in (("config.json", about), ("report.json", report)):
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return report


def learn(tracks: Sequence[Track], config: Config) -> FaceModel:
    """Learn the model from all given tracks.

    Faces are unprojected and aligned by their rigid vertices, identity and expression are separated
    (:func:`~flowvqtalker.train.face_statistics.separate`), and their leading principal components become the bases.
    Fitting the model then gives better poses, which average the noise of the rigid vertices, for another round. Last,
    :func:`_decouple` moves what always accompanies the lips from the pose to the expression.

    Raises:
        UserError: if there are too few clips to learn from.
    """
    clips = sum(not track.is_image for track in tracks)
    faces = sum(len(track.landmarks) for track in tracks)
    if clips < 2 or faces <= config.dimensions:
        raise UserError(
            f"{faces} faces in {clips} clips are too few; give at least 2 clips and more faces than dimensions "
            f"({config.dimensions})"
        )
    people = {name: i for i, name in enumerate(sorted({track.identity for track in tracks}))}
    lengths = [len(track.landmarks) for track in tracks]
    owner = np.repeat([people[track.identity] for track in tracks], lengths)
    rigid = np.zeros(VERTICES, dtype=np.float32)
    rigid[list(RIGID)] = 1
    objects = rigid_objects(unproject(np.concatenate([track.landmarks for track in tracks])), owner, rigid)
    objects = objects.reshape(len(objects), -1)
    weights = _weights(tracks, config)
    model = _model(objects, tracks, people, weights, rigid, config)
    for _ in range(config.rounds):
        fitter = Fitter(model)
        parts = []
        for track in tracks:
            state, alpha = fitter.run(track.landmarks, None)
            parts.append(fitter.objects(track.landmarks, state, fitter.shape(alpha, state.beta)))
        model = _model(np.concatenate(parts), tracks, people, weights, rigid, config)
    model = _decouple(model, tracks, weights)
    expression = np.concatenate([Fitter(model).run(track.landmarks, None)[0].beta for track in tracks])
    shapes = np.concatenate([track.blendshapes for track in tracks])
    each = np.repeat(weights * [_count(track) for track in tracks] / np.array(lengths), lengths)
    model.arkit = torch.from_numpy(fit_arkit(expression, shapes, each)).float().contiguous()
    return model


def _count(track: Track) -> float:
    """Effective number of faces of a track; neighbouring frames are not independent."""
    return 1.0 if track.is_image else float(np.clip(len(track.landmarks) / 10, 1, 4))


def _weights(tracks: Sequence[Track], config: Config) -> Floats:
    """Weights of the tracks in the statistics of the expression, which limit each source to its share."""
    counts = np.array([_count(track) for track in tracks])
    sources = np.array(["" if track.is_image else track.source for track in tracks])
    moving = counts[sources != ""].sum()
    weights = np.ones(len(tracks))
    for source in np.unique(sources):
        share = config.source_share if source else config.image_share
        weights[sources == source] = min(1.0, share * moving / counts[sources == source].sum())
    return weights


def _model(
    objects: Floats, tracks: Sequence[Track], people: dict[str, int], weights: Floats, rigid: Floats, config: Config
) -> FaceModel:
    """The model (without its blendshape map) of aligned faces (N, V * 3)."""
    ends = np.cumsum([len(track.landmarks) for track in tracks])
    slices = [slice(end - len(track.landmarks), end) for end, track in zip(ends, tracks, strict=True)]
    middle = np.mean([objects[part].mean(0) for part in slices], axis=0)
    lengths = np.array([len(track.landmarks) for track in tracks])
    rest = (objects - middle) * np.sqrt(np.repeat(weights / lengths, lengths))[:, None].astype(objects.dtype)
    size = objects.shape[1]
    _, axes = scipy.linalg.eigh(rest.T @ rest, subset_by_index=(size - config.dimensions, size - 1))
    axes = axes[:, ::-1]
    reduced = ((objects - middle) @ axes).astype(np.float64)
    groups = []
    for track, part, weight in zip(tracks, slices, weights, strict=True):
        faces = np.concatenate([reduced[part], track.blendshapes], axis=1)
        mean = faces.mean(0)
        scatter = None if track.is_image else (faces - mean).T @ (faces - mean) / len(faces)
        groups.append(Group(people[track.identity], mean, scatter, _count(track), float(weight), track.is_image))
    found = separate(groups, config.dimensions)
    mean = (middle + axes @ found.mean).reshape(VERTICES, 3)
    unit = np.linalg.norm(mean[EYE_CORNERS[1]] - mean[EYE_CORNERS[0]])
    mean = mean / unit
    mean -= mean[list(RIGID)].mean(0)

    def basis(covariance: Floats, count: int) -> torch.Tensor:
        variance, vectors = np.linalg.eigh(covariance)
        deviations = np.sqrt(np.maximum(variance[: -count - 1 : -1], 0))
        columns = (vectors[:, : -count - 1 : -1] * deviations).T @ axes.T / unit
        columns = remove_rigid(columns, tangents(mean), rigid)
        # Fix the free sign of a principal component: the vertex that moves most moves right or down.
        largest = np.abs(columns).argmax(1)
        columns *= np.sign(columns[np.arange(count), largest])[:, None]
        return torch.from_numpy(columns.reshape(count, VERTICES, 3))

    return FaceModel(
        torch.from_numpy(mean),
        basis(found.between, IDENTITY),
        basis(found.within, EXPRESSION),
        torch.zeros(len(ARKIT_NAMES), EXPRESSION + 1),
        torch.from_numpy(surface_triangles()),
        torch.from_numpy(strip(INNER_LIPS)),
        torch.from_numpy(np.concatenate([strip(RIGHT_EYE), strip(LEFT_EYE)])),
        config.noise,
    )


def _decouple(model: FaceModel, tracks: Sequence[Track], weights: Floats) -> FaceModel:
    """Move to the expression the motion of the whole mesh that accompanies an opening mouth.

    MediaPipe's mesh nods when the jaw opens: from frame to frame, pitch and lip opening correlate by -0.1 to -0.7, even
    for a pose from forehead and nose alone. Heads do not nod with every vowel, so what a linear regression on the
    change of the mouth's opening and width predicts moves from the pose to the basis; their common span stays. (A
    regression on all of β would also take real nods, because MediaPipe's faces change their shape with the pitch.)
    """
    fitter = Fitter(model)
    shape = model.expression.numpy()
    # Opening and width of the mouth as linear functions of β: (64, 2).
    top, bottom, (near, far) = INNER_LIPS[5], INNER_LIPS[15], MOUTH_CORNERS
    mouth = np.stack([shape[:, bottom, 1] - shape[:, top, 1], shape[:, far, 0] - shape[:, near, 0]], axis=1)
    gram, cross = 1e-9 * np.eye(2), np.zeros((2, 7))
    for track, weight in zip(tracks, weights, strict=True):
        pairs = np.flatnonzero(np.diff(track.frames) == 1)
        if not len(pairs):
            continue
        state, _ = fitter.run(track.landmarks, None)
        step = np.diff(state.beta @ mouth, axis=0)[pairs]
        first = state.rotation[pairs]
        shift = np.einsum("tij,ti->tj", first, np.diff(state.shift, axis=0)[pairs]) / state.scale[pairs, None]
        turn = rotation_vectors(np.swapaxes(first, 1, 2) @ state.rotation[pairs + 1])
        moved = np.concatenate([turn, shift, np.diff(np.log(state.scale))[pairs, None]], axis=1)
        # Pairs in which the head itself turns fast are unreliable.
        trust = weight / len(pairs) / (1 + (np.linalg.norm(turn, axis=1, keepdims=True) / _FAST_TURN) ** 2)
        gram += (step * trust).T @ step
        cross += (step * trust).T @ moved
    coupling = mouth @ np.linalg.solve(gram, cross)
    _log.info("pose by mouth opening and width: %s", np.linalg.solve(gram, cross).round(3).tolist())
    model.expression += torch.from_numpy((coupling @ tangents(fitter.mean)).reshape(shape.shape)).float()
    return model


def evaluate(model: FaceModel, tracks: Sequence[Track]) -> dict[str, float]:
    """Measure a model on people it was not learned from.

    Returns:
        ``explained_expression_variance``: share of the variance of aligned clips around their person's mean face that
        the 64 components span, without motion of the whole head, people weighted equally (``_worst_person``: the
        lowest); ``reprojection_error``: mean over clips and images in distances between the outer eye corners
        (``_clips``, ``_images``, ``_lips``, ``_lids``: of parts); ``r2_NAME``: blendshapes predicted from β.
    """
    fitter = Fitter(model)
    whole_head = np.linalg.qr(tangents(fitter.mean).T.astype(np.float64))[0]
    span = np.linalg.qr(_without(fitter.expression.astype(np.float64), whole_head).T)[0]
    moving: dict[str, list[Floats]] = {}
    errors: dict[str, list[float]] = {"clips": [], "images": [], "lips": [], "lids": []}
    expressions, shapes = [], []
    for track in tracks:
        state, alpha = fitter.run(track.landmarks, None)
        pose = fitter.pose(state)
        for name, part in (("", None), ("lips", LIPS), ("lids", LIDS)):
            error = reprojection_error(model, track.landmarks, alpha, state.beta, pose, part)
            errors[name or ("images" if track.is_image else "clips")].append(float(error.mean()))
        if not track.is_image:
            objects = fitter.objects(track.landmarks, state, fitter.shape(alpha, state.beta))
            moving.setdefault(track.identity, []).append(objects.astype(np.float64))
        expressions.append(state.beta)
        shapes.append(track.blendshapes)
    report: dict[str, float] = {"people": float(len({track.identity for track in tracks}))}
    if moving:
        whole, rest, worst = 0.0, 0.0, 1.0
        for clips in moving.values():
            faces = np.concatenate(clips)
            faces = _without(faces - faces.mean(0), whole_head)
            left = _without(faces, span)
            whole += (faces**2).mean()
            rest += (left**2).mean()
            worst = min(worst, 1 - (left**2).sum() / (faces**2).sum())
        report["people_in_clips"] = float(len(moving))
        report["explained_expression_variance"] = 1 - rest / whole
        report["explained_expression_variance_worst_person"] = float(worst)
    report["reprojection_error"] = float(np.mean(errors["clips"] + errors["images"]))
    report.update({f"reprojection_error_{name}": float(np.mean(values)) for name, values in errors.items() if values})
    predicted = model.blendshapes(torch.from_numpy(np.concatenate(expressions))).numpy()
    seen = np.concatenate(shapes)
    for name in _REPORTED:
        i = arkit_index(name)
        report[f"r2_{name}"] = float(1 - ((predicted[:, i] - seen[:, i]) ** 2).mean() / max(seen[:, i].var(), 1e-12))
    return report


def _without(rows: Floats, span: Floats) -> Floats:
    """Rows (N, D) minus their projection on orthonormal columns (D, K)."""
    return rows - (rows @ span) @ span.T
