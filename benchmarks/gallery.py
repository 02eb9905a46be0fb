"""Render portraits of every kind: sheets with a row of frames for each held-out portrait.

    python benchmarks/gallery.py FACES [--choice benchmarks/gallery.csv] [--output out/gallery] [--weights FOLDER]

FACES is a folder of portraits. The choice lists files in it, the kind that each is an example of, and how to derive
another image from it (grey, painted, pencil, width N, turn DEGREES, whole, cut). Without FACES, the public domain
portrait of scikit-image is used in every derived form. Columns: the crop of the portrait; happy and surprised; the
widest open mouth of some speech; the head turned by 15 degrees; a blink; the whole image with the head turned. Each row
is a file in the output folder, named by the weights, so that an interrupted run resumes; `sheet_1.png` ... join them.
`gallery.csv` holds CSIM of each frame to the portrait, and the distance of the lips, tracked again in the frame, from
the motion's, in percent of the distance between the outer eye corners.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from flowvqtalker import weights
from flowvqtalker.constants import SAMPLE_RATE
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.face.topology import EYE_CORNERS, LIPS
from flowvqtalker.face.tracker import FaceTracker
from flowvqtalker.io import audio as decode
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.image import ImageArray, read_image
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.pipeline import Talker
from flowvqtalker_eval.metrics.identity import FaceIdentity, csim

COLUMNS = ("portrait", "happy", "surprised", "open mouth", "turned", "blink", "whole picture")
DERIVED = ("grey", "painted", "pencil", "width", "turn", "whole", "cut")
_CELL, _ROWS = 256, 6
_SECONDS = 4.0
_YAW = 15.0
_JAW, _BLINK = 25, (9, 10)  # jawOpen, eyeBlinkLeft and -Right in the order of the blendshapes


@dataclass(frozen=True)
class Choice:
    """One portrait of the gallery."""

    file: str
    kind: str
    derive: str = ""


@dataclass
class Row:
    """Result for one portrait."""

    choice: Choice
    cells: list[ImageArray]
    said: str = ""
    csim: list[float] = field(default_factory=list)
    lips: list[float] = field(default_factory=list)


def read_choice(path: Path) -> list[Choice]:
    """The portraits named in a csv with the columns file, kind and derive.

    Raises:
        UserError: if a column is missing or a derivation is unknown.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(rows[0]) != {"file", "kind", "derive"}:
        raise UserError(f"{path} must have rows with the columns file, kind, derive")
    for row in rows:
        if row["derive"] and row["derive"].split()[0] not in DERIVED:
            raise UserError(f"{path}: unknown derivation {row['derive']!r}; choose one of {', '.join(DERIVED)}")
    return [Choice(row["file"], row["kind"], row["derive"]) for row in rows]


def check_held_out(faces: Path, choices: list[Choice]) -> None:
    """Check by the table of identities beside the folder, if there is one, that nobody shown was trained on.

    Raises:
        UserError: with the files of people in the training split.
    """
    table = faces.with_suffix(".csv")
    if not table.is_file():
        return
    with table.open(encoding="utf-8", newline="") as file:
        people = {row["file"]: row["identity"] for row in csv.DictReader(file)}
    known = [choice.file for choice in choices if choice.file in people and split_of(people[choice.file]) != "val"]
    if known:
        raise UserError(f"{', '.join(known)} may have been trained on; choose people of the validation split")


def derive(picture: ImageArray, how: str, face_width: float = 0.0) -> ImageArray:
    """Derive another image (H, W, 3) from a portrait.

    Arguments:
        how: empty, or grey, painted (OpenCV's stylization), pencil (its pencilSketch), width N (pixels of the face),
            turn N (degrees), whole (small in an image of 1600x1200), cut (without the left third of the face).
        face_width: in pixels; the face is in the middle of the image.
    """
    name, _, value = how.partition(" ")
    height, width = picture.shape[:2]
    if name == "":
        return picture
    if name == "grey":
        return np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    if name == "painted":
        return np.asarray(cv2.stylization(picture, sigma_s=60, sigma_r=0.45), np.uint8)
    if name == "pencil":
        return np.asarray(cv2.pencilSketch(picture, sigma_s=40, sigma_r=0.07, shade_factor=0.05)[1], np.uint8)
    if name == "width":
        factor = float(value) / face_width
        return np.asarray(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
    if name == "turn":
        side = int(np.hypot(height, width))
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), float(value), 1)
        matrix[:, 2] += (side - width) // 2, (side - height) // 2
        return np.asarray(cv2.warpAffine(picture, matrix, (side, side), borderValue=(128, 128, 128)), np.uint8)
    if name == "whole":
        scene = cv2.GaussianBlur(cv2.resize(picture, (1600, 1200)), (0, 0), 60)
        small = cv2.resize(picture, (320, 320), interpolation=cv2.INTER_AREA)
        scene[700:1020, 1000:1320] = small
        return np.asarray(scene, np.uint8)
    if name == "cut":
        return np.ascontiguousarray(picture[:, int(width / 2 - face_width / 6) :])
    raise UserError(f"unknown derivation {how!r}; choose one of {', '.join(DERIVED)}")


class _Said(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Gallery:
    """Render rows.

    Arguments:
        talker: with all parts.
        speech: (n,) samples at 16 kHz, of which the first seconds are used.
        scores: also measure CSIM and lips.
    """

    def __init__(self, talker: Talker, speech: npt.NDArray[np.float32], *, scores: bool = True) -> None:
        self.talker, self.speech, self.scores = talker, speech[: int(_SECONDS * SAMPLE_RATE)], scores
        self._tracker: FaceTracker | None = None
        self._identity = FaceIdentity()

    def row(self, choice: Choice, picture: ImageArray) -> Row:
        """One portrait in all columns; if it cannot be animated, empty cells and the reason."""
        handler = _Said()
        log = logging.getLogger("flowvqtalker")
        log.addHandler(handler)
        try:
            width = 0.0
            if choice.derive.startswith(("width", "cut")):
                left, right = np.quantile(self.talker.portrait(picture).landmarks[:, 0], [0, 1])
                width = float(right - left)
                if choice.derive == "cut":  # counted from the middle of the face
                    middle = round(float(left + right) / 2)
                    picture = np.ascontiguousarray(picture[:, max(0, 2 * middle - picture.shape[1]) : 2 * middle])
            handler.lines.clear()
            portrait = self.talker.portrait(derive(picture, choice.derive, width))
            cells = self._cells(portrait)
        except UserError as error:
            blank = np.full((_CELL, _CELL, 3), 60, np.uint8)
            return Row(
                choice, [_fitted(derive(picture, choice.derive, width)), *[blank] * (len(COLUMNS) - 1)], str(error)
            )
        finally:
            log.removeHandler(handler)
        row = Row(choice, [_fitted(cell) for cell, _ in cells], "; ".join(handler.lines))
        if self.scores:
            self._measure(row, portrait, cells[1:-1])
        return row

    def close(self) -> None:
        """Free the tracker."""
        if self._tracker is not None:
            self._tracker.close()

    def _cells(self, portrait: Portrait) -> list[tuple[ImageArray, tuple[torch.Tensor, torch.Tensor] | None]]:
        model = self.talker.face_model

        def motion(emotion: str) -> tuple[torch.Tensor, torch.Tensor]:
            stream = self.talker.stream(portrait, MotionOptions(emotion=emotion, seed=1, blink_rate=30))
            whole = Motion.join([stream.push(self.speech), stream.finish()])
            return whole.expression, whole.pose

        frames = []
        for emotion in ("happy", "surprised"):
            beta, rho = motion(emotion)
            at = len(beta) // 2 + int(model.blendshapes(beta[len(beta) // 2 :])[:, list(_BLINK)].sum(1).argmin())
            frames.append((beta[at], rho[at]))
        beta, rho = motion("natural")
        shapes = model.blendshapes(beta)
        for at in (int(shapes[:, _JAW].argmax()), None, int(shapes[:, list(_BLINK)].sum(1).argmax())):
            if at is None:
                away = portrait.pose.clone()
                # Turn away from the side that the head already shows, or it would become a profile.
                away[1] += math.radians(_YAW) * (-1 if float(portrait.pose[1]) > 0 else 1)
                frames.append((beta[len(beta) // 2], away))
            else:
                frames.append((beta[at], rho[at]))
        shown: list[tuple[ImageArray, tuple[torch.Tensor, torch.Tensor] | None]] = [(portrait.image, None)]
        for one in frames:
            block = [Motion(one[0][None], one[1][None])]
            shown.append((next(iter(self.talker.render(portrait, block))), one))
        block = [Motion(frames[3][0][None], frames[3][1][None])]
        return [*shown, (next(iter(self.talker.render(portrait, block, full=True))), frames[3])]

    def _measure(
        self, row: Row, portrait: Portrait, cells: list[tuple[ImageArray, tuple[torch.Tensor, torch.Tensor] | None]]
    ) -> None:
        self._tracker = self._tracker or FaceTracker()
        whose = self._embedding(portrait.image)
        for cell, motion in cells:
            assert motion is not None
            row.csim.append(csim(whose, self._embedding(cell)[None]))
            faces = self._tracker.detect(cell)
            if not faces:
                row.lips.append(math.nan)
                continue
            beta, rho = motion
            meant = self.talker.face_model.project(portrait.identity, beta, rho)[:, :2].numpy()
            eyes = np.linalg.norm(meant[EYE_CORNERS[0]] - meant[EYE_CORNERS[1]])
            off = np.linalg.norm((faces[0].landmarks[:, :2] - meant)[list(LIPS)], axis=1).mean()
            row.lips.append(float(100 * off / eyes))

    def _embedding(self, picture: ImageArray) -> npt.NDArray[np.float32]:
        try:
            return self._identity.portrait(picture)
        except UserError:  # dlib finds fewer faces
            return np.full(128, np.nan, np.float32)


def _fitted(picture: ImageArray) -> ImageArray:
    """An image in a square cell, padded with grey."""
    height, width = picture.shape[:2]
    factor = _CELL / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    cell = np.full((_CELL, _CELL, 3), 60, np.uint8)
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    top, left = (_CELL - size[1]) // 2, (_CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    return cell


def strip(row: Row) -> ImageArray:
    """A row as an image, with its kind written above."""
    band = np.zeros((26, _CELL * len(COLUMNS), 3), np.uint8)
    text = f"{row.choice.kind} ({row.choice.file})" + (f": {row.said}" if row.said else "")
    cv2.putText(band, text[:200], (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([band, np.concatenate(row.cells, axis=1)])


def main() -> None:
    """Render what is missing, then write sheets and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, nargs="?")
    parser.add_argument("--choice", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--output", type=Path, default=Path("out/gallery"))
    parser.add_argument("--speech", type=Path, default=Path("src/flowvqtalker/assets/sample_speech.ogg"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    entries = weights.manifest(options.weights)
    mark = hashlib.sha256("".join(entries[name].sha256 for name in sorted(entries)).encode()).hexdigest()[:8]
    gallery = Gallery(Talker.from_pretrained(options.weights), np.concatenate(list(decode.stream(options.speech))))
    strips, table = [], []
    for choice, picture in tqdm(list(_pictures(options))[: options.limit], unit="portrait"):
        name = f"{mark}_{Path(choice.file).stem}_{choice.derive.replace(' ', '')}"
        made, scored = options.output / f"{name}.png", options.output / f"{name}.csv"
        if not (made.is_file() and scored.is_file()):
            row = gallery.row(choice, picture)
            cv2.imwrite(str(made), strip(row)[..., ::-1])
            values = [*(f"{v:.3f}" for v in row.csim), *(f"{v:.1f}" for v in row.lips)] or [""] * 10
            with scored.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow([choice.kind, choice.file, choice.derive, *values, row.said])
        strips.append(made)
        table.append(scored.read_text(encoding="utf-8").strip())
    names = [f"{what} {column}" for what in ("csim", "lips") for column in COLUMNS[1:-1]]
    header = ",".join(["kind", "file", "derive", *names, "said"])
    (options.output / "gallery.csv").write_text("\n".join([header, *table]) + "\n", encoding="utf-8")
    for k in range(0, len(strips), _ROWS):
        sheet = np.concatenate([cv2.imread(str(file)) for file in strips[k : k + _ROWS]])
        cv2.imwrite(str(options.output / f"sheet_{k // _ROWS + 1}.png"), sheet)
    gallery.close()
    print(f"{options.output}: {len(strips)} portraits, columns {', '.join(COLUMNS)}")


def _pictures(options: argparse.Namespace) -> Iterator[tuple[Choice, ImageArray]]:
    if options.faces is None:
        import skimage.data

        for how in ("", "grey", "painted", "pencil", "turn 30", "turn 180", "whole"):
            yield Choice("astronaut.png", how or "plain", how), np.asarray(skimage.data.astronaut())
        return
    choices = read_choice(options.choice)
    check_held_out(options.faces, choices)
    for choice in choices:
        yield choice, read_image(options.faces / choice.file)


if __name__ == "__main__":
    main()
