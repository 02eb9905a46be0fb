"""Shards: clips and images, decoded and tracked once, in files that training reads with numpy and OpenCV.

A shard is a folder. All files but ``index.npz`` are optional, so that a stage needs to copy only what it reads:

========================  =====================================================================================
``index.npz``             per clip (an image is a clip of one frame): see :class:`Shard`
``expression.npy``        (N, 64) float32, β of the frames of all clips, concatenated
``pose.npy``              (N, 6) float32, ρ
``blendshapes.npy``       (N, 52) float16 of the tracker; NaN where no face was found
``landmarks.npy``         (N, 478, 3) int16, crop pixels as (value - 256) * 32; -32768 where no face was found
``residual.npy``          (N,) float16, reprojection error of the fit in eye distances; NaN where interpolated
``audio.npy``             (N * 640,) int16, 16 kHz mono, sample 640 t belongs to the start of frame t
``images.npz``            per stored image: row, offset and size in ``images.bin``
``lags.npz``              per clip: frames that its sound comes before its lips (see ``sync-clips``)
``images.bin``            JPEGs (or WebPs) of 512x512 crops, back to back
========================  =====================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import CROP
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_folder

__all__ = ["LAGS", "SAMPLES", "SHARD_VERSION", "Clip", "Shard", "ShardWriter"]

#: Samples of 16 kHz audio that belong to one frame.
SAMPLES = 640
#: File of the clips' lags. Small lags are applied if their confidence is one that few wrong ones reach.
LAGS = "lags.npz"
_MAX_LAG, _MIN_CONFIDENCE = 3, 0.12
SHARD_VERSION = 1
_LANDMARK_SCALE = 32.0
_LANDMARK_CENTRE = 256.0
_NO_LANDMARK = -32768

Floats = npt.NDArray[np.float32]

# Per-frame columns: file, type, shape of a row.
_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "expression": ("<f4", (64,)),
    "pose": ("<f4", (6,)),
    "blendshapes": ("<f2", (52,)),
    "landmarks": ("<i2", (478, 3)),
    "residual": ("<f2", ()),
    "audio": ("<i2", ()),
}


@dataclass(frozen=True)
class Clip:
    """One clip (T frames at 25 fps) or image (T = 1) to put into a shard.

    Attributes:
        name, source, identity, split: text; the split is ``train`` or ``val``.
        emotion: index in :data:`flowvqtalker.constants.EMOTIONS`, -1 where unknown.
        speech: whether the sound is the speech of this face.
        is_image: whether it is a single image.
        identity_shape: (80,) α.
        expression, pose, blendshapes, landmarks, residual: (T, ...) see the module; landmarks in crop pixels.
        audio: (T * 640,) int16 or None.
        crop: (2, 3) input pixels -> crop pixels.
        valid: (4, 2) corners of the input in the crop.
        native: side of the crop in input pixels, before scaling to 512.
        lag: frames that the lips come after the sound, after the sound was moved by ``shifted``; NaN where unknown.
        correlation: of the lips' opening with its prediction from the sound; NaN where unknown.
        shifted: frames by which the sound was moved.
        images: (frame, JPEG) pairs.
    """

    name: str
    source: str
    identity: str
    split: str
    emotion: int
    speech: bool
    is_image: bool
    identity_shape: Floats
    expression: Floats
    pose: Floats
    blendshapes: npt.NDArray[np.floating[Any]]
    landmarks: Floats
    residual: Floats
    audio: npt.NDArray[np.int16] | None
    crop: npt.NDArray[np.float64]
    valid: Floats
    native: float
    lag: float = float("nan")
    correlation: float = float("nan")
    shifted: float = 0.0
    images: Sequence[tuple[int, bytes]] = field(default_factory=tuple)


class _Column:
    """A ``.npy`` file that grows: numpy pads headers so that a larger first axis fits in the same bytes."""

    def __init__(self, path: Path, kind: str, row: tuple[int, ...]) -> None:
        self.kind, self.row, self.count = np.dtype(kind), row, 0
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.count, *self.row)
        header = {"descr": self.kind.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: npt.NDArray[Any]) -> None:
        if values.shape[1:] != self.row:
            raise ValueError(f"rows of shape {self.row} are needed, got {values.shape[1:]}")
        self.file.write(np.ascontiguousarray(values, dtype=self.kind).tobytes())
        self.count += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()


class ShardWriter:
    """Write a shard clip by clip, as a context manager; it appears whole or not at all.

    Arguments:
        path: the shard's folder; an existing shard there is replaced at the end.
        about: text kept in the index, such as the settings of the preparation.
    """

    def __init__(self, path: str | Path, about: str = "") -> None:
        self.path, self.about = Path(path), about
        self._stack = contextlib.ExitStack()
        folder = self._folder = self._stack.enter_context(atomic_folder(path))
        self._columns = {name: _Column(folder / f"{name}.npy", *spec) for name, spec in _COLUMNS.items()}
        self._images: BinaryIO = open(folder / "images.bin", "wb")  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []
        self._image_rows: list[tuple[int, int, int, int]] = []
        self._count = 0

    def add(self, clip: Clip) -> None:
        """Append a clip.

        Raises:
            ValueError: if its arrays do not fit together or its coefficients are not finite.
        """
        length = len(clip.expression)
        per_frame = {name: np.asarray(getattr(clip, name)) for name in _COLUMNS if name != "audio"}
        for name, values in per_frame.items():
            if len(values) != length:
                raise ValueError(f"{clip.name}: {length} frames of expression but {len(values)} of {name}")
        for name in ("expression", "pose", "identity_shape"):
            if not np.isfinite(getattr(clip, name)).all():
                raise ValueError(f"{clip.name}: {name} is not finite")
        audio = np.zeros(length * SAMPLES, np.int16) if clip.audio is None else clip.audio
        if audio.shape != (length * SAMPLES,):
            raise ValueError(f"{clip.name}: {length * SAMPLES} samples are needed, got {audio.shape}")
        landmarks = (per_frame["landmarks"] - _LANDMARK_CENTRE) * _LANDMARK_SCALE
        with np.errstate(invalid="ignore"):
            whole = np.clip(np.round(landmarks), _NO_LANDMARK + 1, 32767)
        per_frame["landmarks"] = np.where(np.isfinite(landmarks), whole, _NO_LANDMARK)
        for name, values in per_frame.items():
            self._columns[name].append(values)
        self._columns["audio"].append(audio)
        for frame, jpeg in clip.images:
            if not 0 <= frame < length:
                raise ValueError(f"{clip.name}: image of frame {frame} of {length}")
            self._image_rows.append((len(self._rows), self._count + frame, self._images.tell(), len(jpeg)))
            self._images.write(jpeg)
        row = {name: getattr(clip, name) for name in _CLIP_FIELDS}
        self._rows.append({**row, "start": self._count, "length": length, "sound": clip.audio is not None})
        self._count += length

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            column.close()
        self._images.close()
        if kind is None:
            fields = (*_CLIP_FIELDS, "start", "length", "sound")
            index = {name: np.array([row[name] for row in self._rows]) for name in fields}
            np.savez(self._folder / "index.npz", version=SHARD_VERSION, about=self.about, **cast(Any, index))
            table = np.array(self._image_rows, np.int64).reshape(-1, 4)
            columns = dict(zip(("clip", "row", "offset", "size"), table.T, strict=True))
            np.savez(self._folder / "images.npz", **cast(Any, columns))
        self._stack.__exit__(kind, value, trace)


_CLIP_FIELDS = (
    *("name", "source", "identity", "split", "emotion", "speech", "is_image", "identity_shape"),
    *("crop", "valid", "native", "lag", "correlation", "shifted"),
)


class Shard:
    """Read a shard. Per-frame arrays are memory maps, opened when first used; safe in threads and worker processes.

    Attributes:
        name, source, identity, split: (C,) text of the clips.
        emotion: (C,) int, -1 where unknown.
        speech, sound, is_image: (C,) bool; ``sound``: has an audio track, ``speech``: it is the speech of this face.
        identity_shape: (C, 80) α.
        crop: (C, 2, 3); valid: (C, 4, 2); native, lag, correlation, shifted: (C,). See :class:`Clip`.
        start, length: (C,) int, rows of each clip in the per-frame arrays.
        expression, pose, blendshapes, residual: (N, ...) per-frame arrays, see the module.
        image_clip, image_row: (M,) int, clip and row of each stored image.

    Raises:
        UserError: if the folder holds no shard of this version.
    """

    name: npt.NDArray[np.str_]
    source: npt.NDArray[np.str_]
    identity: npt.NDArray[np.str_]
    split: npt.NDArray[np.str_]
    emotion: npt.NDArray[np.int64]
    speech: npt.NDArray[np.bool_]
    sound: npt.NDArray[np.bool_]
    is_image: npt.NDArray[np.bool_]
    identity_shape: Floats
    crop: npt.NDArray[np.float64]
    valid: Floats
    native: npt.NDArray[np.float64]
    lag: npt.NDArray[np.float64]
    correlation: npt.NDArray[np.float64]
    shifted: npt.NDArray[np.float64]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "index.npz"
        if not file.is_file():
            raise UserError(f"no shard at {path} (index.npz is missing); make one with `flowvqtalker prepare`")
        with np.load(file) as index:
            if int(index["version"]) != SHARD_VERSION:
                raise UserError(
                    f"shard {path} has version {index['version']}, {SHARD_VERSION} is needed; prepare it again"
                )
            self.about = str(index["about"])
            for key in (*_CLIP_FIELDS, "start", "length", "sound"):
                # Shards written before the column was renamed have "picture".
                setattr(self, key, index["picture" if key == "is_image" and key not in index else key])
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self.image_clip = self.image_row = self._offset = self._size = np.zeros(0, np.int64)
        if (self.path / "images.npz").is_file():
            with np.load(self.path / "images.npz") as images:
                self.image_clip, self.image_row = images["clip"], images["row"]
                self._offset, self._size = images["offset"], images["size"]

    def __len__(self) -> int:
        return len(self.start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # memory maps would be copied into each worker

    def _map(self, name: str) -> npt.NDArray[Any]:
        if name not in self._maps:
            file = self.path / name
            if not file.is_file():
                raise UserError(f"shard {self.path} has no {name}; copy it there or prepare the shard again")
            self._maps[name] = np.load(file, mmap_mode="r") if name.endswith(".npy") else np.memmap(file, np.uint8, "r")
        return self._maps[name]

    expression: Floats = property(lambda self: self._map("expression.npy"))  # type: ignore[assignment]
    pose: Floats = property(lambda self: self._map("pose.npy"))  # type: ignore[assignment]
    blendshapes: npt.NDArray[np.float16] = property(lambda self: self._map("blendshapes.npy"))  # type: ignore[assignment]
    residual: npt.NDArray[np.float16] = property(lambda self: self._map("residual.npy"))  # type: ignore[assignment]

    def rows(self, clip: int) -> slice:
        """Rows of a clip in the per-frame arrays."""
        return slice(int(self.start[clip]), int(self.start[clip] + self.length[clip]))

    def landmarks(self, rows: int | slice | npt.NDArray[np.integer[Any]]) -> Floats:
        """Landmarks (..., 478, 3) of some rows in crop pixels, z too; NaN where no face was found."""
        stored = np.asarray(self._map("landmarks.npy")[rows])
        points = stored.astype(np.float32) / _LANDMARK_SCALE + np.float32(_LANDMARK_CENTRE)
        points[stored == _NO_LANDMARK] = np.nan
        return points

    def wave(self, clip: int, stored: bool = False) -> Floats:
        """Speech (T * 640,) float32 in [-1, 1) of a clip, in sync with its lips as far as :attr:`lags` tell.

        Arguments:
            clip: its index.
            stored: ignore :attr:`lags`.
        """
        start, size = int(self.start[clip]) * SAMPLES, int(self.length[clip]) * SAMPLES
        wave = self._map("audio.npy")[start : start + size].astype(np.float32) / np.float32(32768)
        late = 0 if stored else int(self.lags[clip]) * SAMPLES
        if late:
            before, after = np.zeros(max(late, 0), np.float32), np.zeros(max(-late, 0), np.float32)
            wave = np.concatenate([before, wave, after])[max(-late, 0) : max(-late, 0) + size]
        return cast(Floats, wave)

    @cached_property
    def lags(self) -> npt.NDArray[np.int64]:
        """Frames by which to delay each clip's speech; zeros without ``lags.npz``."""
        if not (self.path / LAGS).is_file():
            return np.zeros(len(self), np.int64)
        with np.load(self.path / LAGS, allow_pickle=False) as found:
            offset, confidence = found["offset"], found["confidence"]
        if len(offset) != len(self):
            raise UserError(f"{self.path / LAGS} is of another shard; run `flowvqtalker sync-clips` again")
        sure = (np.abs(offset) <= _MAX_LAG) & (confidence >= _MIN_CONFIDENCE)
        return np.where(sure, offset, 0)

    def select(
        self,
        split: str | None = None,
        *,
        speech: bool | None = None,
        is_image: bool | None = None,
        min_length: int = 1,
    ) -> npt.NDArray[np.int64]:
        """Indices of the clips that meet every given condition."""
        keep = self.length >= min_length
        if split is not None:
            keep &= self.split == split
        if speech is not None:
            keep &= self.speech == speech
        if is_image is not None:
            keep &= self.is_image == is_image
        return np.flatnonzero(keep)

    def images_of(self, clips: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Indices of the stored images of some clips."""
        return np.flatnonzero(np.isin(self.image_clip, clips))

    def image(self, number: int, size: int = CROP) -> npt.NDArray[np.uint8]:
        """Stored image (size, size, 3) uint8 RGB with an index in [0, M); smaller sizes are averaged."""
        start = int(self._offset[number])
        image = cv2.imdecode(self._map("images.bin")[start : start + int(self._size[number])], cv2.IMREAD_COLOR)
        if image is None:
            raise UserError(f"shard {self.path}: image {number} is damaged; prepare the shard again")
        if size != CROP:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        return cast("npt.NDArray[np.uint8]", np.ascontiguousarray(image[..., ::-1]))

    def valid_mask(self, clip: int, size: int = CROP) -> npt.NDArray[np.bool_]:
        """(size, size) bool: pixels of a clip's crop that lie inside its input."""
        corners = np.round(self.valid[clip].astype(np.float64) * (size / CROP) * 16).astype(np.int32)
        mask = np.zeros((size, size), np.uint8)
        cv2.fillConvexPoly(mask, corners, 1, shift=4)
        return mask.astype(bool)
