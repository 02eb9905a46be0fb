"""An animated face as binary glTF 2.0 (``.glb``), for Blender, Unity, Unreal, three.js and every glTF viewer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker import __version__
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel, rotation_matrix
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.coefficients import Coefficients

__all__ = ["METRES", "glb", "save_glb"]

#: Metres (glTF's unit) per unit of the face model, the distance between the outer eye corners.
METRES = 0.09

#: Irises in the mesh: centre, then the rim.
_IRISES = ((468, 469, 470, 471, 472), (473, 474, 475, 476, 477))
#: Depth of the eyeball surface behind the lids' rims, in the model's unit: irises lie in front of it, closed lids cover
#: both.
_RECESS = 0.05
_MATERIALS = {
    "skin": ((0.80, 0.58, 0.47), 0.65),
    "mouth": ((0.17, 0.03, 0.03), 0.9),
    "eyes": ((0.92, 0.91, 0.89), 0.3),
    "irises": ((0.10, 0.07, 0.05), 0.2),
}
_FLOAT, _USHORT = 5126, 5123
_ARRAY, _ELEMENTS = 34962, 34963

Floats = npt.NDArray[np.float32]
#: From the model's axes (x right, y down, z away) to glTF's (x right, y up, z towards the viewer).
_AXES = np.array([1.0, -1.0, -1.0], np.float32)


class _Buffer:
    """The binary chunk of a file and the lists that describe it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, values: npt.NDArray[Any], target: int | None = None, bounds: bool = False) -> int:
        """Append an array, (n,) or (n, 2 to 4); returns the index of its accessor."""
        kind = _USHORT if values.dtype == np.uint16 else _FLOAT
        raw = np.ascontiguousarray(values, dtype="<u2" if kind == _USHORT else "<f4").tobytes()
        view: dict[str, Any] = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(raw)}
        if target is not None:
            view["target"] = target
        self.data += raw + bytes(-len(raw) % 4)
        width = 1 if values.ndim == 1 else values.shape[1]
        shape = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[width]
        accessor = {"bufferView": len(self.views), "componentType": kind, "count": len(values), "type": shape}
        if bounds:
            table = values.reshape(len(values), -1)
            accessor |= {"min": table.min(0).tolist(), "max": table.max(0).tolist()}
        self.views.append(view)
        self.accessors.append(accessor)
        return len(self.accessors) - 1


def save_glb(path: str | Path, motion: Coefficients, model: FaceModel) -> None:
    """Write :func:`glb` to a file; it appears whole or not at all."""
    content = glb(motion, model)
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def glb(motion: Coefficients, model: FaceModel) -> bytes:
    """The face mesh with its expression and pose over time, as binary glTF.

    The mesh has the motion's identity, 478 vertices in metres. Its morph targets are the components of the expression
    basis, so the animated weights are β and the mesh is exact to rounding; 52 blendshapes would only approximate it.
    The node ``head`` follows the pose around the clip's mean position.

    Raises:
        UserError: if the motion holds values that are not numbers.
    """
    if not (np.isfinite(motion.expression).all() and np.isfinite(motion.pose).all()):
        raise UserError("the motion holds values that are not numbers; a glTF file cannot hold them")
    buffer = _Buffer()
    basis = model.expression.numpy()
    shape = model.shape(torch.from_numpy(motion.identity), torch.zeros(len(basis))).numpy()
    parts = _parts(model, shape)
    surface = np.concatenate(list(parts.values()))
    normals = _normals(shape, surface)
    behind = shape + np.array([0, 0, _RECESS], np.float32)
    places = [buffer.add(place * _AXES * METRES, _ARRAY, bounds=True) for place in (shape, behind)]
    facing = buffer.add(normals * _AXES, _ARRAY)
    targets = [
        {
            "POSITION": buffer.add(component * _AXES * METRES, _ARRAY, bounds=True),
            "NORMAL": buffer.add((_normals(shape + component, surface) - normals) * _AXES, _ARRAY),
        }
        for component in basis
    ]
    primitives = [
        {
            "attributes": {"POSITION": places[name == "eyes"], "NORMAL": facing},
            "indices": buffer.add(triangles.astype(np.uint16).ravel(), _ELEMENTS),
            "material": number,
            "targets": targets,
        }
        for number, (name, triangles) in enumerate(parts.items())
    ]
    names = [f"expression_{number:02d}" for number in range(len(basis))]
    mesh = {"name": "face", "primitives": primitives, "weights": motion.expression[0].tolist()}
    document = {
        "asset": {"version": "2.0", "generator": f"flowvqtalker {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": "head", "mesh": 0}],
        "meshes": [{**mesh, "extras": {"targetNames": names}}],
        "materials": [
            {
                "name": name,
                "pbrMetallicRoughness": {
                    "baseColorFactor": [*colour, 1.0],
                    "metallicFactor": 0.0,
                    "roughnessFactor": rough,
                },
                "doubleSided": True,
            }
            for name, (colour, rough) in _MATERIALS.items()
        ],
        "animations": [_animation(buffer, motion)],
        "buffers": [{"byteLength": len(buffer.data)}],
        "bufferViews": buffer.views,
        "accessors": buffer.accessors,
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    chunks += struct.pack("<II", len(buffer.data), 0x004E4942) + bytes(buffer.data)
    return struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks


def _animation(buffer: _Buffer, motion: Coefficients) -> dict[str, Any]:
    """Rotation, translation and weights of the head at each frame."""
    times = (np.arange(len(motion)) / motion.fps).astype(np.float32)
    clock = buffer.add(times, bounds=True)
    place = (motion.pose[:, 3:] - motion.pose[:, 3:].mean(0)) * _AXES * np.float32(METRES)
    tracks = {
        "rotation": _quaternions(motion.pose[:, :3]),
        "translation": place,
        "weights": motion.expression.ravel(),
    }
    samplers = [{"input": clock, "output": buffer.add(v), "interpolation": "LINEAR"} for v in tracks.values()]
    channels = [{"sampler": n, "target": {"node": 0, "path": path}} for n, path in enumerate(tracks)]
    return {"name": "speech", "samplers": samplers, "channels": channels}


def _quaternions(angles: Floats) -> Floats:
    """Quaternions (T, 4) x, y, z, w in glTF's axes of (pitch, yaw, roll), each in the hemisphere of the one before."""
    from scipy.spatial.transform import Rotation

    flip = np.diag(_AXES).astype(np.float64)
    turns = flip @ rotation_matrix(torch.from_numpy(angles.astype(np.float64))).numpy() @ flip
    found = Rotation.from_matrix(turns).as_quat()
    same = np.sign((found[1:] * found[:-1]).sum(1))
    found[1:] *= np.cumprod(np.where(same == 0, 1, same))[:, None]
    unit: Floats = found.astype(np.float32)
    return unit


def _parts(model: FaceModel, shape: Floats) -> dict[str, npt.NDArray[np.int64]]:
    """Triangles of each material, wound so that the front is outside."""
    irises = [(ring[0], ring[1 + k], ring[1 + (k + 1) % 4]) for ring in _IRISES for k in range(4)]
    parts = {
        "skin": model.triangles.numpy(),
        "mouth": model.mouth_triangles.numpy(),
        "eyes": model.eye_triangles.numpy(),
        "irises": np.array(irises, np.int64),
    }
    # The face looks along -z, so most normals must.
    return {
        name: part if (_areas(shape, part)[:, 2]).sum() < 0 else part[:, ::-1].copy() for name, part in parts.items()
    }


def _areas(shape: Floats, triangles: npt.NDArray[np.int64]) -> Floats:
    """Normals (F, 3) with the length of twice the triangles' areas."""
    a, b, c = (shape[triangles[:, corner]] for corner in range(3))
    found: Floats = np.cross(b - a, c - a)
    return found


def _normals(shape: Floats, triangles: npt.NDArray[np.int64]) -> Floats:
    """Unit normals (V, 3) of the vertices."""
    summed = np.zeros_like(shape)
    for corner in range(3):
        np.add.at(summed, triangles[:, corner], _areas(shape, triangles))
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    outward = np.array([0.0, 0.0, -1.0], np.float32)
    found: Floats = np.where(length > 1e-12, summed / np.maximum(length, 1e-12), outward).astype(np.float32)
    return found
