"""What a leg shows of itself: curves of the numbers it logged, and sheets of held-out pictures."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from flowvqtalker.train.codebook import CodebookStage
from flowvqtalker.train.stage import Stage
from flowvqtalker.train.vqig import VQIGStage

__all__ = ["draw_curves", "last_rows", "sheet"]

logger = logging.getLogger(__name__)

_SIDE = 256
#: Numbers of the log that are no losses.
_SPEED = ("lr", "steps_per_s", "items_per_s", "data_wait", "gpu_busy", "memory_mib")


def sheet(stage: Stage, fabric: Fabric, count: int, path: Path) -> bool:
    """Write a sheet of held-out pictures, a row each; False for a stage without pictures.

    ``codebook``: picture, reconstruction. ``vqig``: source, target, warped source, generated.
    """
    rows: list[list[Tensor]] = []
    if count < 1 or not isinstance(stage, CodebookStage | VQIGStage):
        return False
    data = stage.dataset("val")
    for k in range(min(count, len(data))):
        item = data[k * len(data) // min(count, len(data))]
        if isinstance(stage, CodebookStage):
            assert isinstance(item, Tensor)
            real = item[None].to(fabric.device)
            rows.append([real, stage.autoencoder(real)[0]])
        else:
            assert isinstance(item, dict)
            batch = {key: value[None].to(fabric.device) for key, value in item.items()}
            found, source, _ = stage.generate(batch, True)
            rows.append([source, batch["target"], found.warped, found.image])
    lines = [torch.cat([_small(image) for image in row], dim=2) for row in rows]
    picture = torch.cat(lines, dim=1).permute(1, 2, 0).numpy()
    return bool(cv2.imwrite(str(path), np.ascontiguousarray(picture[..., ::-1])))


def _small(image: Tensor) -> Tensor:
    """(1, 3, H, W) in [-1, 1] to (3, 256, 256) uint8."""
    small = F.interpolate(image.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True)
    return ((small[0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def _read(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def last_rows(run: Path) -> dict[str, float]:
    """Speed of a run: means of what its log says of the machine, the first row left out, and the peak of its memory."""
    rows = _read(run / "log.csv")
    rows = rows[1:] or rows
    found = {}
    for key in _SPEED[1:]:
        values = [row[key] for row in rows if key in row and math.isfinite(row[key])]
        if values:
            found[key] = round(max(values) if key == "memory_mib" else sum(values) / len(values), 4)
    return found


def draw_curves(runs: Mapping[str, Path], folder: Path) -> Sequence[Path]:
    """Draw the losses and the held-out numbers of each run; nothing where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("matplotlib is not installed: the tables of numbers come without curves")
        return []
    drawn = []
    for name, run in runs.items():
        tables = [(table, _read(run / f"{table}.csv")) for table in ("log", "validation")]
        columns = [
            (f"{table}: {key}", [(row["step"], row[key]) for row in rows if key in row])
            for table, rows in tables
            for key in sorted({key for row in rows for key in row} - {"step", *_SPEED})
        ]
        if not columns:
            continue
        across = 4
        down = math.ceil(len(columns) / across)
        figure = Figure(figsize=(3.2 * across, 2.2 * down), layout="constrained")
        FigureCanvasAgg(figure)
        for place, (title, points) in enumerate(columns):
            axes = figure.add_subplot(down, across, place + 1)
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 3 else None)
            axes.set_title(title, fontsize=8)
            axes.tick_params(labelsize=7)
        path = folder / f"{name}-curves.png"
        figure.savefig(path, dpi=90)
        drawn.append(path)
    return drawn
