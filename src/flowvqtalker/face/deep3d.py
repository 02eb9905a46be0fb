"""Reader of Deep3DFaceRecon coefficient files, for users who have a BFM and its coefficients."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from flowvqtalker.errors import UserError

__all__ = ["COLUMNS", "Deep3DCoefficients", "read_deep3d"]

#: Layout of the 257 columns (Deep3DFaceRecon ``split_coeff``; SadTalker and PIRender use the same).
COLUMNS = {
    "identity": slice(0, 80),
    "expression": slice(80, 144),
    "texture": slice(144, 224),
    "angles": slice(224, 227),
    "gamma": slice(227, 254),
    "translation": slice(254, 257),
}
_WIDTH = 257
_SUFFIXES = (".mat", ".npy", ".npz", ".txt")
# Names under which a matrix of 257 columns is found in a .mat or .npz, most telling first (SadTalker, PIRender).
_WHOLE = ("full_3dmm", "coeff", "coeffs", "coeff_3dmm", "coefficients")
# Names of the parts in Deep3DFaceRecon's own .mat, and in full.
_PARTS = {
    "identity": ("id", "identity"),
    "expression": ("exp", "expression"),
    "angles": ("angle", "angles"),
    "translation": ("trans", "translation"),
}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Deep3DCoefficients:
    """Coefficients of the Basel Face Model, not of :class:`flowvqtalker.face.model.FaceModel`.

    Attributes:
        expression: (T, 64) β.
        pose: (T, 6) ρ = (pitch, yaw, roll in radians, tx, ty, tz), in Deep3DFaceRecon's camera.
        identity: (T, 80) α, or None where the file has none.
    """

    expression: Array
    pose: Array
    identity: Array | None


def read_deep3d(path: str | Path) -> Deep3DCoefficients:
    """Read coefficients of a clip (or a picture: T = 1).

    Read are, in ``.mat`` and ``.npz``, one matrix (T, 257) or the parts ``id``, ``exp``, ``angle`` and ``trans`` as
    Deep3DFaceRecon writes them; in ``.npy`` and ``.txt`` (numbers separated by blanks or commas) one matrix. A single
    row may come without its leading axis.

    Raises:
        UserError: if the file is missing, of another kind, broken, or not in this layout.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: unknown kind of coefficient file; allowed are {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"coefficient file {path} not found")
    try:
        content = _content(path)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, EOFError, MatReadError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as {path.suffix} ({reason}); write it again") from error
    if isinstance(content, Mapping):
        return _from_mapping(content, path)
    return _from_matrix(content, path, "the matrix")


def _content(path: Path) -> npt.NDArray[np.generic] | dict[str, npt.NDArray[np.generic]]:
    kind = path.suffix.lower()
    if kind == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    if kind == ".txt":
        text = path.read_text(encoding="utf-8").replace(",", " ")
        rows = [[float(word) for word in line.split()] for line in text.splitlines() if line.strip()]
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise UserError(
                f"{path} has rows of {min(lengths)} and {max(lengths)} numbers; {_WIDTH} are needed in each"
            )
        return np.array(rows)
    try:
        return {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
    except NotImplementedError as error:
        raise UserError(f"{path} is a MATLAB 7.3 file; save it with the option -v7") from error


def _from_mapping(content: Mapping[str, npt.NDArray[np.generic]], path: Path) -> Deep3DCoefficients:
    for name in _WHOLE:
        if name in content and content[name].ndim in (1, 2) and content[name].shape[-1] == _WIDTH:
            return _from_matrix(content[name], path, name)
    parts: dict[str, Array] = {}
    for part, names in _PARTS.items():
        found = next((name for name in names if name in content), None)
        if found is None:
            continue
        width = COLUMNS[part].stop - COLUMNS[part].start
        parts[part] = _numbers(content[found], path, found, width)
    missing = [names[0] for part, names in _PARTS.items() if part not in parts and part != "identity"]
    if missing:
        held = ", ".join(f"{name} {value.shape}" for name, value in content.items()) or "nothing"
        raise UserError(
            f"{path} holds {held}; needed is a matrix (T, {_WIDTH}) named {_WHOLE[0]} or {_WHOLE[1]}, or id (T, 80), "
            "exp (T, 64), angle (T, 3) and trans (T, 3)"
        )
    lengths = {name: len(value) for name, value in parts.items() if not (name == "identity" and len(value) == 1)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: the parts differ in length ({', '.join(f'{k} {v}' for k, v in lengths.items())})")
    pose = np.concatenate([parts["angles"], parts["translation"]], axis=1)
    identity = parts.get("identity")
    if identity is not None and len(identity) != len(pose):
        identity = np.repeat(identity, len(pose), axis=0)
    return Deep3DCoefficients(parts["expression"], pose, identity)


def _from_matrix(values: npt.NDArray[np.generic], path: Path, name: str) -> Deep3DCoefficients:
    rows = _numbers(values, path, name, _WIDTH)
    pose = np.concatenate([rows[:, COLUMNS["angles"]], rows[:, COLUMNS["translation"]]], axis=1)
    return Deep3DCoefficients(rows[:, COLUMNS["expression"]], pose, rows[:, COLUMNS["identity"]])


def _numbers(values: npt.NDArray[np.generic], path: Path, name: str, width: int) -> Array:
    rows = np.atleast_2d(values)
    if rows.ndim == 3 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows) or not np.issubdtype(rows.dtype, np.number):
        raise UserError(
            f"{path}: {name} has shape {values.shape} and type {values.dtype}; (T, {width}) numbers are needed"
        )
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise UserError(f"{path}: {name} has NaN or infinite numbers, first in row {bad}")
    return rows
