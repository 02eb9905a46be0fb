"""Self-reenactment on held-out people: a clip's first stored frame driven to its others by their tracked β and ρ.

What the image generator can do when the motion is right: several generators on the same pairs of pictures, beside the
copied source, the warped source alone and the codebook's reconstruction of the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS
from flowvqtalker.io.media import Picture
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics.frechet import (
    FRECHET_MOBILENET,
    FrechetScore,
    MobileNetFeatures,
    fit_gaussian,
    frechet_distance,
)
from flowvqtalker_eval.metrics.regions import EYES, Box, regions
from flowvqtalker_eval.metrics.ssim import psnr, ssim
from flowvqtalker_eval.report import Column, Row, Table

__all__ = ["BASELINES", "MOUTH", "Pair", "Reenactment", "Scores", "picture"]

#: Rows beside the generators' own.
BASELINES = ("copied source", "codebook of the target")
#: Side of the mouth's crop in pixels of the 512x512 picture.
MOUTH = 128

_FRECHET = "frechet_mobilenet"


def picture(image: Tensor) -> Picture:
    """(3, H, W) in [-1, 1] to (H, W, 3) uint8."""
    values = image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Pair:
    """One pair of pictures and what every method made of it.

    Attributes:
        name: ``CLIP/FRAME`` of the target.
        source, target: (512, 512, 3) uint8 RGB.
        images: by method.
        mouth: column and row of the middle of the target's lips, such that the crop of side :data:`MOUTH` fits.
        eyes: left, top, width and height of the crop around the target's eyes; None is not judged.
    """

    name: str
    source: Picture
    target: Picture
    images: Mapping[str, Picture]
    mouth: tuple[int, int]
    eyes: Box | None = None

    @property
    def change(self) -> float:
        """Mean absolute difference of target and source, of 255."""
        return float(np.abs(self.target.astype(np.int16) - self.source).mean())

    def mouth_box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the mouth's crop."""
        return self.mouth[0] - MOUTH / 2, self.mouth[1] - MOUTH / 2, float(MOUTH), float(MOUTH)


class Reenactment:
    """The held-out pairs of a shard, reenacted one after the other by several generators.

    Arguments:
        shard: folder of a shard with pictures; its validation split (by identity) is used.
        face: the face model with which the shard was made.
        generators: by name.
        limit: at most so many pairs, spread evenly; 0 takes all.
        warped: names of generators whose warped source I_w becomes a method of its own, ``I_w of NAME``.
        device, dtype: where and with which floating point type the generators run.
    """

    def __init__(
        self,
        shard: str | Path,
        face: FaceModel,
        generators: Mapping[str, VQIG],
        *,
        limit: int = 60,
        warped: tuple[str, ...] = (),
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if not generators:
            raise UserError("no image generator was given; name at least one")
        self.device, self.dtype, self.warped = torch.device(device), dtype, warped
        self.face = face.to(self.device)
        self.generators = {
            name: model.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            for name, model in generators.items()
        }
        kinds = {_mesh_kind(model) for model in generators.values()}
        self.meshes = {kind: MeshFlow(face, kind[0], openings=kind[1]).to(self.device) for kind in kinds}
        self.data = PairDataset(Shard(shard), "val", limit=limit)
        if not len(self.data):
            raise UserError(f"shard {shard} has no clip with two pictures in its validation split; prepare another")
        self.methods = (*BASELINES, *(f"I_w of {name}" for name in warped), *self.generators)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def people(self) -> int:
        """Identities among the pairs."""
        shard = self.data.shard
        return len({str(shard.identity[shard.image_clip[target]]) for _, target in self.data.pairs})

    def __iter__(self) -> Iterator[Pair]:
        return (self._pair(i) for i in range(len(self.data)))

    @torch.inference_mode()
    def _pair(self, index: int) -> Pair:
        shard, number = self.data.shard, self.data.pairs[index][1]
        item = {key: value[None].to(self.device) for key, value in self.data[index].items()}
        start = self.face.project(item["identity"], item["source_expression"], item["source_pose"])
        end = self.face.project(item["identity"], item["target_expression"], item["target_pose"])
        priors = {kind: mesh(start, end) for kind, mesh in self.meshes.items()}
        images = {BASELINES[0]: item["source"]}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            book = next(iter(self.generators.values())).autoencoder
            images[BASELINES[1]] = book(item["target"])[0]
            for name, model in self.generators.items():
                found = model(model.prepare(item["source"]), item["motion"], priors[_mesh_kind(model)])
                images[name] = found.image
                if name in self.warped:
                    images[f"I_w of {name}"] = found.warped
        half = MOUTH // 2
        x, y = end[0, list(LIPS), :2].mean(0).round().long().clamp(half, 512 - half).tolist()
        clip = int(shard.image_clip[number])
        return Pair(
            f"{shard.name[clip]}/{int(shard.image_row[number]) - shard.rows(clip).start}",
            picture(item["source"][0]),
            picture(item["target"][0]),
            {name: picture(images[name][0]) for name in self.methods},
            (x, y),
            regions(end[0].cpu().numpy()).get("eyes"),
        )


def _mesh_kind(model: VQIG) -> tuple[int, bool]:
    """What a generator wants of the mesh: the flow's side, and whether it needs the openings."""
    return model.config.warp.flow_size, model.config.openings


class Scores:
    """Numbers of every method over pairs.

    L1 of colours in [0, 1], PSNR in dB, SSIM (7x7 box), the perceptual distance of the whole picture and of the mouth's
    and the eyes' crops enlarged twice, and the Fréchet distance between the methods' and the targets' MobileNetV2
    features.

    Arguments:
        perceptual: network of the perceptual distance.
        weights: file of its ImageNet weights, see :func:`flowvqtalker.render.perceptual.find_weights`.
        fid: whether to measure the Fréchet distance.
        device: where the networks run.
    """

    def __init__(
        self,
        perceptual: Literal["mobilenet", "vgg19"] = "mobilenet",
        weights: str | Path | None = None,
        *,
        fid: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        self.kind, self.device = perceptual, torch.device(device)
        self.perceptual = PerceptualLoss(perceptual, weights).to(self.device)
        self.features = MobileNetFeatures("frame", device=str(device)) if fid else None
        self.rows: dict[str, dict[str, dict[str, float | None]]] = {}
        self.vectors: dict[str, list[np.ndarray]] = {}

    def add(self, pair: Pair) -> None:
        """Measure what every method made of a pair."""
        target = self._tensor(pair.target)
        for name, image in pair.images.items():
            difference = pair.target.astype(np.float32) - image
            found = self._tensor(image)
            self.rows.setdefault(name, {})[pair.name] = {
                "l1": float(np.abs(difference).mean() / 255),
                "psnr": float(psnr(pair.target, image)[0]),
                "ssim": float(ssim(pair.target, image)[0]),
                "perceptual": self._distance(found, target),
                "mouth": self._distance(*(self._enlarged(x, pair.mouth_box()) for x in (found, target))),
            }
            if pair.eyes is not None:
                eyes = self._distance(*(self._enlarged(x, pair.eyes) for x in (found, target)))
                self.rows[name][pair.name]["eyes"] = eyes
        if self.features is not None:
            everyone = {"": pair.target, **pair.images}
            vectors = self.features(np.stack(list(everyone.values())), {})["mobilenet512"]
            for name, vector in zip(everyone, vectors, strict=True):
                self.vectors.setdefault(name, []).append(vector)

    def _tensor(self, image: Picture) -> Tensor:
        return torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float().div(127.5).sub(1)

    @torch.inference_mode()
    def _distance(self, image: Tensor, target: Tensor) -> float:
        return float(self.perceptual(image, target))

    def _enlarged(self, image: Tensor, box: tuple[float, float, float, float]) -> Tensor:
        x, y, w, h = (int(v) for v in box)
        return F.interpolate(image[..., y : y + h, x : x + w], scale_factor=2)

    def table(self, title: str, notes: tuple[str, ...] = ()) -> Table:
        """Means over the pairs, the perceptual distances under the name of their network.

        Raises:
            UserError: if no pair was measured.
        """
        if not self.rows:
            raise UserError("no pair of pictures was measured; the shard's validation split is empty")
        name = {"mobilenet": "MobileNet", "vgg19": "VGG19"}[self.kind] + "-perceptual"
        columns = [
            Column("l1", "L1", "lower", 4, "mean absolute difference of colours in [0, 1]"),
            Column("psnr", "PSNR", "higher", 2, "dB, mean over pictures"),
            Column("ssim", "SSIM", "higher", 3, "7x7 box, RGB, 512x512"),
            Column("perceptual", name, "lower", 3, "squared distance of features, relative to the target's"),
            Column("mouth", f"{name}, mouth", "lower", 3, f"the same of a {MOUTH}-pixel crop enlarged twice"),
        ]
        if any("eyes" in row for pairs in self.rows.values() for row in pairs.values()):
            size = f"{EYES[0]}x{EYES[1]}"
            columns.append(
                Column("eyes", f"{name}, eyes", "lower", 3, f"the same of a {size}-pixel crop enlarged twice")
            )
        values: dict[str, dict[str, float | None]] = {}
        for method, pairs in self.rows.items():
            known = {c.key: [v for row in pairs.values() if (v := row.get(c.key)) is not None] for c in columns}
            values[method] = {key: float(np.mean(found)) if found else None for key, found in known.items()}
        settings: dict[str, dict[str, str | float | int]] = {"ssim": {"window": "uniform7"}}
        if self.features is not None and len(self.vectors[""]) > 1:
            count = len(self.vectors[""])
            gaussians = {method: fit_gaussian(np.stack(vectors)) for method, vectors in self.vectors.items()}
            for method in values:
                values[method][_FRECHET] = frechet_distance(gaussians[""], gaussians[method])
            columns.append(Column(_FRECHET, FRECHET_MOBILENET, "lower", 1, "whole pictures reduced to 224 pixels"))
            settings[_FRECHET] = {**self.features.settings(), "pictures": count}
            notes = (*notes, *filter(None, [FrechetScore(FRECHET_MOBILENET, 0.0, (count, count)).note]))
        rows = [
            Row(
                method,
                values[method],
                clips=len({name.rpartition("/")[0] for name in pairs}),
                frames=len(pairs),
                reference=method == BASELINES[1],  # it sees the target
                pairs=pairs,
            )
            for method, pairs in self.rows.items()
        ]
        return Table(title, tuple(columns), tuple(rows), settings, notes)
