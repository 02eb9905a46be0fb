"""Aligned faces, which the stage ``emotion`` is trained on.

A shard holds no pictures of small clips, which most emotional ones are. This adds an optional file to it:

``flowvqtalker prepare-emotion-faces --data FOLDER --shard SHARD``

======================  =====================================================================================
``emotion_faces.npz``   ``clip``, ``row`` (M,): number of the clip and row in the shard's per-frame arrays; ``size``
                        (M,), ``data``: JPEGs of 144x144, back to back
======================  =====================================================================================

Clips with an emotion are decoded again and give frames spread evenly over them; of natural speech, of clips without a
label and of pictures, what the shard stores is taken. The faces are those of
:func:`flowvqtalker.face.alignment.align_faces` with a border of 16 pixels, for augmentation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import FPS, Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import align_faces, face_template
from flowvqtalker.face.crop import Crop

__all__ = ["FILE", "SIDE", "Faces", "PrepareEmotionFaces", "main", "write_faces"]

logger = logging.getLogger(__name__)

FILE = "emotion_faces.npz"
#: Side of a stored face in pixels: the classifier's 112 and a border of 16.
SIDE = 144

_NEUTRAL = EMOTIONS.index("neutral")

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PrepareEmotionFaces:
    """Which faces are kept."""

    data: Path
    """Folder with clips.csv and clips/, from which the shard was made."""
    shard: Path
    """The shard."""
    frames: int = 12
    """Faces of a clip with an emotion."""
    neutral: int = 4
    """Neutral clips of one person; of the emotions all are taken."""
    stored: int = 4
    """Faces of a clip with natural speech or without a label."""
    quality: int = 92
    """JPEG quality."""
    face_model: Path | None = None
    """Face model of the shard; None: the package's own."""


class Faces:
    """Read the faces of a shard.

    Attributes:
        clip, row: (M,) see the module.
    """

    def __init__(self, shard: str | Path) -> None:
        file = Path(shard) / FILE
        if not file.is_file():
            raise UserError(
                f"shard {shard} has no {FILE}; make it with `flowvqtalker prepare-emotion-faces --data FOLDER "
                f"--shard {shard}`"
            )
        with np.load(file) as content:
            self.clip: npt.NDArray[np.int64] = content["clip"]
            self.row: npt.NDArray[np.int64] = content["row"]
            self._end = np.cumsum(content["size"])
            self._data = content["data"]

    def __len__(self) -> int:
        return len(self.clip)

    def face(self, number: int) -> Pixels:
        """Face (144, 144, 3) uint8 RGB with a number in [0, M)."""
        start = int(self._end[number - 1]) if number else 0
        picture = cv2.imdecode(self._data[start : int(self._end[number])], cv2.IMREAD_COLOR)
        if picture is None:
            raise UserError(f"{FILE}: face {number} is damaged; make the file again")
        return cast(Pixels, np.ascontiguousarray(picture[..., ::-1]))


def write_faces(config: PrepareEmotionFaces) -> int:
    """Make the file; returns the number of faces.

    Raises:
        UserError: if the shard or the clips are missing.
    """
    from flowvqtalker.face.model import FaceModel
    from flowvqtalker.loading import load_face_model

    face = FaceModel.load(config.face_model) if config.face_model is not None else load_face_model()
    template = face_template(face).numpy()
    shard = Shard(config.shard)
    decoded = _to_decode(shard, config.neutral)
    clips, rows, jpegs = [], [], []
    for part in (_decoded(shard, decoded, config), _stored(shard, decoded, config)):
        for clip, row, frame, mesh in part:
            crop = align_faces(frame[None], mesh[None], template, SIDE)[0]
            done, code = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, config.quality])
            if not done:
                raise UserError("a face could not be encoded as JPEG")
            clips.append(clip)
            rows.append(row)
            jpegs.append(code.ravel())
    if not jpegs:
        raise UserError(f"shard {config.shard} has no clip with a face; prepare it with clips and pictures")
    beside = config.shard / (FILE + ".tmp.npz")
    np.savez(
        beside,
        clip=np.array(clips, np.int64),
        row=np.array(rows, np.int64),
        size=np.array([len(jpeg) for jpeg in jpegs], np.int64),
        data=np.concatenate(jpegs),
    )
    beside.replace(config.shard / FILE)
    return len(jpegs)


def _to_decode(shard: Shard, neutral: int) -> npt.NDArray[np.int64]:
    """Clips with an emotion, and some neutral ones of each person."""
    seen: dict[str, int] = {}
    chosen = []
    for number in shard.select(picture=False):
        emotion, who = int(shard.emotion[number]), str(shard.identity[number])
        if emotion < 0 or EMOTIONS[emotion] == "natural":
            continue
        if emotion == _NEUTRAL:
            seen[who] = seen.get(who, 0) + 1
            if seen[who] > neutral:
                continue
        chosen.append(int(number))
    return np.array(chosen, np.int64)


_Face = tuple[int, int, Pixels, npt.NDArray[Any]]


def _decoded(
    shard: Shard, numbers: Sequence[int] | npt.NDArray[np.int64], config: PrepareEmotionFaces
) -> Iterator[_Face]:
    """(clip, row, frame, mesh in its pixels) of frames spread over clips."""
    from flowvqtalker.data.clips import catalogue, read_frames, read_timing

    paths = {source.name: source.path for source in catalogue(config.data) if not source.picture}
    missing = [str(shard.name[n]) for n in numbers if str(shard.name[n]) not in paths]
    if missing:
        raise UserError(f"{len(missing)} clips of the shard are not in {config.data}, the first: {missing[0]}")
    for number in tqdm(numbers, desc="faces of clips", dynamic_ncols=True):
        path = paths[str(shard.name[number])]
        start = shard.rows(int(number)).start
        mesh = shard.landmarks(shard.rows(int(number)))
        seen = np.flatnonzero(np.isfinite(mesh).all((1, 2)))
        if not len(seen):
            continue
        ticks = seen[np.unique(np.linspace(0, len(seen) - 1, config.frames).round().astype(int))]
        times = read_timing(path).times
        own = np.abs(times[None] - ticks[:, None] / FPS).argmin(1)
        back = Crop(np.asarray(shard.crop[number], np.float64))
        frames = dict(read_frames(path, {int(n) for n in own}))
        for tick, mine in zip(ticks, own, strict=True):
            if int(mine) in frames:
                yield int(number), int(start + tick), frames[int(mine)], back.points_back(mesh[tick])


def _stored(shard: Shard, decoded: npt.NDArray[np.int64], config: PrepareEmotionFaces) -> Iterator[_Face]:
    """The same of pictures that the shard stores."""
    neutral = shard.emotion == _NEUTRAL
    others = np.setdiff1d(np.flatnonzero(~neutral | shard.picture), decoded)
    counts: dict[int, int] = {}
    for image in tqdm(shard.images_of(others), desc="faces of pictures", dynamic_ncols=True):
        clip, row = int(shard.image_clip[image]), int(shard.image_row[image])
        counts[clip] = counts.get(clip, 0) + 1
        if counts[clip] > config.stored:
            continue
        mesh = shard.landmarks(row)
        if np.isfinite(mesh).all():
            yield clip, row, shard.image(int(image)), mesh


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line (None: that of the process); returns the exit code."""
    import sys

    import tyro

    config = tyro.cli(PrepareEmotionFaces, prog="flowvqtalker prepare-emotion-faces", args=arguments)
    try:
        count = write_faces(config)
    except UserError as error:
        sys.stderr.write(f"flowvqtalker_eval.evaluators.emotion_faces: error: {error}\n")
        return 2
    sys.stdout.write(f"{config.shard / FILE}: {count} faces\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
