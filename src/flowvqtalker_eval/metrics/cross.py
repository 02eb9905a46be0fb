"""Cross-identity animation on held-out people: one person's portrait driven by another person's clip.

The portrait's coefficients (β_0, ρ_0) are moved by how the driver differs from the first frame of the clip (β_t - β_1,
ρ_t - ρ_1; depth by its ratio), within the limits of training. There is no picture to compare with, so what is measured
is whether the face is still the portrait's (CSIM) and whether it does what it was told:

- AED, APD: the commanded coefficients against those of the generated frames, tracked and fitted on the portrait's own
  identity. All 64 components of β count alike, in standard deviations, though most move no landmark by a pixel, so AED
  is mostly the fit's noise; therefore beside it
- the landmarks' error: how far the tracked landmarks moved since the portrait, against how far the commanded vertices
  did: mean over landmarks and frames of |(L_t - L_0) - (P_t - P_0)|, the mean over the landmarks taken off both (what
  moves all alike is the pose). The copied portrait's is the size of the motion itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.data.pairs import clamp_pose
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.fit import fit
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS
from flowvqtalker.io.media import Picture
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics import motion as measures
from flowvqtalker_eval.metrics.analysis import Settings
from flowvqtalker_eval.metrics.codebook_scores import spread
from flowvqtalker_eval.metrics.identity import COLUMN as CSIM
from flowvqtalker_eval.metrics.identity import csim_to_portrait, same_person
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.metrics.stability import drive
from flowvqtalker_eval.report import Column, Row, Table

__all__ = ["COPY", "DRIVER", "CrossAnimation", "CrossClip", "CrossScores", "transfer"]

Floats = npt.NDArray[np.float32]

#: Rows beside the generators' own: the portrait repeated, and the driver's real frames.
COPY, DRIVER = "copied portrait", "driver's own frames"

_TURN = 0.13, 0.15  # least and most relative change of depth


def transfer(start: Floats, driver: Floats) -> Floats:
    """Coefficients (T, 70) of a portrait that moves as a driver does.

    Arguments:
        start: (70,) of the portrait.
        driver: (T, 70) of the driver's clip.
    """
    if start.shape != (70,) or driver.ndim != 2 or driver.shape[1] != 70 or not len(driver):
        raise UserError(f"coefficients are (70,) and (T, 70), got {start.shape} and {driver.shape}")
    change = driver - driver[0]
    moved = start + change
    moved[:, :64] = np.clip(moved[:, :64], -5, 5)
    moved[:, 64:] = clamp_pose(moved[:, 64:])
    moved[:, 69] = start[69] * np.clip(driver[:, 69] / driver[0, 69], 1 - _TURN[0], 1 + _TURN[1])
    return np.asarray(moved, np.float32)


@dataclass(frozen=True)
class CrossClip:
    """One portrait driven by one clip.

    Attributes:
        name: of the portrait and of the clip.
        portrait: (512, 512, 3).
        alpha: (80,) the portrait's identity; start: (70,) its coefficients.
        commanded: (n, 70) coefficients of the frames that were made.
        driver: n real frames of the driver, its identity (80,) and its coefficients (n, 70).
        images: n frames by each method.
    """

    name: str
    portrait: Picture
    alpha: Floats
    start: Floats
    commanded: Floats
    driver: tuple[Sequence[Picture], Floats, Floats]
    images: Mapping[str, Sequence[Picture]]


@dataclass(frozen=True)
class _Portrait:
    name: str
    identity: str
    portrait: Picture
    alpha: Floats
    start: Floats


class CrossAnimation:
    """Held-out portraits, each driven by the clip of another held-out person.

    Arguments:
        shard: folder of a shard with pictures.
        face: the face model with which the shard was made.
        generators: by name.
        pairs: at most so many, drivers in turn, portraits drawn without repetition as long as there are any.
        frames: at most so many frames of each clip, of those that the shard stores.
        warped: names of generators whose warped portrait I_w becomes a method of its own.
        device, dtype: where and with which floating point type the generators run.
    """

    def __init__(
        self,
        shard: str | Path,
        face: FaceModel,
        generators: Mapping[str, VQIG],
        *,
        pairs: int = 12,
        frames: int = 8,
        warped: tuple[str, ...] = (),
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if not generators:
            raise UserError("no image generator was given; name at least one")
        if pairs < 1 or frames < 1:
            raise UserError(f"at least one pair and one frame are needed, got {pairs} and {frames}")
        self.shard, self.face, self.generators = Shard(shard), face, dict(generators)
        self.frames, self.warped, self.device, self.dtype = frames, warped, device, dtype
        self.methods = (COPY, *(f"I_w of {name}" for name in warped), *self.generators)
        self.pairs = self._choose(pairs)
        if not self.pairs:
            raise UserError(f"shard {shard} has no portrait and clip of two held-out people; prepare another")

    def _choose(self, count: int) -> list[tuple[int, int]]:
        """(number of the portrait's picture, clip that drives it)."""
        shard = self.shard
        held = np.flatnonzero(shard.split[shard.image_clip] == "val")
        people: dict[str, int] = {}
        for number in held:
            people.setdefault(str(shard.identity[shard.image_clip[number]]), int(number))
        clips = [int(c) for c in np.unique(shard.image_clip[held]) if not shard.picture[c] and shard.length[c] > 1]
        drivers = [clips[i] for i in spread([str(shard.identity[c]) for c in clips], count)]
        names = sorted(people)
        waiting: list[str] = []
        rng, found = np.random.default_rng(0), []
        for clip in drivers:
            if not any(name != shard.identity[clip] for name in waiting):
                waiting = [names[i] for i in rng.permutation(len(names))]
            portrait = next((name for name in waiting if name != shard.identity[clip]), None)
            if portrait is not None:
                waiting.remove(portrait)
                found.append((people[portrait], clip))
        return found

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def people(self) -> int:
        """Identities among portraits and drivers."""
        clips = {clip for number, driver in self.pairs for clip in (int(self.shard.image_clip[number]), driver)}
        return len({str(self.shard.identity[clip]) for clip in clips})

    def __iter__(self) -> Iterator[CrossClip]:
        return (self._clip(*pair) for pair in self.pairs)

    def _portrait(self, number: int) -> _Portrait:
        shard, row, clip = self.shard, int(self.shard.image_row[number]), int(self.shard.image_clip[number])
        start = np.concatenate([shard.expression[row], shard.pose[row]]).astype(np.float32)
        alpha = np.array(shard.identity_shape[clip], np.float32)
        return _Portrait(str(shard.name[clip]), str(shard.identity[clip]), shard.image(number), alpha, start)

    def _clip(self, number: int, clip: int) -> CrossClip:
        shard, rows = self.shard, self.shard.rows(clip)
        portrait = self._portrait(number)
        driver = np.concatenate([shard.expression[rows], shard.pose[rows]], axis=1).astype(np.float32)
        stored = np.flatnonzero(shard.image_clip == clip)
        chosen = [
            int(stored[int((i + 0.5) * len(stored) / n)]) for n in [min(self.frames, len(stored))] for i in range(n)
        ]
        frames = [int(shard.image_row[n]) - rows.start for n in chosen]
        motion = transfer(portrait.start, driver)
        images: dict[str, list[Picture]] = {name: [] for name in self.methods}
        images[COPY] = [portrait.portrait] * len(frames)
        for name, model in self.generators.items():
            driven = drive(
                model, self.face, portrait, torch.from_numpy(motion), frames=frames, device=self.device,
                dtype=self.dtype,
            )  # fmt: skip
            for frame in driven:
                images[name].append(frame.image)
                if name in self.warped:
                    images[f"I_w of {name}"].append(frame.warped)
        return CrossClip(
            f"{portrait.name} by {shard.name[clip]}",
            portrait.portrait,
            portrait.alpha,
            portrait.start,
            motion[frames],
            ([shard.image(n) for n in chosen], np.array(shard.identity_shape[clip], np.float32), driver[frames]),
            images,
        )


Track = Callable[[Sequence[Picture]], npt.NDArray[np.floating[Any]]]


class CrossScores:
    """CSIM, AED and APD of every method over the clips; of the driver's own frames beside them, which show what two
    people have in common and what tracking and fitting alone differ by.

    Arguments:
        face: the face model.
        track: frames to landmarks (n, 478, 3), NaN where there is no face; None is the face tracker.
        embed: frames to embeddings (n, D), NaN where there is no face; None is dlib's network.
    """

    def __init__(self, face: FaceModel, track: Track | None = None, embed: Track | None = None) -> None:
        self.face = face.to(torch.device("cpu"))
        self.track, self.embed = track or _Tracked(), embed or _Embedded()
        self.rows: dict[str, dict[str, dict[str, float | None]]] = {}
        self.frames = 0

    def add(self, clip: CrossClip) -> None:
        """Measure what every method made of a clip."""
        portrait, begin = self.embed([clip.portrait])[0], self.track([clip.portrait])[0]
        for name, images in clip.images.items():
            landmarks = self.track(images)
            row = self._row(portrait, images, landmarks, clip.alpha, clip.commanded)
            row |= self._moved(clip.alpha, (begin, clip.start), landmarks, clip.commanded)
            self.rows.setdefault(name, {})[clip.name] = row
        frames, alpha, coefficients = clip.driver
        landmarks = self.track(frames)
        row = self._row(portrait, frames, landmarks, alpha, coefficients)
        row |= self._moved(alpha, (landmarks[0], coefficients[0]), landmarks[1:], coefficients[1:])
        self.rows.setdefault(DRIVER, {})[clip.name] = row
        self.frames += len(clip.commanded)

    def _row(
        self,
        portrait: Floats,
        images: Sequence[Picture],
        landmarks: npt.NDArray[np.floating[Any]],
        alpha: Floats,
        wanted: Floats,
    ) -> dict[str, float | None]:
        embedded = self.embed(images)
        seen = np.isfinite(landmarks).all((1, 2))
        row: dict[str, float | None] = {
            "csim": csim_to_portrait(portrait, embedded),
            "same": same_person(portrait, embedded),
            "found": float(seen.mean()),
        }
        if seen.any():
            found = fit(self.face, landmarks[seen], identity=alpha)
            pose = measures.pose_distance(wanted[seen, 64:], found.pose)
            row |= {
                "aed": measures.expression_distance(wanted[seen, :64], found.expression),
                "apd": pose.angles,
                "apd_translation": pose.translation,
            }
        return row

    def _moved(
        self,
        alpha: Floats,
        begin: tuple[npt.NDArray[np.floating[Any]], Floats],
        landmarks: npt.NDArray[np.floating[Any]],
        wanted: Floats,
    ) -> dict[str, float | None]:
        """The landmarks' error since a frame with its landmarks and coefficients, of the face and of the lips."""
        seen = np.isfinite(landmarks).all((1, 2))
        if not seen.any() or not np.isfinite(begin[0]).all():
            return {}
        coefficients = torch.from_numpy(np.concatenate([begin[1][None], wanted[seen]]))
        with torch.inference_mode():
            points = self.face.project(
                torch.from_numpy(alpha).expand(len(coefficients), -1), coefficients[:, :64], coefficients[:, 64:]
            ).numpy()
        shown = landmarks[seen][..., :2] - begin[0][:, :2]
        told = points[1:, :, :2] - points[0, :, :2]
        found: dict[str, float | None] = {}
        for key, part in (("face", slice(None)), ("lips", list(LIPS))):
            a, b = (x[:, part] - x[:, part].mean(1, keepdims=True) for x in (shown, told))
            found[key] = float(np.linalg.norm(a - b, axis=-1).mean())
        return found

    def close(self) -> None:
        """Free the tracker before the program ends."""
        if isinstance(self.track, _Tracked):
            self.track.mesh.close()

    def table(self, title: str, notes: tuple[str, ...] = ()) -> Table:
        """Means over the clips.

        Raises:
            UserError: if none was measured.
        """
        if not self.rows:
            raise UserError("no clip was measured; the shard's validation split is empty")
        columns = (
            Column("csim", CSIM, "higher", 3, "cosine to the portrait; two people's reach 0.84 (metrics.identity)"),
            Column("same", "same person", "higher", 3, "share of the frames within dlib's threshold of the portrait"),
            Column("aed", "AED", "lower", 3, "mean |β̂ - β| of commanded and shown expression"),
            Column(
                "apd", "APD", "lower", 2, "mean absolute difference of commanded and shown pitch, yaw, roll, degrees"
            ),
            Column("face", "landmarks", "lower", 2, "error of how far landmarks moved, pixels of the 512x512 crop"),
            Column("lips", "lips", "lower", 2, "the same of the lips' landmarks"),
            Column("apd_translation", "APD t", "lower", 4, "the same of (tx, ty, tz), eye distances", extra=True),
            Column("found", "found", None, 3, "share of the frames in which the tracker finds a face", extra=True),
        )
        rows = []
        for method, clips in self.rows.items():
            known = {c.key: [v for row in clips.values() if (v := row.get(c.key)) is not None] for c in columns}
            values = {
                key: float(np.nanmean(found)) if np.isfinite(found).any() else None for key, found in known.items()
            }
            rows.append(Row(method, values, len(clips), self.frames, reference=method in (DRIVER, COPY), pairs=clips))
        settings: Settings = self.embed.settings() if isinstance(self.embed, _Embedded) else {}
        return Table(title, columns, tuple(rows), {"csim": settings}, notes)


class _Tracked:
    """The tracker's landmarks of each picture on its own."""

    def __init__(self) -> None:
        self.mesh = MeshExtractor()

    def __call__(self, images: Sequence[Picture]) -> npt.NDArray[np.float32]:
        return np.asarray(self.mesh(np.stack(images), {})["mesh"], np.float32)


class _Embedded:
    """dlib's embedding of each picture."""

    def __init__(self) -> None:
        from flowvqtalker_eval.metrics.identity import FaceIdentity
        from flowvqtalker_eval.metrics.landmarks68 import Dlib68

        self._landmarks, self._identity = Dlib68(), FaceIdentity(every=1)

    def settings(self) -> Settings:
        """The network."""
        return self._identity.settings()

    def __call__(self, images: Sequence[Picture]) -> npt.NDArray[np.float32]:
        frames = np.stack(images)
        known = self._landmarks(frames, {})
        return np.asarray(self._identity(frames, known)["identity_embedding"], np.float32)
