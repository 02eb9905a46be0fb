"""Motion for other programs: Live Link Face's csv of the ARKit blendshapes, and animated glTF."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import FaceModel, rotation_matrix
from flowvqtalker.face.portrait import front_pose
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.io.media import error_text, existing_file

__all__ = [
    "COLUMNS",
    "READABLE",
    "SUFFIXES",
    "check_fps",
    "export_motion",
    "head_angles",
    "live_link_rows",
    "load_motion",
    "save_live_link",
]

#: Suffixes of motion files, and of those that :func:`load_motion` reads.
SUFFIXES, READABLE = (".npz", ".csv", ".glb"), (".npz", ".csv")

_EYE = ("EyeBlink", "EyeLookDown", "EyeLookIn", "EyeLookOut", "EyeLookUp", "EyeSquint", "EyeWide")
#: Columns of a recording of Epic's Live Link Face app, after the timecode and the number of values.
COLUMNS = (
    *(name + "Left" for name in _EYE),
    *(name + "Right" for name in _EYE),
    *("JawForward", "JawRight", "JawLeft", "JawOpen", "MouthClose", "MouthFunnel", "MouthPucker"),
    *("MouthRight", "MouthLeft", "MouthSmileLeft", "MouthSmileRight", "MouthFrownLeft", "MouthFrownRight"),
    *("MouthDimpleLeft", "MouthDimpleRight", "MouthStretchLeft", "MouthStretchRight", "MouthRollLower"),
    *("MouthRollUpper", "MouthShrugLower", "MouthShrugUpper", "MouthPressLeft", "MouthPressRight"),
    *("MouthLowerDownLeft", "MouthLowerDownRight", "MouthUpperUpLeft", "MouthUpperUpRight"),
    *("BrowDownLeft", "BrowDownRight", "BrowInnerUp", "BrowOuterUpLeft", "BrowOuterUpRight"),
    *("CheekPuff", "CheekSquintLeft", "CheekSquintRight", "NoseSneerLeft", "NoseSneerRight", "TongueOut"),
    *("HeadYaw", "HeadPitch", "HeadRoll"),
    *("LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll", "RightEyeYaw", "RightEyePitch", "RightEyeRoll"),
)
#: Rotation of an eye in radians at a look blendshape of one. ARKit does not define it; 30 degrees is our choice.
GAZE = np.pi / 6

# Standard deviation of a blendshape around the model's, for reading a csv.
_BLENDSHAPE_NOISE = 0.01

Floats = npt.NDArray[np.floating]


def check_fps(fps: float | None) -> None:
    """Raise a :class:`UserError` for a rate that motion cannot be written at; None keeps its own."""
    if fps is not None and not 1 <= fps <= 240:
        raise UserError(f"fps must be between 1 and 240, for instance 25, 30 or 60, got {fps:g}")


def export_motion(
    path: str | Path,
    motion: Coefficients,
    model: FaceModel,
    fps: float | None = None,
    blendshapes: Floats | None = None,
) -> Coefficients:
    """Write motion in the format of the file's suffix; the file appears whole or not at all.

    Arguments:
        path: ``.npz`` (see :meth:`Coefficients.save`), ``.csv`` (see :func:`save_live_link`) or ``.glb`` (see
            :func:`flowvqtalker.face.gltf.save_glb`).
        motion: what to write.
        model: the face model of the motion.
        fps: frames per second; None keeps the motion's.
        blendshapes: (T, 52) for a csv; None takes the model's.

    Returns:
        the motion as written, at the given rate.

    Raises:
        UserError: for another suffix or rate, or if the file cannot be written.
    """
    path = Path(path)
    check_fps(fps)
    moved = motion if fps is None else motion.at(fps)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        moved.save(path)
    elif suffix == ".csv":
        if blendshapes is None or moved is not motion:
            blendshapes = model.blendshapes(torch.from_numpy(moved.expression)).numpy()
        save_live_link(path, moved, blendshapes)
    elif suffix == ".glb":
        from flowvqtalker.face.gltf import save_glb

        save_glb(path, moved, model)
    else:
        raise UserError(f"output {path}: the name must end in one of {', '.join(SUFFIXES)}")
    return moved


def head_angles(pose: Floats) -> Floats:
    """Yaw, pitch and roll (T, 3) in radians about the axes of ARKit's face anchor, from poses (T, 6).

    ARKit's axes: x to the person's left, y up, z out of the face. Yaw is positive to the person's left, pitch
    downwards, roll towards the person's right. Rotations apply in the order roll, pitch, yaw, as in Unreal.
    """
    flip = np.diag([1.0, -1.0, -1.0])  # the model's y points down, its z away from the camera
    turn = flip @ rotation_matrix(torch.from_numpy(np.asarray(pose[:, :3], np.float64))).numpy() @ flip
    yaw = np.arctan2(turn[:, 0, 2], turn[:, 2, 2])
    pitch = np.arcsin(np.clip(-turn[:, 1, 2], -1, 1))
    roll = np.arctan2(turn[:, 1, 0], turn[:, 1, 1])
    angles: Floats = np.stack([yaw, pitch, roll], axis=1)
    return angles


def live_link_rows(motion: Coefficients, blendshapes: Floats) -> Iterable[list[str]]:
    """Rows of :func:`save_live_link` below its header."""
    named = {name[0].upper() + name[1:]: column for name, column in zip(ARKIT_NAMES, blendshapes.T, strict=True)}
    zero = np.zeros(len(motion))
    named["TongueOut"] = zero  # MediaPipe does not see the tongue
    named["HeadYaw"], named["HeadPitch"], named["HeadRoll"] = head_angles(motion.pose).T
    for side, sign in (("Left", 1.0), ("Right", -1.0)):  # the left eye looks out to the left
        look = {way: named[f"EyeLook{way}{side}"] for way in ("In", "Out", "Up", "Down")}
        named[f"{side}EyeYaw"] = sign * GAZE * (look["Out"] - look["In"])
        named[f"{side}EyePitch"] = GAZE * (look["Down"] - look["Up"])
        named[f"{side}EyeRoll"] = zero
    values = np.stack([named[name] for name in COLUMNS], axis=1)
    for frame, row in enumerate(values):
        yield [_timecode(frame, motion.fps), str(len(COLUMNS)), *(f"{value:.6f}" for value in row)]


def save_live_link(path: str | Path, motion: Coefficients, blendshapes: Floats) -> None:
    """Write the csv of Epic's Live Link Face app, which Unreal, MotionBuilder, Blender and Maya can import.

    A header, then one row per frame: timecode ``HH:MM:SS:FF.fff`` (FF counts frames), the number of values (61), 52
    blendshapes in [0, 1], and the angles of head and eyes in radians (see :func:`head_angles`).

    Arguments:
        path: file to write.
        motion: T frames.
        blendshapes: (T, 52) in MediaPipe's order.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["Timecode", "BlendshapeCount", *COLUMNS])
            rows.writerows(live_link_rows(motion, blendshapes))

    atomic_write(path, write)


def load_motion(path: str | Path, model: FaceModel) -> Coefficients:
    """Read a file of motion: ``.npz``, or ``.csv`` as :func:`save_live_link` and Live Link Face write it.

    A csv holds less than the coefficients: β is the likeliest expression with these blendshapes, the head stays in
    place, and the rate is the number of rows in its first whole second (25 in shorter files).

    Raises:
        UserError: if the file cannot be read, or is neither.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        return Coefficients.load(path)
    file = existing_file(path, "motion file")
    allowed = "give a recording of Live Link Face, or a file that `flowvqtalker motion` wrote"
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
        values = {name: np.array([float(row[name]) for row in rows]) for name in COLUMNS[:55]}
        seconds = [row["Timecode"].rsplit(":", 1)[0] for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        reason = f"no column {error.args[0]}" if isinstance(error, KeyError) else error_text(error)
        raise UserError(f"{path} is not a csv of blendshapes ({reason}); {allowed}") from error
    table = np.stack(list(values.values()), axis=1)
    if not len(table) or not np.isfinite(table).all():
        raise UserError(f"{path} holds no motion, or values that are not numbers; {allowed}")
    counts = [len(list(group)) for _, group in itertools.groupby(seconds)]
    fps = float(counts[1]) if len(counts) > 2 else float(max(counts)) if len(counts) == 2 else float(FPS)
    check_fps(fps)
    shapes = np.stack([values.get(name[0].upper() + name[1:], np.zeros(len(rows))) for name in ARKIT_NAMES], axis=1)
    return Coefficients(_expression(model, shapes), _pose(model, *table[:, 52:55].T), np.zeros(80, np.float32), fps)


def _expression(model: FaceModel, blendshapes: Floats) -> npt.NDArray[np.float32]:
    """The likeliest β (T, 64) for blendshapes (T, 52), under its prior N(0, I)."""
    matrix, bias = model.arkit[:, :-1].double().numpy(), model.arkit[:, -1].double().numpy()
    gain = matrix.T @ np.linalg.inv(matrix @ matrix.T + _BLENDSHAPE_NOISE**2 * np.eye(len(matrix)))
    return np.asarray((blendshapes - bias) @ gain.T, np.float32)


def _pose(model: FaceModel, yaw: Floats, pitch: Floats, roll: Floats) -> npt.NDArray[np.float32]:
    """Poses (T, 6) in front of the camera with the angles of :func:`head_angles`."""
    from scipy.spatial.transform import Rotation  # slow to import, and only files of head angles need it

    flip = np.diag([1.0, -1.0, -1.0])
    turn = Rotation.from_euler("YXZ", np.stack([yaw, pitch, roll], axis=1)).as_matrix()
    angles = Rotation.from_matrix(flip @ turn @ flip).as_euler("ZYX")[:, ::-1]
    place = np.broadcast_to(front_pose(model).numpy()[3:], (len(angles), 3))
    return np.concatenate([angles, place], axis=1).astype(np.float32)


def _timecode(frame: int, fps: float) -> str:
    """Hours, minutes, seconds and frames of a frame; thousandths of a frame for fractional rates."""
    second = int(frame / fps + 1e-9)
    thousandths = max(0, round(1000 * (frame - second * fps)))
    hours, minutes = second // 3600, second // 60 % 60
    return f"{hours:02d}:{minutes:02d}:{second % 60:02d}:{thousandths // 1000:02d}.{thousandths % 1000:03d}"
