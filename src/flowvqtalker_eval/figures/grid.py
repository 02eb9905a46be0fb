"""Images in rows and columns with enlarged details: Fig. 4 of the paper (methods by frames), and Fig. 7."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import EYE_CORNERS, LIDS, LIPS
from flowvqtalker.face.tracker import FaceTracker
from flowvqtalker.io.image import ImageArray
from flowvqtalker.io.video import read_video
from flowvqtalker_eval.figures import style
from flowvqtalker_eval.tables.pairs import named_paths

__all__ = ["REGIONS", "Box", "Grid", "choose_frames", "face_boxes", "make", "parse_box", "read_frames"]

logger = logging.getLogger(__name__)

#: Left, top, width and height in pixels of an image.
Box = tuple[float, float, float, float]

#: Details that follow the face: width and height in face sizes (see :func:`face_boxes`).
REGIONS = {"mouth": (0.85, 0.6), "eyes": (1.15, 0.46)}

_DPI = 200
_BOX_COLOURS = ("#F0E442", "#56B4E9", "#E69F00", "#CC79A7")  # in order of the details; they stand out against skin
_GAP, _LABEL, _HEADING = 0.02, 0.22, 0.2  # inches


class _Canvas:
    """A figure addressed in pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = style.new(width / _DPI, height / _DPI)
        self.figure.set_layout_engine("none")

    def text(self, x: float, y: float, text: str, rotation: float = 0) -> None:
        """Text centred at a point."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, rotation=rotation, ha="center", va="center")

    def image(self, image: ImageArray, x: int, y: int, w: int, h: int) -> Axes:
        """An image resampled to w by h pixels; its axes count the image's own pixels."""
        place = x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height
        axes = self.figure.add_axes(place)
        axes.imshow(_resize(image, w, h), extent=(0, image.shape[1], image.shape[0], 0), aspect="auto")
        style.hide_axes(axes)
        return axes

    def cell(
        self, image: ImageArray, x: int, y: int, width: int, height: int, boxes: Sequence[Box], inset: float
    ) -> None:
        """An image centred in a cell, with boxes marked and enlarged into its corners."""
        scale = min(width / image.shape[1], height / image.shape[0])
        w, h = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        x, y = x + (width - w) // 2, y + (height - h) // 2
        axes = self.image(image, x, y, w, h)
        for k, box in enumerate(boxes):
            colour = _BOX_COLOURS[k % len(_BOX_COLOURS)]
            axes.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor=colour, linewidth=0.7))
            enlarge = inset * min(w / box[2], h / box[3])
            a, b = max(1, round(box[2] * enlarge)), max(1, round(box[3] * enlarge))
            corner = x + (w - a if k % 2 == 0 else 0), y + (h - b if k < 2 else 0)
            detail = self.image(_cut(image, box), *corner, a, b)
            for spine in detail.spines.values():
                spine.set(visible=True, edgecolor=colour, linewidth=1.0)


def make(
    rows: Mapping[str, Sequence[ImageArray]],
    *,
    columns: Sequence[str] = (),
    zoom: Mapping[str, Sequence[Sequence[Box]]] | None = None,
    labels: bool = True,
    cell: float = 1.5,
    inset: float = 0.38,
) -> Figure:
    """Draw the grid.

    Arguments:
        rows: label of each row and its images, (H, W, 3) uint8 RGB of any sizes; rows are equally long.
        columns: heading of each column, or none.
        zoom: for each row and image up to four boxes to mark and to enlarge into the image's corners.
        labels: draw the labels of the rows.
        cell: width of an image in inches.
        inset: largest share of an image's width or height that an enlarged detail takes.

    Raises:
        UserError: if there is no image, the rows differ in length, or a box does not lie within its image.
    """
    counts = {name: len(images) for name, images in rows.items()}
    if not counts or min(counts.values()) == 0:
        raise UserError("a grid needs at least one row with one image; give --method NAME=FILE")
    if len(set(counts.values())) > 1:
        raise UserError(f"the rows of a grid need the same number of images: {_listed(counts)}")
    count = next(iter(counts.values()))
    if columns and len(columns) != count:
        raise UserError(f"{len(columns)} headings for {count} columns; give one for each or none")
    first = next(iter(rows.values()))[0]
    width, height = round(cell * _DPI), round(cell * _DPI * first.shape[0] / first.shape[1])
    gap, left, top = (round(x * _DPI) for x in (_GAP, _LABEL if labels else 0, _HEADING if columns else 0))
    with style.look():
        canvas = _Canvas(left + count * (width + gap) - gap, top + len(rows) * (height + gap) - gap)
        for r, (name, images) in enumerate(rows.items()):
            y = top + r * (height + gap)
            if labels:
                canvas.text(left / 2, y + height / 2, name, rotation=90)
            for c, image in enumerate(images):
                boxes = () if zoom is None else zoom[name][c]
                canvas.cell(image, left + c * (width + gap), y, width, height, boxes, inset)
        for c, heading in enumerate(columns):
            canvas.text(left + c * (width + gap) + width / 2, top / 2, heading)
    return canvas.figure


def _resize(image: ImageArray, width: int, height: int) -> ImageArray:
    """Resample to the pixels of the printed figure: area averaging to shrink, else cubic."""
    how = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=how), dtype=np.uint8)


def _cut(image: ImageArray, box: Box) -> ImageArray:
    x, y, w, h = (round(v) for v in box)
    if w < 2 or h < 2 or x < 0 or y < 0 or x + w > image.shape[1] or y + h > image.shape[0]:
        raise UserError(
            f"zoom {x},{y},{w},{h} does not lie within an image of {image.shape[1]}x{image.shape[0]} pixels; "
            "give X,Y,W,H of a box inside it"
        )
    return image[y : y + h, x : x + w]


def _listed(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def parse_box(text: str) -> Box:
    """A box from ``X,Y,W,H``.

    Raises:
        UserError: unless these are four numbers of a box of at least 2x2 pixels.
    """
    try:
        x, y, w, h = (float(part) for part in text.split(","))
    except ValueError:
        x = y = w = h = -1.0
    if min(x, y) < 0 or min(w, h) < 2:
        raise UserError(
            f"zoom {text!r}: give X,Y,W,H in pixels (W and H at least 2), or one of {', '.join(REGIONS)}, none"
        )
    return x, y, w, h


def choose_frames(length: int, count: int = 5, frames: Sequence[int] = (), times: Sequence[float] = ()) -> list[int]:
    """Indices of the frames to show.

    Arguments:
        length: number of frames that every video has.
        count: frames to spread evenly (the middles of equal parts), unless frames or times are given.
        frames: indices at 25 fps.
        times: seconds.

    Raises:
        UserError: if there are fewer frames than wanted, or one lies beyond the end.
    """
    if frames and times:
        raise UserError("both --frames and --times are given; choose one of them")
    if not frames and not times:
        if not 1 <= count <= length:
            raise UserError(f"--count {count}: the shortest video has {length} frames, choose 1 to {length}")
        return [int((2 * i + 1) * length / (2 * count)) for i in range(count)]
    indices = list(frames) or [round(time * FPS) for time in times]
    beyond = [index for index in indices if not 0 <= index < length]
    if beyond:
        raise UserError(
            f"frame {', '.join(map(str, beyond))} is beyond the shortest video, which has {length} frames "
            f"({length / FPS:.2f} s); choose 0 to {length - 1}"
        )
    return indices


def read_frames(path: Path, indices: Sequence[int]) -> list[ImageArray]:
    """The frames with these indices at 25 fps, in the order given."""
    wanted, last = set(indices), max(indices)
    found: dict[int, ImageArray] = {}
    for index, frame in enumerate(read_video(path)):
        if index in wanted:
            found[index] = frame
        if index >= last:
            break
    return [found[index] for index in indices]


def face_boxes(images: Sequence[ImageArray], region: str, tracker: FaceTracker | None = None) -> list[Box | None]:
    """Where a region of the face lies in each image; None where no face is found.

    The box is centred on the lips or the lids. Its size follows the face (the larger of the distance of the outer eye
    corners and 0.55 of the height from forehead to chin), not the opening of the mouth, so every frame is enlarged
    alike. A box that reaches over the edge is moved into the image.

    Arguments:
        images: (H, W, 3) uint8 RGB.
        region: a key of :data:`REGIONS`.
        tracker: a :class:`flowvqtalker.face.tracker.FaceTracker`; None opens one.
    """
    if tracker is None:
        with FaceTracker() as opened:
            return face_boxes(images, region, opened)
    boxes: list[Box | None] = []
    for image in images:
        faces = tracker.detect(image)
        if not faces:
            boxes.append(None)
            continue
        points = faces[0].landmarks[:, :2]
        centre = points[list(LIPS if region == "mouth" else LIDS)].mean(0)
        across = float(np.linalg.norm(points[EYE_CORNERS[0]] - points[EYE_CORNERS[1]]))
        size = max(across, 0.55 * float(np.linalg.norm(points[10] - points[152])))
        limits = np.array(image.shape[1::-1], float)
        extent = np.minimum(np.array(REGIONS[region]) * size, limits)
        x, y = np.clip(centre - extent / 2, 0, limits - extent)
        boxes.append((float(int(x)), float(int(y)), float(int(extent[0])), float(int(extent[1]))))
    return boxes


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Figure 4: frames of several methods in rows, with a detail of each enlarged; PNG and PDF."""

    method: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FILE")] = ()
    """Label and video of a method; repeat it for every row."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Real video, for the first row."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("grid.png")
    """Figure to write (.png or .pdf; both are written)."""
    count: int = 5
    """Number of frames, spread evenly over the shortest video."""
    frames: tuple[int, ...] = ()
    """Indices of the frames at 25 fps instead, from 0."""
    times: tuple[float, ...] = ()
    """Times of the frames in seconds instead."""
    zoom: tuple[str, ...] = ("mouth",)
    """Details to enlarge: mouth, eyes, none, or X,Y,W,H in pixels of the first row's video (up to four)."""
    cell: float = 1.5
    """Width of a frame in inches."""

    def run(self) -> None:
        """Read the frames, find the details and write the figure."""
        print(", ".join(str(path) for path in style.save(self.figure(), self.output)))

    def figure(self) -> Figure:
        """The figure, before it is written."""
        style.check_figure(self.output)
        if not 0.2 <= self.cell <= 10:
            raise UserError(f"--cell {self.cell}: choose 0.2 to 10 inches")
        zoom = [text for text in self.zoom if text != "none"]
        if len(zoom) > 4:
            raise UserError(f"--zoom: {len(zoom)} details given, at most 4 fit into the corners")
        fixed = {text: parse_box(text) for text in zoom if text not in REGIONS}
        videos = self._videos()
        lengths = {name: sum(1 for _ in read_video(path)) for name, path in videos.items()}
        if max(lengths.values()) > min(lengths.values()) + 2:
            logger.warning("the videos differ in length (frames: %s); the shortest counts", _listed(lengths))
        indices = choose_frames(min(lengths.values()), self.count, self.frames, self.times)
        rows = {name: read_frames(path, indices) for name, path in videos.items()}
        boxes: dict[str, list[list[Box]]] = {name: [[] for _ in indices] for name in rows}
        for text in zoom:
            found = _scaled(rows, fixed[text]) if text in fixed else _followed(rows, text)
            for name, places in found.items():
                for own, box in zip(boxes[name], places, strict=True):
                    own.append(box)
        columns = [f"{index / FPS:.2f} s" for index in indices]
        return make(rows, columns=columns, zoom=boxes, cell=self.cell)

    def _videos(self) -> dict[str, Path]:
        videos = named_paths(self.method, "--method")
        if self.real is not None:
            if "Ground truth" in videos:
                raise UserError("--method 'Ground truth' and --real are the same row; give one of them")
            videos = {"Ground truth": self.real, **videos}
        if not videos:
            raise UserError("no video was given; add --method NAME=FILE once for every row")
        return videos


def _scaled(rows: Mapping[str, Sequence[ImageArray]], box: Box) -> dict[str, list[Box]]:
    """A box in pixels of the first row, scaled to the image size of each row."""
    first = next(iter(rows.values()))[0]
    _cut(first, box)
    found: dict[str, list[Box]] = {}
    for name, images in rows.items():
        sx, sy = images[0].shape[1] / first.shape[1], images[0].shape[0] / first.shape[0]
        found[name] = [(box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)] * len(images)
    return found


def _followed(rows: Mapping[str, Sequence[ImageArray]], region: str) -> dict[str, list[Box]]:
    """A region's box in every image; without a face, the box of the nearest image of the row that has one."""
    found: dict[str, list[Box]] = {}
    for name, images in rows.items():
        boxes = {i: box for i, box in enumerate(face_boxes(images, region)) if box is not None}
        if not boxes:
            raise UserError(f"no face was found in the frames of {name}; give --zoom X,Y,W,H or --zoom none")
        if len(boxes) < len(images):
            logger.warning("%s: no face in %d of %d frames", name, len(images) - len(boxes), len(images))
        known = np.array(list(boxes))
        found[name] = [boxes[int(known[np.abs(known - i).argmin()])] for i in range(len(images))]
    return found
