"""Pictures in rows and columns with enlarged details: the paper's figure 4 (methods x frames) and figure 7."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from flowvqtalker.errors import UserError
from flowvqtalker.io.media import FPS, Picture, read_video
from flowvqtalker_eval.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REGIONS", "Box", "Grid", "choose", "face_boxes", "make", "named", "parse_box", "read_frames"]

logger = logging.getLogger(__name__)

#: Left, top, width, height in pixels of a picture.
Box = tuple[float, float, float, float]

#: Details that follow the face, and their width and height in face sizes (see :func:`face_boxes`).
REGIONS = {"mouth": (0.85, 0.6), "eyes": (1.15, 0.46)}

_DPI = 200
_FRAMES = ("#F0E442", "#56B4E9", "#E69F00", "#CC79A7")  # of the details, in order; they stand out against skin
_GAP, _LABEL, _HEADING = 0.02, 0.22, 0.2  # inches


def make(
    rows: Mapping[str, Sequence[Picture]],
    *,
    columns: Sequence[str] = (),
    zoom: Mapping[str, Sequence[Sequence[Box]]] | None = None,
    labels: bool = True,
    cell: float = 1.5,
    inset: float = 0.38,
) -> Figure:
    """Draw the grid.

    Arguments:
        rows: a row's label and its pictures, (H, W, 3) uint8 RGB of any sizes; every row has as many.
        columns: heading of each column; none are drawn where there are none.
        zoom: for each row and picture the boxes to mark and to enlarge into the picture's corners, at most four.
        labels: whether the rows' labels are drawn.
        cell: width of a picture in inches.
        inset: largest share of a picture's width or height that an enlarged detail takes.

    Raises:
        UserError: if there is no picture, the rows differ in length, or a box does not lie within its picture.
    """
    counts = {name: len(pictures) for name, pictures in rows.items()}
    if not counts or min(counts.values()) == 0:
        raise UserError("a grid needs at least one row with one picture; give --method NAME=FILE")
    if len(set(counts.values())) > 1:
        raise UserError("the rows of a grid need the same number of pictures: " + _listed(counts))
    count = next(iter(counts.values()))
    if columns and len(columns) != count:
        raise UserError(f"{len(columns)} headings for {count} columns; give one for each or none")
    with style.look():
        from matplotlib.patches import Rectangle

        first = next(iter(rows.values()))[0]
        width, height = round(cell * _DPI), round(cell * _DPI * first.shape[0] / first.shape[1])
        gap, left, top = (round(x * _DPI) for x in (_GAP, _LABEL if labels else 0, _HEADING if columns else 0))
        whole = left + count * (width + gap) - gap, top + len(rows) * (height + gap) - gap
        figure = style.new(whole[0] / _DPI, whole[1] / _DPI)
        figure.set_layout_engine("none")

        def axes(x: int, y: int, w: int, h: int) -> Any:
            """Axes at a place in pixels from the top left corner."""
            return figure.add_axes((x / whole[0], 1 - (y + h) / whole[1], w / whole[0], h / whole[1]))

        for r, (name, pictures) in enumerate(rows.items()):
            y = top + r * (height + gap)
            if labels:
                figure.text(left / 2 / whole[0], 1 - (y + height / 2) / whole[1], name, rotation=90,
                            ha="center", va="center")  # fmt: skip
            for c, picture in enumerate(pictures):
                x = left + c * (width + gap)
                scale = min(width / picture.shape[1], height / picture.shape[0])
                w, h = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
                corner = x + (width - w) // 2, y + (height - h) // 2
                place = axes(*corner, w, h)
                place.imshow(_resize(picture, w, h), extent=(0, picture.shape[1], picture.shape[0], 0), aspect="auto")
                style.bare(place)
                for k, box in enumerate(() if zoom is None else zoom[name][c]):
                    colour = _FRAMES[k % len(_FRAMES)]
                    place.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor=colour, linewidth=0.7))
                    cut = _cut(picture, box)
                    enlarge = inset * min(w / box[2], h / box[3])
                    a, b = max(1, round(box[2] * enlarge)), max(1, round(box[3] * enlarge))
                    detail = axes(corner[0] + (w - a if k % 2 == 0 else 0), corner[1] + (h - b if k < 2 else 0), a, b)
                    detail.imshow(_resize(cut, a, b), aspect="auto")
                    style.bare(detail)
                    for spine in detail.spines.values():
                        spine.set(visible=True, edgecolor=colour, linewidth=1.0)
        for c, heading in enumerate(columns):
            middle = left + c * (width + gap) + width / 2
            figure.text(middle / whole[0], 1 - top / 2 / whole[1], heading, ha="center", va="center")
    return figure


def _resize(picture: Picture, width: int, height: int) -> Picture:
    """Resample to the pixels of the printed figure: by area where it shrinks, else cubic."""
    import cv2

    how = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=how), dtype=np.uint8)


def _cut(picture: Picture, box: Box) -> Picture:
    x, y, w, h = (round(v) for v in box)
    if w < 2 or h < 2 or x < 0 or y < 0 or x + w > picture.shape[1] or y + h > picture.shape[0]:
        raise UserError(
            f"zoom {x},{y},{w},{h} does not lie within a picture of {picture.shape[1]}x{picture.shape[0]} pixels; "
            "give X,Y,W,H of a box inside it"
        )
    return picture[y : y + h, x : x + w]


def _listed(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def named(given: Iterable[str], option: str) -> dict[str, Path]:
    """NAME=FILE arguments of an option that may be repeated.

    Raises:
        UserError: if one has another form, a name comes twice, or a path does not exist.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"{option} {text!r}: give NAME=FILE, for instance {option} Ours=out/ours.mp4")
        if name in found:
            raise UserError(f"{option} {name!r} is given twice; give every row a name of its own")
        if not Path(path).exists():
            raise UserError(f"{option} {name}: {path} does not exist; check the name")
        found[name] = Path(path)
    return found


def parse_box(text: str) -> Box:
    """A box from ``X,Y,W,H``.

    Raises:
        UserError: if these are not four numbers of a box with an area.
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


def choose(length: int, count: int = 5, frames: Sequence[int] = (), times: Sequence[float] = ()) -> list[int]:
    """Numbers of the frames to show: those given, or ``count`` spread evenly over ``length`` frames (the middles of as
    many equal parts).

    Arguments:
        length: frames that every video has.
        frames: numbers at 25 fps, from 0.
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
    numbers = list(frames) or [round(time * FPS) for time in times]
    beyond = [number for number in numbers if not 0 <= number < length]
    if beyond:
        raise UserError(
            f"frame {', '.join(map(str, beyond))} is beyond the shortest video, which has {length} frames "
            f"({length / FPS:.2f} s); choose 0 to {length - 1}"
        )
    return numbers


def read_frames(path: Path, numbers: Sequence[int]) -> list[Picture]:
    """The frames with these numbers at 25 fps, in the order of the numbers."""
    wanted, last = set(numbers), max(numbers)
    found: dict[int, Picture] = {}
    for number, frame in enumerate(read_video(path)):
        if number in wanted:
            found[number] = frame
        if number >= last:
            break
    return [found[number] for number in numbers]


def face_boxes(pictures: Sequence[Picture], region: str, tracker: Any | None = None) -> list[Box | None]:
    """Where a region of the face lies in each picture; None where no face is found.

    The box is centred on the lips or the lids and measured in face sizes (the larger of the distance of the outer eye
    corners and 0.55 of the height from forehead to chin), so that every frame is enlarged alike however wide the mouth
    is open. It is moved into the picture where it reaches over the edge.

    Arguments:
        region: a key of :data:`REGIONS`.
        tracker: something with ``detect(picture)`` like :class:`flowvqtalker.face.tracker.FaceTracker`; one is opened
            where it is left out.
    """
    from flowvqtalker.face.topology import EYE_CORNERS, LIDS, LIPS

    if tracker is None:
        from flowvqtalker.face.tracker import FaceTracker

        with FaceTracker() as opened:
            return face_boxes(pictures, region, opened)
    boxes: list[Box | None] = []
    for picture in pictures:
        faces = tracker.detect(picture)
        if not faces:
            boxes.append(None)
            continue
        points = faces[0].landmarks[:, :2]
        centre = points[list(LIPS if region == "mouth" else LIDS)].mean(0)
        across = float(np.linalg.norm(points[EYE_CORNERS[0]] - points[EYE_CORNERS[1]]))
        size = max(across, 0.55 * float(np.linalg.norm(points[10] - points[152])))
        height, width = picture.shape[:2]
        w, h = (min(side * size, limit) for side, limit in zip(REGIONS[region], (width, height), strict=True))
        x = float(np.clip(centre[0] - w / 2, 0, width - w))
        y = float(np.clip(centre[1] - h / 2, 0, height - h))
        boxes.append((float(int(x)), float(int(y)), float(int(w)), float(int(h))))
    return boxes


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Figure 4: frames of several methods under each other, with a detail of each enlarged; PNG and PDF."""

    method: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FILE")] = ()
    """Video of a method and its label; repeat it for every row."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Real video, for the first row."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("grid.png")
    """Figure to write (.png or .pdf; both are written)."""
    count: int = 5
    """Frames, spread evenly over the shortest video."""
    frames: tuple[int, ...] = ()
    """Numbers of the frames at 25 fps instead, from 0."""
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
        """The figure, not yet written."""
        style.check_figure(self.output)
        if not 0.2 <= self.cell <= 10:
            raise UserError(f"--cell {self.cell}: choose 0.2 to 10 inches")
        zoom = [text for text in self.zoom if text != "none"]
        if len(zoom) > 4:
            raise UserError(f"--zoom: {len(zoom)} details, at most 4 fit into the corners")
        fixed = {text: parse_box(text) for text in zoom if text not in REGIONS}
        videos = named(self.method, "--method")
        if self.real is not None:
            if "Ground truth" in videos:
                raise UserError("--method 'Ground truth' and --real are the same row; give one of them")
            videos = {"Ground truth": self.real, **videos}
        if not videos:
            raise UserError("no video was given; add --method NAME=FILE once for every row")
        lengths = {name: sum(1 for _ in read_video(path)) for name, path in videos.items()}
        if max(lengths.values()) > min(lengths.values()) + 2:
            logger.warning("the videos differ in length (frames: %s); the shortest counts", _listed(lengths))
        numbers = choose(min(lengths.values()), self.count, self.frames, self.times)
        rows = {name: read_frames(path, numbers) for name, path in videos.items()}
        boxes: dict[str, list[list[Box]]] = {name: [[] for _ in numbers] for name in rows}
        for text in zoom:
            found = _scaled(rows, fixed[text]) if text in fixed else _followed(rows, text)
            for name, places in found.items():
                for own, box in zip(boxes[name], places, strict=True):
                    own.append(box)
        columns = [f"{number / FPS:.2f} s" for number in numbers]
        return make(rows, columns=columns, zoom=boxes, cell=self.cell)


def _scaled(rows: Mapping[str, Sequence[Picture]], box: Box) -> dict[str, list[Box]]:
    """A box in pixels of the first row, scaled to the size of each row's pictures."""
    first = next(iter(rows.values()))[0]
    _cut(first, box)
    found: dict[str, list[Box]] = {}
    for name, pictures in rows.items():
        sx, sy = pictures[0].shape[1] / first.shape[1], pictures[0].shape[0] / first.shape[0]
        found[name] = [(box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)] * len(pictures)
    return found


def _followed(rows: Mapping[str, Sequence[Picture]], region: str) -> dict[str, list[Box]]:
    """A region's box in every picture; where no face is found, that of the row's nearest picture with one."""
    found: dict[str, list[Box]] = {}
    for name, pictures in rows.items():
        boxes = {i: box for i, box in enumerate(face_boxes(pictures, region)) if box is not None}
        if not boxes:
            raise UserError(f"no face was found in the frames of {name}; give --zoom X,Y,W,H or --zoom none")
        if len(boxes) < len(pictures):
            logger.warning("%s: no face in %d of %d frames", name, len(pictures) - len(boxes), len(pictures))
        known = np.array(list(boxes))
        found[name] = [boxes[int(known[np.abs(known - i).argmin()])] for i in range(len(pictures))]
    return found
