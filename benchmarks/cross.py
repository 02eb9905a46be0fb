"""Cross-identity animation on held-out people: one person's portrait driven by another person's clip.

    python benchmarks/cross.py SHARD [--weights FOLDER] [--pairs 12] [--frames 8] [--grid out/cross.png]

The portrait's coefficients (β_0, ρ_0) are moved by how the driver differs from the first frame of the clip (β_t - β_1,
ρ_t - ρ_1; depth by its ratio), within the limits of training. There is no image to compare with, so the columns say
whether the face is still the portrait's (CSIM) and whether it does what it was told:

- AED, APD: commanded coefficients against those of the generated frames, tracked and fitted on the portrait's identity.
  AED is mostly the fit's noise, since most components of β move no landmark by a pixel; therefore beside it
- the landmarks' error: how far tracked landmarks moved since the portrait against how far the commanded vertices did,
  mean over landmarks and frames of |(L_t - L_0) - (P_t - P_0)|, less the mean over the landmarks of both.

Rows: the copied portrait, I_w, VQIG, and the driver's own frames, which show what two people have in common and how
exact tracking and fitting are. The grid shows the portrait, the driver, I_w and ours; tables lie beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from held_out import Portrait, drive, in_turn
from tqdm import tqdm

from flowvqtalker.data.pairs import clamp_pose
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.fit import fit
from flowvqtalker.face.topology import LIPS
from flowvqtalker.io.image import ImageArray
from flowvqtalker.loading import fast_dtype, load_face_model, load_generator
from flowvqtalker_eval.figures import grid, style
from flowvqtalker_eval.metrics import motion
from flowvqtalker_eval.metrics.identity import COLUMN, FaceIdentity, csim, same_person
from flowvqtalker_eval.metrics.landmarks68 import Dlib68
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.report import Column, Row, Table, markdown, write

COLUMNS = (
    Column("csim", COLUMN, "higher", 3, "cosine to the portrait; that of two people reaches 0.84"),
    Column("same", "same person", "higher", 3, "share of the frames within dlib's threshold of the portrait"),
    Column("aed", "AED", "lower", 3, "mean |β̂ - β| of commanded and shown expression"),
    Column("apd", "APD", "lower", 2, "mean absolute difference of commanded and shown pitch, yaw, roll, degrees"),
    Column("face", "landmarks", "lower", 2, "error of how far landmarks moved, pixels of the 512x512 crop"),
    Column("lips", "lips", "lower", 2, "the same of the lips' landmarks"),
    Column("found", "found", None, 3, "share of the frames in which the tracker finds a face", extra=True),
)
COPY, DRIVER = "copied portrait", "driver's own frames"
#: The driver's first frames, at most.
LONGEST = 60


def transfer(start: np.ndarray, driver: np.ndarray) -> np.ndarray:
    """Coefficients (T, 70) of a portrait with coefficients (70,) that moves as a driver (T, 70) does."""
    moved = start + driver - driver[0]
    moved[:, :64] = np.clip(moved[:, :64], -5, 5)
    moved[:, 64:] = clamp_pose(moved[:, 64:])
    moved[:, 69] = start[69] * np.clip(driver[:, 69] / driver[0, 69], 0.87, 1.15)
    return np.asarray(moved, np.float32)


def choose(shard: Shard, count: int) -> list[tuple[int, int]]:
    """(number of the portrait's image, clip of another person that drives it); portraits repeat as late as possible."""
    held = np.flatnonzero(shard.split[shard.image_clip] == "val")
    people: dict[str, int] = {}
    for number in held:
        people.setdefault(str(shard.identity[shard.image_clip[number]]), int(number))
    clips = [int(c) for c in np.unique(shard.image_clip[held]) if not shard.is_image[c] and shard.length[c] > 1]
    drivers = [clips[i] for i in in_turn([str(shard.identity[c]) for c in clips], count)]
    if len(people) < 2 or not drivers:
        raise UserError(f"shard {shard.path} has no portrait and clip of two held-out people; prepare another")
    rng, waiting = np.random.default_rng(0), list[str]()
    chosen = []
    for clip in drivers:
        if all(name == shard.identity[clip] for name in waiting):
            waiting += [str(name) for name in rng.permutation(sorted(people))]
        name = next(name for name in waiting if name != shard.identity[clip])
        waiting.remove(name)
        chosen.append((people[name], clip))
    return chosen


class Bench:
    """The models and what was measured with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shard = Shard(options.shard)
        self.face, self.generator = load_face_model(options.weights), load_generator(options.weights)
        self.mesh, self.dlib, self.identity = MeshExtractor(), Dlib68(), FaceIdentity(every=1)
        self.rows: dict[str, dict[str, dict[str, float | None]]] = {}
        self.frames, self.dtype = 0, fast_dtype(torch.device("cpu"))

    def measure(self, number: int, clip: int) -> tuple[str, list[ImageArray]]:
        """One portrait and driver; returns a row of the grid."""
        shard = self.shard
        portrait = Portrait.stored(shard, number)
        rows = slice(shard.rows(clip).start, min(shard.rows(clip).stop, shard.rows(clip).start + LONGEST))
        driver = np.concatenate([shard.expression[rows], shard.pose[rows]], axis=1).astype(np.float32)
        own = [n for n in np.flatnonzero(shard.image_clip == clip) if shard.image_row[n] < rows.stop]
        numbers = [own[i] for i in np.linspace(0, len(own) - 1, min(self.options.frames, len(own))).astype(int)]
        frames = [int(shard.image_row[n]) - rows.start for n in numbers]
        motion_of_portrait = transfer(portrait.start, driver)
        driven = list(drive(self.generator, self.face, portrait, motion_of_portrait, dtype=self.dtype))
        commanded, name = motion_of_portrait[frames], f"{portrait.name} by {shard.name[clip]}"
        begin = portrait.image, portrait.start
        for method, images in (
            (COPY, [portrait.image] * len(frames)),
            ("I_w of VQIG", [driven[t].warped for t in frames]),
            ("VQIG", [driven[t].image for t in frames]),
        ):
            self._add(method, name, portrait.image, images, begin, portrait.alpha, commanded)
        real = [shard.image(int(n)) for n in numbers]
        alpha = np.array(shard.identity_shape[clip], np.float32)
        self._add(DRIVER, name, portrait.image, real, (real[0], driver[frames[0]]), alpha, driver[frames])
        self.frames += len(frames)
        far = int(np.abs(commanded - portrait.start)[:, :64].sum(1).argmax())
        shown = driven[frames[far]]
        return name, [portrait.image, real[far], shown.warped, shown.image]

    def _embed(self, images: Sequence[ImageArray]) -> np.ndarray:
        frames = np.stack(images)
        return self.identity(frames, self.dlib(frames, {}))["identity_embedding"]

    def _add(
        self,
        method: str,
        name: str,
        portrait: ImageArray,
        images: Sequence[ImageArray],
        begin: tuple[ImageArray, np.ndarray],
        alpha: np.ndarray,
        wanted: np.ndarray,
    ) -> None:
        """Measure images that should show ``wanted`` (n, 70), beginning from an image and its coefficients."""
        embedded = self._embed(images)
        first, *meshes = self.mesh(np.stack([begin[0], *images]), {})["mesh"]
        seen = np.isfinite(meshes).all((1, 2))
        row: dict[str, float | None] = {
            "csim": csim(self._embed([portrait])[0], embedded),
            "same": same_person(self._embed([portrait])[0], embedded),
            "found": float(seen.mean()),
        }
        if seen.any() and np.isfinite(first).all():
            landmarks, wanted = np.stack(meshes)[seen], wanted[seen]
            found = fit(self.face, landmarks, identity=alpha)
            row["aed"] = motion.expression_distance(wanted[:, :64], found.expression)
            row["apd"] = motion.pose_distance(wanted[:, 64:], found.pose).angles
            values = torch.from_numpy(np.concatenate([begin[1][None], wanted]))
            with torch.inference_mode():
                shape = torch.from_numpy(alpha).expand(len(values), -1)
                points = self.face.project(shape, values[:, :64], values[:, 64:]).numpy()[..., :2]
            shown, told = landmarks[..., :2] - first[:, :2], points[1:] - points[0]
            for key, part in (("face", slice(None)), ("lips", list(LIPS))):
                a, b = (x[:, part] - x[:, part].mean(1, keepdims=True) for x in (shown, told))
                row[key] = float(np.linalg.norm(a - b, axis=-1).mean())
        self.rows.setdefault(method, {})[name] = row

    def table(self, title: str) -> Table:
        """Means over the pairs."""
        rows = []
        for method, clips in self.rows.items():
            known = {c.key: [v for row in clips.values() if (v := row.get(c.key)) is not None] for c in COLUMNS}
            values = {key: float(np.nanmean(found)) if found else None for key, found in known.items()}
            rows.append(Row(method, values, len(clips), self.frames, reference=method in (DRIVER, COPY), pairs=clips))
        return Table(title, COLUMNS, tuple(rows), {"csim": self.identity.settings()})


def main() -> None:
    """Measure, print and write the table, write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--pairs", type=int, default=12, help="of portrait and clip")
    parser.add_argument("--frames", type=int, default=8, help="of each clip")
    parser.add_argument("--grid", type=Path, default=Path("out/cross.png"))
    parser.add_argument("--rows", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        style.check_figure(options.grid)
        bench = Bench(options)
        pairs = choose(bench.shard, options.pairs)
        shown = dict([bench.measure(*pair) for pair in tqdm(pairs)][: options.rows])
        bench.mesh.close()
        columns = ["Portrait", "Driver", "Warped portrait", "Ours"]
        options.grid.parent.mkdir(parents=True, exist_ok=True)
        style.save(grid.make(shown, columns=columns, labels=False), options.grid)
        table = bench.table(
            f"Cross-identity animation, {len(pairs)} pairs of held-out people from {options.shard.name}"
        )
        print(markdown(table))
        print(", ".join(map(str, write(table, options.grid.with_suffix("")))))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
