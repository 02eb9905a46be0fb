"""What the stages of codebook and image generator share: source views, scores of images, weights to start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS
from flowvqtalker.render.layers import take_over
from flowvqtalker.render.mesh_flow import PRIOR, MeshFlow, aperture_maps, identity_grid, upsample_flow
from flowvqtalker.render.perceptual import PerceptualLoss

__all__ = ["image_scores", "load_codebook", "load_matching", "make_views", "motion_statistics", "shut_lips"]

Batch = dict[str, Tensor]

#: Pixels at which an aperture map reaches 1, and the width of the dark line where shut lips meet.
_RIM, _LINE = 12.0, 1.5
#: Darkest line between shut lips, as a fraction of black.
_DARK = 0.6

logger = logging.getLogger(__name__)


def shut_lips(face: FaceModel, identity: Tensor, expression: Tensor) -> Tensor:
    """Expressions (B, 64) whose lips touch along their whole length: the nearest to those given (least squares).

    Lips that are nearly shut on one face are not on another, and the mesh would show what is behind them.
    """
    half = len(INNER_LIPS) // 2
    upper, lower = list(INNER_LIPS[1:half]), list(INNER_LIPS[half + 1 :])[::-1]

    def gap(points: Tensor) -> Tensor:
        return points[..., lower, 1] - points[..., upper, 1]

    slope = gap(face.expression)  # (64, gaps)
    gaps = gap(face.mean) + identity @ gap(face.identity) + expression @ slope
    # On the CPU, where the decomposition of so small a matrix does not wait for the device.
    inverse = torch.linalg.pinv(slope.double().cpu(), rtol=1e-2).to(slope)
    nearest: Tensor = expression - gaps @ inverse
    return nearest


@torch.no_grad()
def make_views(face: FaceModel, mesh: MeshFlow, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Both views of a batch of :class:`~flowvqtalker.data.pairs.PairDataset`.

    Arguments:
        face: the shard's face model, on the batch's device.
        mesh: on the batch's device.
        batch: of size B.

    Returns:
        the source images (B, 3, 512, 512), synthetic ones moved by the mesh; the mesh flow from target to source; the
        target's vertices (B, 478, 3).
    """
    target, source = batch["target"], batch["source"]
    with torch.autocast(target.device.type, enabled=False):
        expression, shut = batch["source_expression"], batch["shut_lips"].bool()
        if shut.any():
            closed = shut_lips(face, batch["source_identity"], expression)
            expression = torch.where(shut[:, None], closed, expression)
        start = face.project(batch["source_identity"], expression, batch["source_pose"])
        end = face.project(batch["identity"], batch["target_expression"], batch["target_pose"])
        made = batch["synthetic"].bool()
        if made.any():
            source = source.clone()
            source[made] = _moved(mesh, target[made], start[made], end[made], shut[made])
        return source, mesh(start, end), end


def _moved(mesh: MeshFlow, image: Tensor, start: Tensor, end: Tensor, shut: Tensor) -> Tensor:
    """Images (B, 3, s, s) of vertices ``end`` in the pose and expression of vertices ``start``."""
    side = image.shape[-1]
    back = mesh(end, start)
    if back.shape[1] == PRIOR:
        flow = upsample_flow(back[:, :2], back, side)
    else:
        flow = F.interpolate(back, (side, side), mode="bilinear", align_corners=False)
    grid = identity_grid(side, side, image.device) + flow.permute(0, 2, 3, 1)
    # Bicubic: the source must not be blurred by a resampling that the target has not seen.
    moved = F.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=False)
    if shut.any():  # shut lips meet in a dark line, which no pixel of an open mouth shows
        far = F.interpolate(aperture_maps(start, 128)[:, :1], (side, side), mode="bilinear") * _RIM
        dark = torch.rand(len(image), 1, 1, 1, device=image.device) * _DARK * shut[:, None, None, None]
        moved = (moved + 1) * (1 - dark * torch.exp(-0.5 * (far / _LINE) ** 2)) - 1
    return moved.clamp_(-1, 1)


def image_scores(image: Tensor, target: Tensor, perceptual: PerceptualLoss | None) -> dict[str, float]:
    """L1, PSNR (dB), SSIM (skimage, 7x7) and perceptual distance of one image (1, 3, H, W) in [-1, 1]."""
    from skimage.metrics import structural_similarity

    image = image.float().clamp(-1, 1)
    a, b = (((x[0].cpu().numpy() + 1) * 127.5).round().astype("uint8") for x in (image, target))
    scores = {
        "l1": F.l1_loss(image, target).item(),
        "psnr": float(10 * torch.log10(4 / F.mse_loss(image, target).clamp(min=1e-6))),
        "ssim": float(structural_similarity(a, b, channel_axis=0)),
    }
    if perceptual is not None:
        scores["perceptual"] = perceptual.to(target.device)(image, target).item()
    return scores


def motion_statistics(shard: Shard) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (70,) of the motion coefficients [β, ρ] of the training split."""
    rows = torch.cat([torch.arange(s.start, s.stop) for s in map(shard.rows, shard.select("train"))])
    picked = rows[:: max(1, len(rows) // 20_000)].numpy()
    values = torch.cat([torch.from_numpy(x[picked]) for x in (shard.expression, shard.pose)], dim=1)
    return values.mean(0), values.std(0).clamp(min=1e-3)


def load_codebook(file: Path, kind: Literal["data.codebook", "data.start"]) -> dict[str, Tensor]:
    """The tensors of a codebook, in float32.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not file.is_file():
        hint = "train the codebook first, or set data.codebook" if kind == "data.codebook" else "leave data.start out"
        raise UserError(f"{file} not found; {hint}")
    try:
        return {key: value.float() for key, value in load_file(file).items()}
    except SafetensorError as error:
        raise UserError(f"{file} ({kind}) is not a readable safetensors file; copy it again") from error


def load_matching(module: nn.Module, file: Path) -> None:
    """Take over another generator's weights as far as they fit (:func:`~flowvqtalker.render.layers.take_over`).

    Raises:
        UserError: if the file is missing or holds something else.
    """
    if not file.is_file():
        raise UserError(f"{file} not found; set data.start to the weights of an image generator, or leave it out")
    given = load_file(file)
    taken = take_over(module, given)
    if not any(key.startswith("encoder.") for key in taken):
        raise UserError(f"{file} (data.start) holds no image generator of this size; give one, or leave it out")
    new = sorted({key.split(".")[0] for key in module.state_dict() if key not in taken} - {"autoencoder"})
    logger.info("%d of %d tensors come from %s; new parts: %s", len(taken), len(given), file, ", ".join(new) or "none")
