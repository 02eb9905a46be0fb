"""Measure the seam of a face pasted into its whole image, and the cost of pasting.

    python benchmarks/whole_picture.py [FACES] [--limit 12] [--times] [--poses] [--picture docs/whole.jpg]

FACES is a folder of portraits, of which the held-out ones in benchmarks/gallery.csv are used; without it, the public
domain portrait of scikit-image. Compared are two ways to paste the same frames (natural speech, and the same with twice
the head motion): `box`, the crop with soft edges over the static image, its colour shifted by the median difference at
the edge; and `mesh`, which `--full` uses. Means over the frames, in levels of 255:

- layers: absolute difference of the two layers where they are blended (0.1 < mask < 0.9), which shows as a seam or a
  double contour.
- border: absolute difference of the result and the untouched image along the last 4 pixels that may change.
- gradient: gradient of the result relative to the untouched image within 4 pixels of the border of what may change;
  above 1 means a new edge.
- outside: number of pixels changed where none may change.

--times prints processor milliseconds per frame for images of 512 and 2,048 pixels, --poses how far each movement may go
before the bent image folds (smallest area of a pixel), --picture draws poses of the public portrait.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from gallery import read_choice  # beside this file
from tqdm import tqdm

from flowvqtalker.constants import CROP
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.image import ImageArray, read_image
from flowvqtalker.pipeline import Talker
from flowvqtalker.render.paste import POSE_LIMITS, Paster, limit_pose

NAMES = ("pitch", "yaw", "roll", "across", "down", "depth")


def paster_of(talker: Talker, portrait: Portrait) -> Paster:
    """As :meth:`Talker.render` makes it."""
    return Paster(
        talker.face_model, portrait.crop, portrait.picture, portrait.image, portrait.identity, portrait.expression,
        portrait.pose,
    )  # fmt: skip


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Rows as Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def least_area(paster: Paster, beta: torch.Tensor, rho: torch.Tensor) -> float:
    """Of a pixel of the bent picture, outside of the face, the least area in the untouched one."""
    _, bend, mask = paster.field(beta, rho)
    (ay, ax), cell = np.gradient(bend, axis=(0, 1)), 4.0
    area = (1 + ax[..., 0] / cell) * (1 + ay[..., 1] / cell) - ax[..., 1] * ay[..., 0] / cell**2
    return float(area[mask < 0.5].min())


class Box:
    """The crop with soft edges over the picture."""

    def __init__(self, portrait: Portrait) -> None:
        self._picture = portrait.picture
        height, width = portrait.picture.shape[:2]
        y, x = np.abs(np.mgrid[:CROP, :CROP].astype(np.float32) + 0.5 - CROP / 2)
        outside = np.hypot(np.maximum(x - CROP / 2 + 64, 0), np.maximum(y - CROP / 2 + 64, 0))
        depth = np.clip((64 - outside) / 40, 0, 1)
        self._matrix = portrait.crop.inverse
        self._matrix[:, 2] += self._matrix[:, :2] @ [0.5, 0.5] - 0.5
        self.mask = cv2.warpAffine(depth * depth * (3 - 2 * depth), self._matrix, (width, height))
        self.edge = (self.mask > 0.1) & (self.mask < 0.9)

    def over(self, frame: ImageArray) -> npt.NDArray[np.float32]:
        """The face in the picture's pixels."""
        scale = float(np.hypot(*self._matrix[:, 0]))
        if scale < 1:
            frame = np.asarray(cv2.GaussianBlur(frame, (0, 0), 0.4 / scale), np.uint8)
        placed = cv2.warpAffine(frame, self._matrix, self.mask.shape[::-1], flags=cv2.INTER_CUBIC).astype(np.float32)
        return placed + np.clip(np.median((self._picture - placed)[self.edge], axis=0), -12, 12)


def scores(result: ImageArray, picture: ImageArray, touched: npt.NDArray[np.bool_], layers: float) -> dict[str, float]:
    """What the module's text says, of one frame."""
    kernel = np.ones((9, 9), np.uint8)
    inner = touched & (cv2.erode(touched.astype(np.uint8), kernel) == 0)
    band = inner | (~touched & (cv2.dilate(touched.astype(np.uint8), kernel) > 0))
    # The picture's own border is no seam.
    frame = np.zeros_like(band)
    frame[5:-5, 5:-5] = True
    inner, band = inner & frame, band & frame
    apart = np.abs(result.astype(np.float32) - picture).mean(-1)
    return {
        "layers": layers,
        "border": float(apart[inner].mean()) if inner.any() else 0.0,
        "gradient": float(_gradient(result)[band].mean() / _gradient(picture)[band].mean()) if band.any() else 1.0,
        "outside": float((apart[~touched] > 0).sum()),
    }


def _gradient(picture: ImageArray) -> npt.NDArray[np.float32]:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)).astype(np.float32)


def frames(talker: Talker, portrait: Portrait, speech: Path, scale: float, count: int) -> Iterator[
    tuple[ImageArray, torch.Tensor, torch.Tensor]
]:  # fmt: skip
    """Rendered crops with their motion, ``count`` of the first four seconds."""
    motion = talker.motion(speech, portrait, emotion="natural", seed=1, pose_scale=scale)
    blocks = []
    for block in limit_pose(motion, portrait.pose):
        blocks.append(block)
        if sum(map(len, blocks)) >= 100:
            break
    whole = Motion.join(blocks)
    beta, rho = whole.expression, whole.pose
    for at in np.linspace(0, len(beta) - 1, count).astype(int):
        yield next(iter(talker.render(portrait, [Motion(beta[at][None], rho[at][None])]))), beta[at], rho[at]


def compare(talker: Talker, portraits: list[ImageArray], speech: Path, count: int) -> list[list[str]]:
    """Rows of the table: method, movement and the means of the scores over portraits and frames."""
    kept: dict[tuple[str, str], list[dict[str, float]]] = {}
    for picture in tqdm(portraits, unit="portrait"):
        portrait = talker.portrait(picture)
        box, paster = Box(portrait), paster_of(talker, portrait)
        touched = np.zeros(picture.shape[:2], bool)
        touched[paster.area] = paster.touched
        for moves, scale in (("as spoken", 1.0), ("twice", 2.0)):
            for frame, beta, rho in frames(talker, portrait, speech, scale, count):
                over = box.over(frame)
                mixed = box.mask[..., None] * over + (1 - box.mask[..., None]) * picture
                mixed = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
                layers = float(np.abs(over - picture)[box.edge].mean()) if box.edge.any() else 0.0
                kept.setdefault(("box", moves), []).append(scores(mixed, picture, box.mask > 0, layers))
                under, face, mask, part = paster.layers(frame, beta, rho)
                rim = (mask > 0.1) & (mask < 0.9)
                layers = float(np.abs(under[part].astype(np.float32) - face)[rim].mean())
                result = paster(frame, beta, rho)
                kept.setdefault(("mesh", moves), []).append(scores(result, picture, touched, layers))
    return [
        [
            *key,
            *(f"{np.mean([one[name] for one in found]):.2f}" for name in ("layers", "border", "gradient", "outside")),
        ]
        for key, found in sorted(kept.items())
    ]


def times(talker: Talker, picture: ImageArray) -> list[list[str]]:
    """Processor milliseconds of pasting into pictures of two sizes: the median of 50."""
    rows = []
    for side in (512, 2048):
        portrait = talker.portrait(np.asarray(cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC)))
        paster = paster_of(talker, portrait)
        rho = portrait.pose.clone()
        rho[1] += 0.2
        spent = []
        for _ in range(50):
            start = time.thread_time()
            paster(portrait.image, portrait.expression, rho)
            spent.append(1000 * (time.thread_time() - start))
        area = paster.touched.shape
        rows.append([f"{side}", f"{area[1]}x{area[0]}", f"{np.median(spent):.1f}", f"{min(spent):.1f}"])
    return rows


def poses(talker: Talker, portraits: list[ImageArray]) -> list[list[str]]:
    """Least area that a pixel of the bent picture keeps (1: all of it, 0: folded), the worst of both directions and of
    the portraits, at parts of each limit."""
    rows = []
    parts = (0.5, 1.0, 1.5, 2.0)
    for axis, name in enumerate(NAMES):
        least = dict.fromkeys(parts, 1.0)
        for picture in portraits:
            portrait = talker.portrait(picture)
            paster = paster_of(talker, portrait)
            for part in parts:
                for sign in (-1, 1):
                    rho = portrait.pose.clone()
                    rho[axis] += sign * part * POSE_LIMITS[axis] * (float(rho[5]) if axis == 5 else 1.0)
                    least[part] = min(least[part], least_area(paster, portrait.expression, rho))
        limit = f"{np.degrees(POSE_LIMITS[axis]):.0f} degrees" if axis < 3 else f"{POSE_LIMITS[axis]}"
        rows.append([name, limit, *(f"{least[part]:.2f}" for part in parts)])
    return rows


def draw(talker: Talker, picture: ImageArray, output: Path) -> None:
    """Poses of one portrait at the limits, in a row."""
    portrait = talker.portrait(picture)
    cells = [picture]
    for axis, part in ((1, 0.7), (1, -1.0), (0, 0.8), (2, 0.9)):
        rho = portrait.pose.clone()
        rho[axis] += part * POSE_LIMITS[axis]
        cells.append(next(iter(talker.render(portrait, [Motion(portrait.expression[None], rho[None])], full=True))))
    left, top = (max(0, round(float(v) - 130)) for v in portrait.landmarks[:, :2].mean(0))
    row = np.concatenate([cell[top : top + 300, left : left + 270] for cell in cells], axis=1)
    cv2.imwrite(str(output), row[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, nargs="?")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--speech", type=Path, default=Path("src/flowvqtalker/assets/sample_speech.ogg"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--poses", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    talker = Talker.from_pretrained(options.weights)
    import skimage.data

    public = np.asarray(skimage.data.astronaut())
    portraits = [public]
    if options.faces is not None:
        choices = [one for one in read_choice(Path(__file__).with_name("gallery.csv")) if not one.derive]
        chosen = choices[:: max(1, len(choices) // options.limit)][: options.limit]
        portraits = [read_image(options.faces / one.file) for one in chosen]
    if options.times:
        print(table(["picture", "area", "median ms", "least ms"], times(talker, public)))
    if options.poses:
        print(table(["movement", "limit", "0.5", "1", "1.5", "2 limits"], poses(talker, portraits)))
    if options.picture is not None:
        draw(talker, public, options.picture)
    if not (options.times or options.poses or options.picture):
        print(
            table(
                ["pasted", "movement", "layers", "border", "gradient", "outside"],
                compare(talker, portraits, options.speech, options.frames),
            )
        )


if __name__ == "__main__":
    main()
