"""How well the codebook stage keeps a face: E_h, C and D_h on held-out people, the mouth and the eyes on their own.

A 512x512 picture becomes 16x16 codes of 10 bits, 2560 bits in all. What that is worth shows beside pictures that are
reduced to as many bits by other means, and beside D_h without the codes in between.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker import weights
from flowvqtalker.data.pictures import find_pictures, read_picture
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.io.media import Picture
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.vqvae import CodebookConfig, VQAutoencoder
from flowvqtalker_eval.metrics.analysis import Settings
from flowvqtalker_eval.metrics.frechet import (
    FRECHET_MOBILENET,
    FrechetScore,
    MobileNetFeatures,
    fit_gaussian,
    frechet_distance,
)
from flowvqtalker_eval.metrics.regions import SIZES, Box, as_tensor, cut, distances, regions
from flowvqtalker_eval.metrics.ssim import psnr, ssim
from flowvqtalker_eval.report import Column, Row, Table

__all__ = [
    "CodebookScores",
    "Portrait",
    "code_bits",
    "load_codebook",
    "perplexity",
    "rebuild",
    "reduced",
    "spread",
    "still_portraits",
    "stored_portraits",
    "usage",
    "webp_within",
]

_SIDE = 512
_FRECHET = "frechet_mobilenet"
_TITLES = {"mobilenet": "MobileNet", "vgg19": "VGG19"}


# --------------------------------------------------------------------------------------------------------------- codes


def usage(counts: npt.NDArray[np.integer[Any]]) -> float:
    """Share of the codes that occur at all.

    Arguments:
        counts: (N,) how often each code occurs.
    """
    return float((_counts(counts) > 0).mean())


def perplexity(counts: npt.NDArray[np.integer[Any]]) -> float:
    """exp(-Σ p_i ln p_i) with p_i the share of code i: how many equally frequent codes would be as hard to guess; from
    1 (one code for all) to N.

    Arguments:
        counts: (N,) how often each code occurs.
    """
    share = _counts(counts)
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _counts(counts: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    counts = np.asarray(counts)
    if counts.ndim != 1 or not len(counts) or counts.min() < 0 or counts.sum() == 0:
        raise UserError(f"counts of codes must be (N,), not negative and not all 0, got shape {counts.shape}")
    return counts.astype(np.float64)


def code_bits(config: CodebookConfig) -> int:
    """Bits that name the codes of a 512x512 picture, each with the same number of them."""
    return (_SIDE // config.stride) ** 2 * math.ceil(math.log2(config.codes))


def load_codebook(path: str | Path | None = None) -> VQAutoencoder:
    """E_h, C and D_h of a folder of weights (None: the package's own), or of a run of stage ``codebook``.

    Raises:
        UserError: if the run's files are missing, of another stage, or do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = None if path is None else Path(path)
    if folder is None or (folder / "manifest.json").is_file():
        tensors, values = weights.load("codebook", folder)
        model = VQAutoencoder(CodebookConfig.from_dict(values))
        weights.restore(model, tensors, "codebook", folder)
        return model.eval()
    file, about = folder / "weights.safetensors", folder / "config.json"
    if not (file.is_file() and about.is_file()):
        raise UserError(f"{folder} holds neither a manifest.json nor a run (weights.safetensors and config.json)")
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
        if content.get("stage") != "codebook":
            raise UserError(f"{folder} is a run of stage {content.get('stage', 'unknown')}; give one of stage codebook")
        model = VQAutoencoder(CodebookConfig.from_dict(content["config"]))
        model.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise UserError(f"the run {folder} cannot be read ({reason}); export its weights again") from error
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Portrait:
    """A held-out picture.

    Attributes:
        name: of the picture.
        identity: of the person.
        image: (512, 512, 3) uint8 RGB.
        boxes: of the mouth and the eyes, see :func:`flowvqtalker_eval.metrics.regions.regions`; empty where no face is
            known.
    """

    name: str
    identity: str
    image: Picture
    boxes: Mapping[str, Box]


def spread(groups: Sequence[Hashable], limit: int) -> list[int]:
    """Numbers of at most ``limit`` items, taken in turn from each group (person), within a group spread evenly.

    Arguments:
        groups: of each item.
        limit: 0 takes all.

    Returns:
        ascending numbers.
    """
    if limit < 0:
        raise UserError(f"the limit must not be negative, got {limit}")
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    room = min(limit or len(groups), len(groups))
    quota = dict.fromkeys(members, 0)
    while room:
        for group, numbers in members.items():
            if room and quota[group] < len(numbers):
                quota[group] += 1
                room -= 1
    chosen = []
    for group, numbers in members.items():
        chosen += [numbers[int((i + 0.5) * len(numbers) / quota[group])] for i in range(quota[group])]
    return sorted(chosen)


def stored_portraits(shard: Shard, kind: Literal["stills", "frames"], limit: int = 0) -> list[partial[Portrait]]:
    """Pictures of the held-out people of a shard, to be called one by one.

    Arguments:
        shard: with pictures.
        kind: single pictures, or the stored frames of clips.
        limit: at most so many, people in turn; 0 takes all.
    """
    if kind not in ("stills", "frames"):
        raise UserError(f"unknown kind of pictures {kind!r}; choose stills or frames")
    clips = np.flatnonzero((shard.split == "val") & (shard.picture == (kind == "stills")))
    numbers = shard.images_of(clips)
    chosen = spread([str(shard.identity[shard.image_clip[n]]) for n in numbers], limit)
    return [partial(_stored, shard, int(numbers[i])) for i in chosen]


def _stored(shard: Shard, number: int) -> Portrait:
    clip, row = int(shard.image_clip[number]), int(shard.image_row[number])
    name = f"{shard.name[clip]}/{row - int(shard.start[clip])}"
    return Portrait(name, str(shard.identity[clip]), shard.image(number), regions(shard.landmarks(row)))


def still_portraits(folder: str | Path, table: str | Path | None = None, limit: int = 0) -> Iterator[Portrait]:
    """Pictures of the held-out people of a folder; faces are sought in them with the tracker.

    Arguments:
        folder, table: see :func:`flowvqtalker.data.pictures.find_pictures`.
        limit: at most so many, people in turn; 0 takes all.

    Raises:
        UserError: if there is no picture of a held-out person.
    """
    held = [(path, who) for path, who in find_pictures(folder, table) if split_of(who) == "val"]
    if not held:
        raise UserError(f"no picture in {folder} shows a person of the validation split; give more pictures")
    return _tracked([held[i] for i in spread([who for _, who in held], limit)])


def _tracked(pictures: Sequence[tuple[Path, str]]) -> Iterator[Portrait]:
    from flowvqtalker.face.tracker import FaceTracker

    with FaceTracker() as tracker:
        for path, who in pictures:
            image = _sized(read_picture(path))
            faces = tracker.detect(image)
            yield Portrait(path.stem, who, image, regions(faces[0].landmarks) if faces else {})


def _sized(image: Picture) -> Picture:
    if image.shape[:2] == (_SIDE, _SIDE):
        return image
    how = cv2.INTER_AREA if image.shape[0] > _SIDE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (_SIDE, _SIDE), interpolation=how), np.uint8)


# ------------------------------------------------------------------------------------------------------------- methods


def reduced(image: Picture, side: int) -> Picture:
    """The picture area-averaged to ``side`` x ``side`` pixels, 24 bits each, and enlarged again by cubic splines."""
    if not 1 <= side <= min(image.shape[:2]):
        raise UserError(f"a picture is reduced to a side between 1 and its own, got {side}")
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def webp_within(image: Picture, size: int) -> tuple[Picture, int]:
    """The best picture (PSNR) that a WebP file of at most ``size`` bytes, header included, gives: of several sides to
    which it is reduced, each with the highest quality that fits.

    Returns:
        the decoded picture, enlarged again, and the file's size in bytes.

    Raises:
        UserError: if no such file is small enough.
    """
    best: tuple[float, Picture, int] | None = None
    bgr = np.ascontiguousarray(image[..., ::-1])
    for side in (16, 24, 32, 48, 64, 96, 128, 192, 256):
        small = cv2.resize(bgr, (side, side), interpolation=cv2.INTER_AREA)
        found = _largest_fitting(np.asarray(small, np.uint8), size)
        if found is None:
            break
        decoded = cv2.imdecode(found, cv2.IMREAD_COLOR)
        assert decoded is not None
        large = cv2.resize(decoded, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        picture = np.ascontiguousarray(large[..., ::-1]).astype(np.uint8)
        score = float(psnr(image, picture)[0])
        if best is None or score > best[0]:
            best = score, picture, len(found)
    if best is None:
        raise UserError(f"no WebP file is as small as {size} bytes; give at least 64")
    return best[1], best[2]


def _largest_fitting(image: Picture, size: int) -> npt.NDArray[np.uint8] | None:
    """The WebP of the highest quality that fits, by bisection."""
    low, high, best = 1, 100, None
    while low <= high:
        quality = (low + high) // 2
        ok, code = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if ok and len(code) <= size:
            best, low = np.asarray(code, np.uint8), quality + 1
        else:
            high = quality - 1
    return best


@torch.inference_mode()
def rebuild(
    model: VQAutoencoder, image: Picture, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Picture, Picture, npt.NDArray[np.int64]]:
    """A picture through the codebook.

    Returns:
        D_h of the codes, D_h of E_h's own latents (no codes in between), and the codes (16, 16).
    """
    device = torch.device(device)
    given = as_tensor([image], device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        z, indices = model.encode(given)
        coded, plain = model.decode(indices), model.decoder(z)
    pictures = [
        x[0].float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        for x in (coded, plain)
    ]
    return pictures[0], pictures[1], indices[0].cpu().numpy()


# -------------------------------------------------------------------------------------------------------------- scores


@dataclass
class CodebookScores:
    """Numbers of one or several codebooks over pictures, beside as many bits spent otherwise.

    Rows: each codebook, the same without codes, WebP files of as many bits (header included), the picture reduced to
    as many bits (10x10 pixels for 2560) and, as a mark, to 32x32 pixels.

    Attributes:
        models: by name; the first one's bits are what the other rows get.
        perceptual: network of the perceptual distance.
        fid: whether to measure the Fréchet distance.
        dtype: floating point type of the codebooks.
    """

    models: Mapping[str, VQAutoencoder]
    perceptual: Literal["mobilenet", "vgg19"] = "mobilenet"
    weights: str | Path | None = None
    fid: bool = True
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict, init=False)
    rows: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict, init=False)
    vectors: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)
    people: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("no codebook was given; name at least one")
        self.device = torch.device(self.device)
        for name, model in self.models.items():
            model.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            self.counts[name] = np.zeros(model.config.codes, np.int64)
        self.bits = code_bits(next(iter(self.models.values())).config)
        self._distance = PerceptualLoss(self.perceptual, self.weights).to(self.device)
        self._features = MobileNetFeatures("frame", device=str(self.device)) if self.fid else None

    def add(self, portrait: Portrait) -> dict[str, Picture]:
        """Measure one picture; returns what every method made of it."""
        if portrait.image.shape != (_SIDE, _SIDE, 3) or portrait.image.dtype != np.uint8:
            raise UserError(
                f"{portrait.name}: pictures must be (512, 512, 3) uint8, got {portrait.image.shape} "
                f"{portrait.image.dtype}"
            )
        images: dict[str, Picture] = {}
        bits: dict[str, float] = {}
        plain: dict[str, Picture] = {}
        for name, model in self.models.items():
            images[name], plain[f"{name}, no codes"], codes = rebuild(
                model, portrait.image, device=self.device, dtype=self.dtype
            )
            bits[name] = code_bits(model.config)
            self.counts[name] += np.bincount(codes.ravel(), minlength=model.config.codes)
        images |= plain
        small, size = webp_within(portrait.image, self.bits // 8)
        images["WebP of as many bits"], bits["WebP of as many bits"] = small, 8 * size
        for side in dict.fromkeys((max(1, math.isqrt(self.bits // 24)), 32)):
            images[f"{side}x{side} pixels"] = reduced(portrait.image, side)
            bits[f"{side}x{side} pixels"] = side * side * 24
        far = {"": distances(self._distance, portrait.image, images, device=self.device)}
        for part, box in portrait.boxes.items():
            far[part] = distances(self._distance, portrait.image, images, box=box, device=self.device)
        self.people.add(portrait.identity)
        for name, image in images.items():
            row: dict[str, float | None] = {"bits": bits.get(name)}
            for part in far:
                real, fake = (cut(x, portrait.boxes[part]) if part else x for x in (portrait.image, image))
                prefix = f"{part}_" if part else ""
                row[f"{prefix}psnr"] = float(psnr(real, fake)[0])
                row[f"{prefix}ssim"] = float(ssim(real, fake)[0])
                row[f"{prefix}perceptual"] = far[part][name]
            self.rows.setdefault(name, {})[portrait.name] = row
        if self._features is not None:
            everyone = {"": portrait.image, **images}
            found = self._features(np.stack(list(everyone.values())), {})["mobilenet512"]
            for name, vector in zip(everyone, found, strict=True):
                self.vectors.setdefault(name, []).append(vector)
        return images

    def table(self, title: str, notes: tuple[str, ...] = ()) -> Table:
        """Means over the pictures; usage and perplexity of the codes of all of them together.

        Raises:
            UserError: if no picture was measured.
        """
        if not self.rows:
            raise UserError("no picture was measured; nobody of the validation split is among them")
        network = _TITLES[self.perceptual]
        columns = [Column("bits", "bits", None, 0, "a picture")]
        for part in ("", *SIZES):
            prefix, where = (f"{part}_", f", {part}") if part else ("", "")
            box = f" of {SIZES[part][0]}x{SIZES[part][1]} pixels around the {part}" if part else ""
            twice = ", enlarged twice" if part else ""
            columns += [
                Column(f"{prefix}psnr", f"PSNR{where}", "higher", 2, f"dB, mean over pictures{box}"),
                Column(f"{prefix}ssim", f"SSIM{where}", "higher", 3, f"7x7 box, RGB{box}"),
                Column(
                    f"{prefix}perceptual", f"{network}-perceptual{where}", "lower", 3,
                    f"squared distance of features, relative to the real picture's{box}{twice}",
                ),
            ]  # fmt: skip
        columns += [
            Column("usage", "codes used", "higher", 3, "share of the N codes that occur in any of the pictures"),
            Column("perplexity", "perplexity", "higher", 0, "exp of the entropy of the codes' frequencies, at most N"),
        ]
        values: dict[str, dict[str, float | None]] = {}
        for method, pictures in self.rows.items():
            values[method] = {}
            for column in columns:
                known = [v for row in pictures.values() if (v := row.get(column.key)) is not None]
                values[method][column.key] = float(np.mean(known)) if known else None
        for name, counts in self.counts.items():
            values[name] |= {"usage": usage(counts), "perplexity": perplexity(counts)}
        settings: dict[str, Settings] = {"ssim": {"window": "uniform7"}}
        count = len(next(iter(self.rows.values())))
        if self._features is not None and count > 1:
            gaussians = {method: fit_gaussian(np.stack(vectors)) for method, vectors in self.vectors.items()}
            for method in values:
                values[method][_FRECHET] = frechet_distance(gaussians[""], gaussians[method])
            columns.append(Column(_FRECHET, FRECHET_MOBILENET, "lower", 1, "whole pictures reduced to 224 pixels"))
            settings[_FRECHET] = {**self._features.settings(), "pictures": count}
            notes = (*notes, *filter(None, [FrechetScore(FRECHET_MOBILENET, 0.0, (count, count)).note]))
        codes = next(iter(self.counts.values()))
        found = f"{int(codes.sum())} codes in {count} pictures, out of a codebook of {len(codes)}"
        notes = (*notes, f"{found}: fewer pictures use fewer codes")
        rows = [
            Row(name, values[name], clips=len(self.people), frames=len(pictures),
                reference=name.endswith(", no codes"), pairs=pictures)
            for name, pictures in self.rows.items()
        ]  # fmt: skip
        return Table(title, tuple(columns), tuple(rows), settings, (*notes, "clips: people; frames: pictures"))
