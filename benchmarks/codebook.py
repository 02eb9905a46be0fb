"""The codebook on held-out people: what its codes keep of a face, of its mouth and of its eyes.

    python benchmarks/codebook.py SHARD [--weights FOLDER | --run NAME=runs/codebook ...] [--limit 100]
    python benchmarks/codebook.py DATA/faces --table DATA/faces.csv

SHARD is a shard of ``flowvqtalker prepare``: its stills and the frames of its clips are measured apart. A folder of
images is measured as it is, with faces found by the tracker. The split is by identity; people are taken in turn.
Rows: each codebook, the same without codes, and the image reduced to as many bits by other means; columns as
:class:`flowvqtalker_eval.metrics.reenactment.Scores` describes them. Writes OUT-stills and OUT-frames (.md, .csv,
.json) and a grid of images (.png, .pdf). A codebook on a region of interest is measured on that region alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from held_out import in_turn
from safetensors.torch import load_file
from tqdm import tqdm

from flowvqtalker import weights
from flowvqtalker.data.images import find_images, read_rgb
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.tracker import FaceTracker
from flowvqtalker.io.image import ImageArray
from flowvqtalker.loading import choose_device, fast_dtype
from flowvqtalker.render.region_vqvae import STRIDE, RegionCodebookConfig, RegionVQVAE
from flowvqtalker.render.vqvae import CodebookConfig, VQAutoencoder
from flowvqtalker_eval.figures import grid, style
from flowvqtalker_eval.metrics.reenactment import Pair, Scores, to_image
from flowvqtalker_eval.metrics.regions import Box, as_tensor, regions
from flowvqtalker_eval.metrics.ssim import psnr
from flowvqtalker_eval.report import Column, Table, markdown, write

Portrait = tuple[str, ImageArray, dict[str, Box]]
Autoencoder = VQAutoencoder | RegionVQVAE
SIDE = 512


def build(values: dict[str, Any]) -> Autoencoder:
    """The untrained codebook of a configuration."""
    if "roi" in values:
        return RegionVQVAE(RegionCodebookConfig.from_dict(values))
    return VQAutoencoder(CodebookConfig.from_dict(values))


def load_codebook(folder: Path | None) -> Autoencoder:
    """E_h, C and D_h of a folder of weights (None: the package's own), or of a run of stage ``codebook``."""
    if folder is None or (folder / "manifest.json").is_file():
        tensors, values = weights.load("codebook", folder)
        model = build(values)
        weights.restore(model, tensors, "codebook", folder)
        return model.eval()
    about = folder / "config.json"
    if not about.is_file():
        raise UserError(f"{folder} holds neither a manifest.json nor a run (weights.safetensors and config.json)")
    content = json.loads(about.read_text(encoding="utf-8"))
    if content.get("stage") != "codebook":
        raise UserError(f"{folder} is a run of stage {content.get('stage', 'unknown')}; give one of stage codebook")
    model = build(content["config"])
    model.load_state_dict({key: value.float() for key, value in load_file(folder / "weights.safetensors").items()})
    return model.eval()


def stored(shard: Shard, stills: bool, limit: int) -> Iterator[Portrait]:
    """Single images of a shard's held-out people, or the stored frames of their clips."""
    numbers = shard.images_of(np.flatnonzero((shard.split == "val") & (shard.is_image == stills)))
    for i in in_turn([str(shard.identity[shard.image_clip[n]]) for n in numbers], limit):
        clip, row = int(shard.image_clip[numbers[i]]), int(shard.image_row[numbers[i]])
        name = f"{shard.name[clip]}/{row - int(shard.start[clip])}"
        yield name, shard.image(int(numbers[i])), regions(shard.landmarks(row))


def found(folder: Path, table: Path | None, limit: int) -> Iterator[Portrait]:
    """Images of the held-out people of a folder."""
    held = [(path, who) for path, who in find_images(folder, table) if split_of(who) == "val"]
    if not held:
        raise UserError(f"no image in {folder} shows a person of the validation split; give more images")
    with FaceTracker() as tracker:
        for i in in_turn([who for _, who in held], limit):
            image = read_rgb(held[i][0])
            if image.shape[:2] != (SIDE, SIDE):
                how = cv2.INTER_AREA if image.shape[0] > SIDE else cv2.INTER_CUBIC
                image = np.asarray(cv2.resize(image, (SIDE, SIDE), interpolation=how), np.uint8)
            faces = tracker.detect(image)
            yield held[i][0].stem, image, regions(faces[0].landmarks) if faces else {}


def reduced(image: ImageArray, side: int) -> ImageArray:
    """The image area-averaged to ``side`` x ``side`` pixels of 24 bits and enlarged again by cubic splines."""
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def webp_within(image: ImageArray, size: int) -> tuple[ImageArray, int]:
    """The image of the best PSNR that a WebP file of at most ``size`` bytes gives, over sides and qualities, and the
    file's size."""
    best: tuple[float, ImageArray, int] | None = None
    for side in (16, 24, 32, 48, 64, 96, 128, 192, 256):
        small = cv2.resize(np.ascontiguousarray(image[..., ::-1]), (side, side), interpolation=cv2.INTER_AREA)
        codes = [cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, q])[1] for q in range(1, 101, 3)]
        codes = [code for code in codes if len(code) <= size]
        if codes:
            code = max(codes, key=len)
            large = cv2.resize(cv2.imdecode(code, cv2.IMREAD_COLOR), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
            decoded = np.ascontiguousarray(large[..., ::-1])
            score = float(psnr(image, decoded)[0])
            if best is None or score > best[0]:
                best = score, decoded, len(code)
    assert best is not None
    return best[1], best[2]


class Bench:
    """Measures codebooks on one set of images."""

    def __init__(self, models: Mapping[str, Autoencoder], device: torch.device, frechet: bool) -> None:
        self.models, self.device, self.dtype = models, device, fast_dtype(device)
        self.scores = Scores(fid=frechet, device=device)
        rois = {(0, 0, SIDE, SIDE) if isinstance(m, VQAutoencoder) else m.config.roi for m in models.values()}
        if len(rois) > 1:
            raise UserError("the codebooks cover different regions; measure them one by one")
        (self.roi,) = rois
        config = next(iter(models.values())).config
        stride = STRIDE if isinstance(config, RegionCodebookConfig) else config.stride
        self.bits = self.roi[2] // stride * (self.roi[3] // stride) * math.ceil(math.log2(config.codes))
        self.counts = {name: np.zeros(model.config.codes, np.int64) for name, model in models.items()}
        for model in models.values():
            model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def cut(self, image: ImageArray, boxes: dict[str, Box]) -> tuple[ImageArray, dict[str, Box]]:
        """The region that the codes cover, and the boxes in it."""
        top, left, height, width = self.roi
        moved = {
            key: (min(max(x - left, 0), width - w), min(max(y - top, 0), height - h), w, h)
            for key, (x, y, w, h) in boxes.items()
        }
        return np.ascontiguousarray(image[top : top + height, left : left + width]), moved

    @torch.inference_mode()
    def add(self, name: str, image: ImageArray, boxes: dict[str, Box]) -> Mapping[str, ImageArray]:
        """Measure one image; returns what every method made of it."""
        images: dict[str, ImageArray] = {}
        plain: dict[str, ImageArray] = {}
        given = as_tensor(image, self.device).contiguous(memory_format=torch.channels_last)
        for label, model in self.models.items():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                z, codes = model.encode(given)
                images[label] = to_image(model.decode(codes)[0])
                plain[f"{label}, no codes"] = to_image(model.decoder(z)[0])
            self.counts[label] += np.bincount(codes.flatten().cpu().numpy(), minlength=len(self.counts[label]))
        images |= plain
        images["WebP of as many bits"] = webp_within(image, self.bits // 8)[0]
        for side in (max(1, math.isqrt(self.bits // 24)), 32):
            images[f"{side}x{side} pixels"] = reduced(image, side)
        self.scores.add(Pair(name, image, image, images, boxes))
        return images

    def table(self, title: str) -> Table:
        """Means over the images; usage and perplexity of the codes of all of them together."""
        table = self.scores.table(title)
        columns = (
            Column("usage", "codes used", "higher", 3, "share of the N codes that occur in any of the images"),
            Column("perplexity", "perplexity", "higher", 0, "exp of the entropy of the codes' frequencies, at most N"),
        )
        rows = []
        for row in table.rows:
            values = dict(row.values)
            if row.name in self.counts:
                counts = self.counts[row.name]
                share = counts[counts > 0] / counts.sum()
                values["usage"] = float((counts > 0).mean())
                values["perplexity"] = float(np.exp(-(share * np.log(share)).sum()))
            rows.append(replace(row, values=values, reference=row.name.endswith(", no codes")))
        note = f"{self.bits} bits an image; fewer images use fewer codes"
        return replace(table, rows=tuple(rows), columns=(*table.columns, *columns), notes=(*table.notes, note))


def measure(name: str, portraits: Iterable[Portrait], bench: Bench, options: argparse.Namespace) -> None:
    """Measure one set, print its table, write it and its grid."""
    every = max(1, options.limit // options.rows)
    shown: dict[str, list] = {}
    zoom: dict[str, list] = {}
    columns: list[str] = []
    for i, (label, whole, places) in enumerate(tqdm(portraits, desc=name)):
        image, boxes = bench.cut(whole, places)
        made = bench.add(label, image, boxes)
        if i % every == 0 and len(shown) < options.rows and boxes:
            columns = ["Held out", *made]
            shown[label] = [image, *made.values()]
            zoom[label] = [list(boxes.values())] * len(columns)
    base = options.output.with_name(f"{options.output.name}-{name}")
    table = bench.table(f"Codebook on {name} of held-out people from {options.data.name}")
    print(markdown(table))
    files = list(write(table, base))
    if shown:
        figure = grid.make(shown, columns=columns, zoom=zoom, labels=False, cell=1.6, inset=0.4)
        files += style.save(figure, base.with_suffix(".png"))
    print(", ".join(map(str, files)))


def main() -> None:
    """Measure, print the tables, write them and the grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="SHARD_OR_FOLDER")
    parser.add_argument("--table", type=Path, help="csv with the columns file and identity of a folder's images")
    parser.add_argument("--weights", type=Path, help="folder of weights; default: those of the package")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER", help="run of stage codebook")
    parser.add_argument("--limit", type=int, default=100, help="images of each set; 0 takes all")
    parser.add_argument("--rows", type=int, default=4, help="rows of the grid")
    parser.add_argument("--no-frechet", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/codebook"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device)
        runs = style.named_paths(
            (text if "=" in text else f"{Path(text).name}={text}" for text in options.run), "--run"
        )
        places = {"codebook": options.weights} if options.weights is not None or not runs else {}
        models = {name: load_codebook(path) for name, path in {**places, **runs}.items()}
        if (options.data / "index.npz").is_file():
            shard = Shard(options.data)
            sets = {name: stored(shard, name == "stills", options.limit) for name in ("stills", "frames")}
        else:
            sets = {"stills": found(options.data, options.table, options.limit)}
        for name, portraits in sets.items():
            first = next(portraits, None)
            if first is not None:
                bench = Bench(models, device, not options.no_frechet)
                measure(name, (p for part in ([first], portraits) for p in part), bench, options)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
