"""Command ``prepare-emotion-faces``: aligned faces, which the stage ``emotion`` is trained on.

A shard stores no images of small clips, and most emotional clips are small. This adds an optional file to it:

======================  =====================================================================================
``emotion_faces.npz``   ``clip``, ``row`` (M,): number of the clip and row in the shard's per-frame arrays; ``size``
                        (M,), ``data``: JPEGs of 144x144, back to back
======================  =====================================================================================

Clips with an emotion are decoded again and give frames spread evenly over them; for natural speech, clips without a
label and still images, the images that the shard stores are used. The faces are those of
:func:`flowvqtalker.face.alignment.align_faces` with a border of 16 pixels for augmentation.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flowvqtalker.constants import EMOTIONS, FPS
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import align_faces, face_template
from flowvqtalker.face.crop import Crop

__all__ = ["FILE", "SIDE", "Faces", "PrepareEmotionFaces"]

logger = logging.getLogger(__name__)

FILE = "emotion_faces.npz"
#: Side of a stored face in pixels: the classifier's 112 and a border of 16.
SIDE = 144

_NEUTRAL, _NATURAL = EMOTIONS.index("neutral"), EMOTIONS.index("natural")

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
#: Clip, row in the shard, frame, mesh in its pixels.
_Face = tuple[int, int, Pixels, npt.NDArray[Any]]


class Faces:
    """The faces of a shard.

    Attributes:
        clip, row: (M,) number of the clip, and row in the shard's per-frame arrays.
    """

    def __init__(self, shard: str | Path) -> None:
        file = Path(shard) / FILE
        if not file.is_file():
            raise UserError(
                f"shard {shard} has no {FILE}; make it with `flowvqtalker prepare-emotion-faces --data FOLDER "
                f"--shard {shard}`"
            )
        with np.load(file) as content:
            self.clip: Ints = content["clip"]
            self.row: Ints = content["row"]
            self._end = np.cumsum(content["size"])
            self._data = content["data"]

    def __len__(self) -> int:
        return len(self.clip)

    def face(self, number: int) -> Pixels:
        """Face (144, 144, 3) uint8 RGB with a number in [0, M)."""
        start = int(self._end[number - 1]) if number else 0
        face = cv2.imdecode(self._data[start : int(self._end[number])], cv2.IMREAD_COLOR)
        if face is None:
            raise UserError(f"{FILE}: face {number} is damaged; make the file again")
        return cast(Pixels, np.ascontiguousarray(face[..., ::-1]))


@dataclass(frozen=True, kw_only=True)
class PrepareEmotionFaces:
    """Cut aligned faces for training the emotion classifier and add them to a shard."""

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
    """Face model of the shard. Default: the package's own."""

    def run(self) -> int:
        """Write the file; returns the number of faces.

        Raises:
            UserError: if the shard or the clips are missing.
        """
        from flowvqtalker.face.model import FaceModel
        from flowvqtalker.loading import load_face_model

        face = FaceModel.load(self.face_model) if self.face_model is not None else load_face_model()
        template = face_template(face).numpy()
        shard = Shard(self.shard)
        chosen = self._clips_to_decode(shard)
        clips, rows, jpegs = [], [], []
        for part in (self._decoded(shard, chosen), self._stored(shard, chosen)):
            for clip, row, frame, mesh in part:
                crop = align_faces(frame[None], mesh[None], template, SIDE)[0]
                done, code = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.quality])
                if not done:
                    raise UserError("a face could not be encoded as JPEG")
                clips.append(clip)
                rows.append(row)
                jpegs.append(code.ravel())
        if not jpegs:
            raise UserError(f"shard {self.shard} has no clip with a face; prepare it with clips and images")
        beside = self.shard / (FILE + ".tmp.npz")
        size = np.array([len(jpeg) for jpeg in jpegs], np.int64)
        numbers, places = np.array(clips, np.int64), np.array(rows, np.int64)
        np.savez(beside, clip=numbers, row=places, size=size, data=np.concatenate(jpegs))
        beside.replace(self.shard / FILE)
        logger.info("%s: %d faces", self.shard / FILE, len(jpegs))
        return len(jpegs)

    def _clips_to_decode(self, shard: Shard) -> Ints:
        """Clips with an emotion, and some neutral ones of each person."""
        seen: Counter[str] = Counter()
        chosen = []
        for number in shard.select(is_image=False):
            emotion, who = int(shard.emotion[number]), str(shard.identity[number])
            if emotion == _NEUTRAL:
                seen[who] += 1
            if 0 <= emotion != _NATURAL and (emotion != _NEUTRAL or seen[who] <= self.neutral):
                chosen.append(int(number))
        return np.array(chosen, np.int64)

    def _decoded(self, shard: Shard, numbers: Ints) -> Iterator[_Face]:
        """Frames spread evenly over clips."""
        from flowvqtalker.data.sources import catalogue, read_frames, read_timing

        paths = {source.name: source.path for source in catalogue(self.data) if not source.is_image}
        missing = [str(shard.name[n]) for n in numbers if str(shard.name[n]) not in paths]
        if missing:
            raise UserError(f"{len(missing)} clips of the shard are not in {self.data}, the first: {missing[0]}")
        for number in tqdm(numbers, desc="faces of clips", dynamic_ncols=True):
            path = paths[str(shard.name[number])]
            start = shard.rows(int(number)).start
            mesh = shard.landmarks(shard.rows(int(number)))
            seen = np.flatnonzero(np.isfinite(mesh).all((1, 2)))
            if not len(seen):
                continue
            ticks = seen[np.unique(np.linspace(0, len(seen) - 1, self.frames).round().astype(int))]
            own = np.abs(read_timing(path).times[None] - ticks[:, None] / FPS).argmin(1)
            crop = Crop(np.asarray(shard.crop[number], np.float64))
            frames = dict(read_frames(path, {int(n) for n in own}))
            for tick, mine in zip(ticks, own, strict=True):
                if int(mine) in frames:
                    yield int(number), int(start + tick), frames[int(mine)], crop.points_back(mesh[tick])

    def _stored(self, shard: Shard, decoded: Ints) -> Iterator[_Face]:
        """Images that the shard stores of the other clips."""
        others = np.setdiff1d(np.flatnonzero((shard.emotion != _NEUTRAL) | shard.is_image), decoded)
        counts: Counter[int] = Counter()
        for image in tqdm(shard.images_of(others), desc="faces of images", dynamic_ncols=True):
            clip, row = int(shard.image_clip[image]), int(shard.image_row[image])
            counts[clip] += 1
            mesh = shard.landmarks(row)
            if counts[clip] <= self.stored and np.isfinite(mesh).all():
                yield clip, row, shard.image(int(image)), mesh
