"""The linear 3D morphable face model: shape, pinhole projection, blendshapes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import VERTICES
from flowvqtalker.io.atomic import atomic_write

__all__ = ["CENTRE", "EXPRESSION", "FOCAL", "IDENTITY", "FaceModel", "rotation_matrix"]

IDENTITY = 80
EXPRESSION = 64
BLENDSHAPES = 52

#: Focal length of the crop's pinhole camera in pixels: Deep3DFaceRecon's 1015 at 224 px, at 512 px.
FOCAL = 1015.0 / 224.0 * 512.0
#: Principal point of the crop in pixels, both axes.
CENTRE = 256.0

_VERSION = "1"


def rotation_matrix(angles: Tensor) -> Tensor:
    """R = Rz(roll) Ry(yaw) Rx(pitch) from angles (..., 3) = (pitch, yaw, roll) in radians, as (..., 3, 3)."""
    cx, cy, cz = angles.cos().unbind(-1)
    sx, sy, sz = angles.sin().unbind(-1)
    rows = (
        *(cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        *(sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        *(-sy, cy * sx, cy * cx),
    )
    return torch.stack(rows, dim=-1).reshape(*angles.shape[:-1], 3, 3)


class FaceModel(nn.Module):
    """S(α, β) = S̄ + B_id α + B_exp β over the 478 vertices of the MediaPipe face mesh (paper section 3.1, with a BFM).

    Axes: x to the right of the image, y down, z away from the camera. Unit: the distance between the outer eye corners
    of the mean face. α and β are in standard deviations of the training faces.

    Attributes:
        mean: (478, 3).
        identity: (80, 478, 3) basis.
        expression: (64, 478, 3) basis.
        arkit: (52, 65) linear map from [β, 1] to the ARKit blendshapes in MediaPipe's order.
        triangles: (F, 3) of the skin, with holes at the mouth and the eyes.
        mouth_triangles: (18, 3) that fill the mouth.
        eye_triangles: (28, 3) that fill the eyes.
        noise: scalar, standard deviation of a landmark coordinate around the model, in its unit.
        smile_leak: (k, 80) directions of α into which a smile leaks when one image is fitted (k may be 0), each times
            the square root of its penalty (:mod:`flowvqtalker.train.identity_split`).
    """

    mean: Tensor
    identity: Tensor
    expression: Tensor
    arkit: Tensor
    triangles: Tensor
    mouth_triangles: Tensor
    eye_triangles: Tensor
    noise: Tensor
    smile_leak: Tensor

    def __init__(
        self,
        mean: Tensor,
        identity: Tensor,
        expression: Tensor,
        arkit: Tensor,
        triangles: Tensor,
        mouth_triangles: Tensor,
        eye_triangles: Tensor,
        noise: float | Tensor = 0.005,
        smile_leak: Tensor | None = None,
    ) -> None:
        super().__init__()
        tensors = {
            "mean": (mean, (VERTICES, 3)),
            "identity": (identity, (IDENTITY, VERTICES, 3)),
            "expression": (expression, (EXPRESSION, VERTICES, 3)),
            "arkit": (arkit, (BLENDSHAPES, EXPRESSION + 1)),
            "noise": (torch.as_tensor(noise), ()),
        }
        for name, (tensor, shape) in tensors.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
            self.register_buffer(name, tensor.detach().to(torch.float32).contiguous())
        leak = torch.zeros(0, IDENTITY) if smile_leak is None else smile_leak
        if leak.ndim != 2 or leak.shape[1] != IDENTITY:
            raise ValueError(f"smile_leak must have shape (k, {IDENTITY}), got {tuple(leak.shape)}")
        self.register_buffer("smile_leak", leak.detach().to(torch.float32).contiguous())
        indices = {"triangles": triangles, "mouth_triangles": mouth_triangles, "eye_triangles": eye_triangles}
        for name, tensor in indices.items():
            if tensor.ndim != 2 or tensor.shape[1] != 3 or int(tensor.max()) >= VERTICES or int(tensor.min()) < 0:
                raise ValueError(f"{name} must be (F, 3) vertex numbers below {VERTICES}, got {tuple(tensor.shape)}")
            self.register_buffer(name, tensor.detach().to(torch.int64).contiguous())

    def shape(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """Vertices (..., 478, 3) of identity (..., 80) and expression (..., 64); leading axes broadcast."""
        person = alpha @ self.identity.flatten(1)
        face = beta @ self.expression.flatten(1)
        vertices = self.mean.flatten() + person + face
        return vertices.reshape(*vertices.shape[:-1], VERTICES, 3)

    def project(self, alpha: Tensor, beta: Tensor, rho: Tensor) -> Tensor:
        """Vertices in the crop's camera.

        Arguments:
            alpha: (..., 80).
            beta: (..., 64).
            rho: (..., 6) = (pitch, yaw, roll in radians, tx, ty, tz in the model's unit).

        Returns:
            (..., 478, 3): u and v in pixels of the crop, and the depth Z in the model's unit.
        """
        camera = self.shape(alpha, beta) @ rotation_matrix(rho[..., :3]).mT + rho[..., None, 3:]
        depth = camera[..., 2:]
        return torch.cat([FOCAL * camera[..., :2] / depth + CENTRE, depth], dim=-1)

    def blendshapes(self, beta: Tensor) -> Tensor:
        """ARKit blendshapes (..., 52) in [0, 1] of expression (..., 64), in MediaPipe's order (0 is ``_neutral``)."""
        return (beta @ self.arkit[:, :-1].mT + self.arkit[:, -1]).clamp(0, 1)

    def save(self, path: str | Path, *, half: bool = True) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Arguments:
            half: store the bases and the blendshape map as float16; rounding moves a vertex by less than 0.02 % of
                the eye distance.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if not tensor.is_floating_point():
                tensors[name] = tensor.to(torch.int16)
            elif half and name in ("identity", "expression", "arkit"):
                tensors[name] = tensor.half().contiguous()
            else:
                tensors[name] = tensor.contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save(tensors, metadata={"format": f"flowvqtalker.face_model {_VERSION}"})
        atomic_write(path, lambda temporary: temporary.write_bytes(content))

    @classmethod
    def load(cls, path: str | Path) -> FaceModel:
        """Read a file written by :meth:`save`.

        Raises:
            UserError: if the file is missing, broken, or holds something else.
        """
        if not Path(path).is_file():
            raise UserError(f"face model not found at {path}; train one with `flowvqtalker train face-model`")
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}); copy it again") from error
        return cls.from_tensors(tensors, str(path))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], source: str = "the given tensors") -> FaceModel:
        """A model from the tensors of a saved file.

        Raises:
            UserError: if a tensor is missing or has the wrong shape.
        """
        names = ("mean", "identity", "expression", "arkit", "triangles", "mouth_triangles", "eye_triangles", "noise")
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UserError(f"{source} is not a face model: it has no {', '.join(missing)}")
        try:
            return cls(**{name: tensors[name] for name in names}, smile_leak=tensors.get("smile_leak"))
        except ValueError as error:
            raise UserError(f"{source} is not a face model of this version: {error}") from error
