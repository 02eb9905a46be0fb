"""Temporal stability: does what should rest rest? Flicker of codes and of pixels, apart for still and moving places.

What moves is said by the face mesh alone, whatever the generator makes of it. From frame t - 1 to t it moves the pixel
p of frame t by the backward flow f_t(p) (:class:`flowvqtalker.render.mesh_flow.MeshFlow` of the two frames' vertices), in
pixels of the 512x512 crop. A place is *still* at t where |f_t| < τ, else *moving*.

With I_t(p) the frame (levels 0 to 255, mean over the colours of the absolute values) and c_t(i, j) the code of a 32x32
block, which is still if all of it is:

- ``codes_still``, ``codes_moving``: share of the blocks, over all t, with c_t ≠ c_{t-1};
- ``flicker``: mean of |I_{t-1} - 2 I_t + I_{t+1}| over pixels that are still at t and at t + 1;
- ``change``: mean of |I_t - I_{t-1}| over still pixels; ``largest``: the largest single one;
- ``warping``: mean of |I_t(p) - I_{t-1}(p + f_t(p))| over moving pixels: the warping error of Lai et al. 2018 with the
  known flow in place of an estimated one.

Real clips have noise, hair, hands and moving backgrounds of their own, so theirs are beside the numbers, not below.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.data.pairs import window
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import Crop
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import EYES, LIPS, RIGID
from flowvqtalker.io.media import Picture, read_video
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics.codebook_scores import spread
from flowvqtalker_eval.report import Column

__all__ = [
    "COLUMNS",
    "SCENARIOS",
    "STILL",
    "Driven",
    "Stability",
    "Subject",
    "Take",
    "consecutive_flows",
    "drive",
    "measure",
    "motion_of",
    "mouth_only",
    "real_frames",
    "still_blocks",
    "takes",
]

#: τ: pixels of the 512x512 crop a frame.
STILL = 0.25

#: Motions that a portrait is driven with.
SCENARIOS = {
    "tracked": "the clip's own tracked expression and pose",
    "mouth": "the clip's mouth and jaw alone; head, brows and eyes rest",
    "frozen": "every frame the coefficients of one frame of the clip: the video must not change at all",
}

COLUMNS = (
    Column("codes_still", "codes, still", "lower", 1, "% of the still 32x32 blocks whose code changes in a frame"),
    Column("codes_moving", "codes, moving", None, 1, "the same of the moving blocks"),
    Column("flicker", "flicker", "lower", 3, "mean second difference in time of still pixels, levels of 255"),
    Column("change", "change", "lower", 3, "mean difference of still pixels in consecutive frames, levels"),
    Column("largest", "largest", None, 0, "largest difference of a still pixel in consecutive frames, levels"),
    Column("warping", "warping error", "lower", 3, "mean difference of moving pixels after undoing the motion, levels"),
    Column("still", "still", None, 1, "% of the pixels that are still"),
)

_SIDE = 512


# -------------------------------------------------------------------------------------------------------------- motion


@torch.inference_mode()
def consecutive_flows(mesh: MeshFlow, vertices: Tensor) -> Iterator[Tensor]:
    """Flow (2, h, w) in pixels from each frame back to the one before it; the first frame has none.

    Arguments:
        mesh: without openings.
        vertices: (T, 478, 3) projected vertices.
    """
    for t in range(1, len(vertices)):
        yield mesh(vertices[t - 1 : t], vertices[t : t + 1])[0, :2] * (mesh.image_size / 2)


def still_blocks(flow: npt.NDArray[np.floating[Any]], blocks: int = 16, still: float = STILL) -> npt.NDArray[np.bool_]:
    """(blocks, blocks) bool: which blocks of the picture move nowhere by ``still`` pixels or more.

    Arguments:
        flow: (2, h, w) pixels; h and w divisible by ``blocks``.
    """
    size = _length(flow)
    if size.shape[0] % blocks or size.shape[1] % blocks:
        raise UserError(f"a flow of {size.shape} cannot be divided into {blocks}x{blocks} blocks")
    shape = blocks, size.shape[0] // blocks, blocks, size.shape[1] // blocks
    return np.asarray(size.reshape(shape).max((1, 3)) < still)


def _length(flow: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise UserError(f"a flow has shape (2, h, w), got {flow.shape}")
    return np.asarray(np.hypot(flow[0], flow[1]), np.float32)


def mouth_only(face: FaceModel, expression: Tensor, rest: Tensor, hold: float = 4.0) -> Tensor:
    """Expressions (T, 64) that move the lips as the given ones do, and what lies above them not at all.

    β'_t = rest + argmin_x Σ_lips |B (x - (β_t - rest))|² + h² Σ_held |B x|² + ε |x|², with B the basis of the vertices;
    held are those over bone and around the eyes.

    Arguments:
        face: the face model.
        expression: (T, 64).
        rest: (64,) expression of the first frame.
        hold: h.
    """
    basis = face.expression.detach().cpu().double()  # (64, 478, 3)
    if expression.ndim != 2 or expression.shape[1] != len(basis) or rest.shape != (len(basis),):
        raise UserError(
            f"expressions are (T, {len(basis)}) and a resting one, got {tuple(expression.shape)}, {tuple(rest.shape)}"
        )
    lips = basis[:, list(LIPS)].flatten(1).T
    held = basis[:, [*RIGID, *EYES[0], *EYES[1]]].flatten(1).T * hold
    size = float(lips.square().sum())
    normal = lips.T @ lips + held.T @ held + 1e-4 * size / len(basis) * torch.eye(len(basis), dtype=torch.float64)
    change = (expression - rest).double()
    moved: Tensor = rest + torch.linalg.solve(normal, lips.T @ lips @ change.T).T.to(rest.dtype)
    return moved


def motion_of(scenario: str, face: FaceModel, take: Take) -> Tensor:
    """(T, 70) coefficients of a scenario, a key of :data:`SCENARIOS`; T is that of the clip.

    Raises:
        UserError: if there is no such scenario.
    """
    expression, pose = torch.from_numpy(take.expression), torch.from_numpy(take.pose)
    if scenario == "mouth":
        expression = mouth_only(face, expression, torch.from_numpy(take.start[:64]))
        pose = torch.from_numpy(take.start[64:]).expand(len(pose), -1)
    elif scenario == "frozen":
        far = (expression - torch.from_numpy(take.start[:64])).norm(dim=1).argmax()
        expression, pose = expression[far].expand(len(pose), -1), pose[far].expand(len(pose), -1)
    elif scenario != "tracked":
        raise UserError(f"unknown scenario {scenario!r}; choose one of {', '.join(SCENARIOS)}")
    return torch.cat([expression, pose], dim=1)


# --------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Take:
    """A held-out clip: the portrait and what drives it.

    Attributes:
        name, identity: of the clip.
        number: of the clip in its shard.
        portrait: (512, 512, 3) the first stored picture.
        alpha: (80,) identity.
        start: (70,) coefficients of the portrait.
        expression, pose: (T, 64), (T, 6) of the frames.
        valid: (512, 512) bool, pixels that lie inside the clip's picture.
        stored: (512, 512, 3) a stored picture of one of the frames, and its number among them.
    """

    name: str
    identity: str
    number: int
    portrait: Picture
    alpha: npt.NDArray[np.float32]
    start: npt.NDArray[np.float32]
    expression: npt.NDArray[np.float32]
    pose: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    stored: tuple[Picture, int] | None


def takes(shard: Shard, limit: int = 6, frames: int = 60) -> list[Take]:
    """Held-out clips with pictures, people in turn, each cut to its first frames.

    Arguments:
        shard: with pictures.
        limit: at most so many clips; 0 takes all.
        frames: at most so many frames of each, at least 3.

    Raises:
        UserError: if there is none, or the numbers cannot be.
    """
    if frames < 3:
        raise UserError(f"flicker is seen in three frames or more, got {frames}")
    stored: dict[int, list[int]] = {}
    for number, clip in enumerate(shard.image_clip.tolist()):
        if shard.split[clip] == "val" and not shard.picture[clip] and shard.length[clip] >= 3:
            stored.setdefault(clip, []).append(number)
    clips = list(stored)
    if not clips:
        raise UserError(f"shard {shard.path} has no clip with pictures in its validation split; prepare another")
    found = []
    for i in spread([str(shard.identity[clip]) for clip in clips], limit):
        clip = clips[i]
        rows, first = shard.rows(clip), stored[clip][0]
        end = min(rows.stop, rows.start + frames)
        own = {int(shard.image_row[n]) - rows.start: n for n in stored[clip]}
        seen = [t for t in own if t < end - rows.start]
        row = int(shard.image_row[first])
        found.append(
            Take(
                name=str(shard.name[clip]),
                identity=str(shard.identity[clip]),
                number=clip,
                portrait=shard.image(first),
                alpha=np.array(shard.identity_shape[clip], np.float32),
                start=np.concatenate([shard.expression[row], shard.pose[row]]).astype(np.float32),
                expression=np.array(shard.expression[rows.start : end]),
                pose=np.array(shard.pose[rows.start : end]),
                valid=shard.valid_mask(clip),
                stored=(shard.image(own[seen[0]]), seen[0]) if seen else None,
            )
        )
    return found


def real_frames(shard: Shard, take: Take, folder: str | Path) -> list[Picture]:
    """The real clip's frames (512, 512, 3), cut as the shard's pictures are.

    Arguments:
        shard: the take's.
        folder: where the clips are, by the names in the shard.

    Raises:
        UserError: if the file is missing, too short, or shows something else than the shard's picture of it.
    """
    path = Path(folder) / take.name
    if not path.is_file():
        raise UserError(f"the clip {path} does not exist; give the folder that the shard was made from")
    crop = Crop(shard.crop[take.number])
    frames = []
    for t, frame in enumerate(read_video(path)):
        if t >= len(take.expression):
            break
        frames.append(crop.apply(frame))
    if len(frames) < len(take.expression):
        raise UserError(f"{path} has {len(frames)} frames at 25 fps, the shard says at least {len(take.expression)}")
    if take.stored is not None:
        picture, t = take.stored
        apart = float(cv2.absdiff(picture, frames[t]).mean())
        if apart > 12:
            raise UserError(f"{path} does not show what the shard stored of it (frames differ by {apart:.0f} of 255)")
    return frames


# -------------------------------------------------------------------------------------------------------------- videos


@dataclass(frozen=True)
class Driven:
    """One frame of a driven portrait.

    Attributes:
        image, warped: (512, 512, 3) the generated frame and I_w.
        codes: (16, 16) predicted codes, None without the code transformer.
    """

    image: Picture
    warped: Picture
    codes: npt.NDArray[np.int64] | None


class Subject(Protocol):
    """Whom to drive; see :class:`Take`."""

    @property
    def portrait(self) -> Picture: ...
    @property
    def alpha(self) -> npt.NDArray[np.float32]: ...
    @property
    def start(self) -> npt.NDArray[np.float32]: ...


class _Watched(Renderer):
    """The renderer itself, which also keeps the codes and I_w of the frames it gives."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: deque[tuple[Picture, npt.NDArray[np.int64] | None]] = deque()
        self._hook = self.generator.register_forward_hook(self._keep)

    def _keep(self, module: Any, arguments: Any, found: Any) -> None:
        warped = found.warped.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        for i, picture in enumerate(warped.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            codes = None
            if found.logits is not None:
                best = found.logits[i].argmax(-1)
                codes = best.view(round(len(best) ** 0.5), -1).cpu().numpy()
            self.seen.append((picture, codes))

    def some(self, motion: npt.NDArray[np.float32], frames: Sequence[int]) -> Iterator[Picture]:
        """The frames of these numbers alone."""
        for first in range(0, len(frames), self.batch_size):
            chosen = frames[first : first + self.batch_size]
            yield from self._batch(torch.from_numpy(np.stack([window(motion, t) for t in chosen])))

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()


def drive(
    generator: VQIG,
    face: FaceModel,
    subject: Subject,
    motion: Tensor,
    *,
    frames: Sequence[int] | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Driven]:
    """A portrait driven by (T, 70) coefficients, frame by frame, by the renderer that users get.

    Arguments:
        generator, face: the models.
        subject: whose portrait.
        motion: (T, 70).
        frames: numbers of the frames to render; None renders all.
        batch_size, device, dtype: see :class:`flowvqtalker.render.renderer.Renderer`.
    """
    renderer = _Watched(
        generator,
        face,
        subject.portrait,
        torch.from_numpy(subject.alpha),
        torch.from_numpy(subject.start[:64]),
        torch.from_numpy(subject.start[64:]),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    try:
        everything = renderer.render([(motion[:, :64], motion[:, 64:])])
        for frame in everything if frames is None else renderer.some(motion.float().cpu().numpy(), frames):
            warped, codes = renderer.seen.popleft()
            yield Driven(frame, warped, codes)
    finally:
        renderer.close()


# -------------------------------------------------------------------------------------------------------------- scores


@dataclass
class Stability:
    """The numbers of one video, frame by frame in constant memory; see the module for what they are.

    Attributes:
        still: τ, pixels a frame.
        valid: (H, W) bool, pixels that count; None are all.
        row: of the picture that is kept of every frame, for :attr:`slice`; None keeps none.
    """

    still: float = STILL
    valid: npt.NDArray[np.bool_] | None = None
    row: int | None = None
    frames: int = field(default=0, init=False)
    _sums: dict[str, float] = field(default_factory=dict, init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)
    _largest: float = field(default=0.0, init=False)
    _before: list[npt.NDArray[np.float32]] = field(default_factory=list, init=False)
    _rests: npt.NDArray[np.bool_] | None = field(default=None, init=False)
    _codes: npt.NDArray[np.integer[Any]] | None = field(default=None, init=False)
    _moments: list[npt.NDArray[np.float64]] = field(default_factory=list, init=False)
    _rows: list[Picture] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.still <= 0:
            raise UserError(f"places are still below a positive number of pixels a frame, got {self.still}")

    def add(
        self,
        frame: Picture,
        flow: npt.NDArray[np.floating[Any]] | None,
        codes: npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """The next frame.

        Arguments:
            frame: (H, W, 3) uint8 RGB.
            flow: (2, h, w) in pixels, from this frame back to the one before it; None for the first frame only.
            codes: (n, n), of all frames or of none.

        Raises:
            UserError: if sizes change, or a flow is missing.
        """
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise UserError(f"frames are (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        if (flow is None) != (self.frames == 0):
            raise UserError("the first frame, and no other, comes without a flow from it to the frame before")
        if self.frames and frame.shape != self._before[-1].shape:
            raise UserError(f"frames of one video have one size, got {self._before[-1].shape} and {frame.shape}")
        if self.valid is not None and self.valid.shape != frame.shape[:2]:
            raise UserError(f"the mask of valid pixels {self.valid.shape} does not fit frames of {frame.shape[:2]}")
        if self.frames and (codes is None) != (self._codes is None):
            raise UserError("give the codes of all frames or of none")
        now = frame.astype(np.float32)
        if self.row is not None:
            self._rows.append(frame[self.row].copy())
        grey = now.mean(2, dtype=np.float64)
        if self._moments:
            self._moments[0] += grey
            self._moments[1] += grey * grey
        else:
            self._moments = [grey, grey * grey]
        if flow is not None:
            self._compare(now, np.asarray(flow, np.float32), codes)
        self._codes = codes
        self._before = [*self._before[-1:], now]
        self.frames += 1

    def _compare(
        self,
        now: npt.NDArray[np.float32],
        flow: npt.NDArray[np.float32],
        codes: npt.NDArray[np.integer[Any]] | None,
    ) -> None:
        height, width = now.shape[:2]
        if codes is not None and self._codes is not None:
            rests = still_blocks(flow, len(codes), self.still)
            changed = codes != self._codes
            self._add("codes_still", changed[rests])
            self._add("codes_moving", changed[~rests])
        full = np.stack([cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) for part in flow])
        rests = _length(full) < self.still
        counted = np.ones_like(rests) if self.valid is None else self.valid
        self._add("still", rests[counted])
        last = self._before[-1]
        step = np.abs(now - last)
        here = rests & counted
        self._add("change", step.mean(2)[here])
        if here.any():
            self._largest = max(self._largest, float(step[here].max()))
        moves = ~rests & counted
        if moves.any():
            x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
            moved = cv2.remap(last, x + full[0], y + full[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            self._add("warping", np.abs(now - moved).mean(2)[moves])
        if len(self._before) == 2 and self._rests is not None:
            bend = np.abs(self._before[0] - 2 * last + now).mean(2)
            self._add("flicker", bend[here & self._rests])
        self._rests = rests

    def _add(self, key: str, values: npt.NDArray[Any]) -> None:
        self._sums[key] = self._sums.get(key, 0.0) + float(values.sum(dtype=np.float64))
        self._counts[key] = self._counts.get(key, 0) + values.size

    def result(self) -> dict[str, float | None]:
        """The numbers by the keys of :data:`COLUMNS`; None where nothing counted.

        Raises:
            UserError: if there were fewer than three frames.
        """
        if self.frames < 3:
            raise UserError(f"flicker is seen in three frames or more, got {self.frames}")
        scale = {"codes_still": 100.0, "codes_moving": 100.0, "still": 100.0}
        found: dict[str, float | None] = {}
        for column in COLUMNS:
            count = self._counts.get(column.key, 0)
            found[column.key] = scale.get(column.key, 1.0) * self._sums[column.key] / count if count else None
        found["largest"] = self._largest if self._counts.get("change") else None
        return found

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        """(H, W) standard deviation in time of each pixel's brightness (mean of the colours), levels."""
        if not self.frames:
            raise UserError("no frame was given")
        total, squares = self._moments
        return np.asarray(np.sqrt(np.maximum(squares / self.frames - (total / self.frames) ** 2, 0)))

    @property
    def slice(self) -> Picture:
        """(T, W, 3) one row of every frame, the first frame's on top."""
        if self.row is None or not self._rows:
            raise UserError("no row of the frames was kept; give row")
        return np.stack(self._rows)


def measure(
    frames: Iterable[Picture],
    flows: Sequence[npt.NDArray[np.floating[Any]]],
    codes: Iterable[npt.NDArray[np.integer[Any]]] | None = None,
    **options: Any,
) -> Stability:
    """A whole video: T frames, T - 1 flows, T maps of codes or none; options as :class:`Stability`."""
    found = Stability(**options)
    maps = iter(codes) if codes is not None else None
    for t, frame in enumerate(frames):
        if t > len(flows):
            raise UserError(f"{len(flows)} flows belong to {len(flows) + 1} frames; there are more frames")
        found.add(frame, flows[t - 1] if t else None, next(maps) if maps is not None else None)
    return found
