"""Self-reenactment of held-out people: a clip's first stored frame driven to its others by their tracked β and ρ.

Shows what image generators can do if the motion is right. All see the same pairs, beside three baselines: the copied
source, the warped source I_w, and the codebook's reconstruction of the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.image import ImageArray
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.renderer import ImageGenerator
from flowvqtalker_eval.metrics.frechet import FRECHET_MOBILENET, GaussianFit, MobileNetFeatures, frechet_distance, note
from flowvqtalker_eval.metrics.regions import SIZES, Box, crop, perceptual_distances, regions
from flowvqtalker_eval.metrics.ssim import psnr, ssim
from flowvqtalker_eval.report import Column, Row, Table

__all__ = ["BASELINES", "Pair", "Reenactment", "Scores", "to_image"]

#: Rows beside the generators' own.
BASELINES = ("copied source", "codebook of the target")

_FRECHET = "frechet_mobilenet"


def to_image(values: Tensor) -> ImageArray:
    """(3, H, W) in [-1, 1] to (H, W, 3) uint8."""
    levels = values.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Pair:
    """One pair of images and what every method made of it.

    Attributes:
        name: ``CLIP/FRAME`` of the target.
        source, target: (512, 512, 3) uint8 RGB.
        images: by method.
        boxes: of the target's mouth and eyes, see :func:`~flowvqtalker_eval.metrics.regions.regions`.
    """

    name: str
    source: ImageArray
    target: ImageArray
    images: Mapping[str, ImageArray]
    boxes: Mapping[str, Box] = field(default_factory=dict)

    @property
    def change(self) -> float:
        """Mean absolute difference of target and source in levels of 255."""
        return float(np.abs(self.target.astype(np.int16) - self.source).mean())


class Reenactment:
    """The held-out pairs of a shard, reenacted one after the other by several generators.

    Arguments:
        shard: folder of a shard with images; its validation split (by identity) is used.
        face: the face model of the shard's coefficients.
        generators: by name.
        limit: number of pairs at most, spread evenly; 0 takes all.
        warped: names of generators whose warped source I_w becomes a method of its own, ``I_w of NAME``.
        device, dtype: of the generators.
    """

    def __init__(
        self,
        shard: str | Path,
        face: FaceModel,
        generators: Mapping[str, ImageGenerator],
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
        kinds = {kind for model in generators.values() if (kind := _mesh_kind(model)) is not None}
        self.meshes = {kind: MeshFlow(face, kind[0], apertures=kind[1]).to(self.device) for kind in kinds}
        self.data = PairDataset(Shard(shard), "val", limit=limit)
        if not len(self.data):
            raise UserError(f"shard {shard} has no clip with two images in its validation split; prepare another")
        self.methods = (*BASELINES, *(f"I_w of {name}" for name in warped), *self.generators)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def people(self) -> int:
        """Number of identities among the pairs."""
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
            images[BASELINES[1]] = next(iter(self.generators.values())).reconstruct(item["target"])
            for name, model in self.generators.items():
                kind = _mesh_kind(model)
                prior = None if kind is None else priors[kind]
                found = model(model.prepare(item["source"]), item["motion"], prior)
                images[name] = found.image
                if name in self.warped:
                    images[f"I_w of {name}"] = found.warped
        clip = int(shard.image_clip[number])
        return Pair(
            f"{shard.name[clip]}/{int(shard.image_row[number]) - shard.rows(clip).start}",
            to_image(item["source"][0]),
            to_image(item["target"][0]),
            {name: to_image(images[name][0]) for name in self.methods},
            regions(end[0].cpu().numpy()),
        )


def _mesh_kind(model: ImageGenerator) -> tuple[int, bool] | None:
    """What a generator takes from the mesh: the size of the flow, and whether it needs the apertures."""
    size = model.config.mesh_size
    return None if size is None else (size, model.config.apertures)


class Scores:
    """Image quality of every method over pairs.

    L1 of colours in [0, 1], PSNR (dB), SSIM, the perceptual distance of the whole image and of the mouth and the eyes
    enlarged twice, and the Fréchet distance between the methods' and the targets' MobileNetV2 features.

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
        self.fits: dict[str, GaussianFit] = {}

    def add(self, pair: Pair) -> None:
        """Measure what every method made of a pair."""
        whole = perceptual_distances(self.perceptual, pair.target, pair.images, device=self.device)
        parts = {
            name: perceptual_distances(self.perceptual, pair.target, pair.images, box, self.device)
            for name, box in pair.boxes.items()
        }
        for method, image in pair.images.items():
            row: dict[str, float | None] = {
                "l1": float(np.abs(pair.target.astype(np.float32) - image).mean() / 255),
                "psnr": float(psnr(pair.target, image)[0]),
                "ssim": float(ssim(pair.target, image)[0]),
                "perceptual": whole[method],
            }
            for name, box in pair.boxes.items():
                real, made = crop(pair.target, box), crop(image, box)
                row[name] = parts[name][method]
                row[f"{name}_psnr"] = float(psnr(real, made)[0])
                row[f"{name}_ssim"] = float(ssim(real, made)[0])
            self.rows.setdefault(method, {})[pair.name] = row
        if self.features is not None:
            everyone = {"": pair.target, **pair.images}
            vectors = self.features(np.stack(list(everyone.values())), {})["mobilenet512"]
            for method, vector in zip(everyone, vectors, strict=True):
                self.fits.setdefault(method, GaussianFit()).update(vector[None])

    def table(self, title: str, notes: tuple[str, ...] = ()) -> Table:
        """Means over the pairs.

        Raises:
            UserError: if no pair was measured.
        """
        if not self.rows:
            raise UserError("no pair of images was measured; the shard's validation split is empty")
        columns = self._columns()
        values: dict[str, dict[str, float | None]] = {}
        for method, pairs in self.rows.items():
            known = {c.key: [v for row in pairs.values() if (v := row.get(c.key)) is not None] for c in columns}
            values[method] = {key: float(np.mean(found)) if found else None for key, found in known.items()}
        settings: dict[str, dict[str, str | float | int]] = {"ssim": {"window": "uniform7"}}
        if self.features is not None and (count := self.fits[""].n_images) > 1:
            real = self.fits[""].result()
            for method in values:
                values[method][_FRECHET] = frechet_distance(real, self.fits[method].result())
            columns.append(Column(_FRECHET, FRECHET_MOBILENET, "lower", 1, "whole images reduced to 224 pixels"))
            settings[_FRECHET] = {**self.features.settings(), "images": count}
            notes = (*notes, *note(FRECHET_MOBILENET, count, count))
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

    def _columns(self) -> list[Column]:
        """The perceptual distances under the name of their network."""
        network = {"mobilenet": "MobileNet", "vgg19": "VGG19"}[self.kind] + "-perceptual"
        columns = [
            Column("l1", "L1", "lower", 4, "mean absolute difference of colours in [0, 1]"),
            Column("psnr", "PSNR", "higher", 2, "dB, mean over images"),
            Column("ssim", "SSIM", "higher", 3, "7x7 box, RGB, 512x512"),
            Column("perceptual", network, "lower", 3, "squared distance of features, relative to the target's"),
        ]
        for name, (width, height) in SIZES.items():
            if any(name in row for pairs in self.rows.values() for row in pairs.values()):
                about = f"the same of {width}x{height} pixels, enlarged twice"
                columns += [
                    Column(name, f"{network}, {name}", "lower", 3, about),
                    Column(f"{name}_psnr", f"PSNR, {name}", "higher", 2, f"dB of {width}x{height} pixels", extra=True),
                    Column(f"{name}_ssim", f"SSIM, {name}", "higher", 3, f"of {width}x{height} pixels", extra=True),
                ]
        return columns
