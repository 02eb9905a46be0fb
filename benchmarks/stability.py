"""Temporal stability of driven portraits of held-out people: flicker of codes and pixels where nothing should move.

    python benchmarks/stability.py SHARD [--clips ../shared/data/clips] [--weights FOLDER] [--limit 6] [--frames 60]

SHARD is a shard of ``flowvqtalker prepare`` with images; its validation split (by identity) is used, people in turn.
Each portrait is driven by the clip's tracked motion, and by frozen coefficients, under which nothing may change. Rows:
VQIG, I_w alone, and, with --clips, the real clip and its frames through the codebook one by one. Real clips have noise,
hair and moving backgrounds of their own. Writes OUT-tracked and OUT-frozen (.md, .csv, .json).

The face mesh alone says what moves: from frame t - 1 to t it moves pixel p of frame t by the backward flow f_t(p), in
pixels of the 512x512 crop. A place is *still* at t where |f_t| < τ. With I_t(p) the frame (levels of 255, mean over
colours) and c_t(i, j) the code of a block of pixels, which is still if all of it is:

- ``codes``: share of the still blocks with c_t ≠ c_{t-1};
- ``flicker``: mean of |I_{t-1} - 2 I_t + I_{t+1}| over pixels that are still at t and at t + 1;
- ``change``: mean of |I_t - I_{t-1}| over still pixels;
- ``warping``: mean of |I_t(p) - I_{t-1}(p + f_t(p))| over moving pixels (warping error of Lai et al. 2018).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from held_out import Portrait, drive, in_turn, on_crop
from tqdm import tqdm

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import Crop
from flowvqtalker.io.image import ImageArray
from flowvqtalker.io.video import read_video
from flowvqtalker.loading import choose_device, fast_dtype, load_face_model, load_generator
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.region import RegionVQIG
from flowvqtalker_eval.metrics.reenactment import to_image
from flowvqtalker_eval.metrics.regions import as_tensor
from flowvqtalker_eval.report import Column, Row, Table, markdown, write

SCENARIOS = {"tracked": "the clip's own tracked motion", "frozen": "one frame's coefficients: nothing may change"}
COLUMNS = (
    Column("codes", "codes", "lower", 1, "% of the still blocks whose code changes in a frame"),
    Column("flicker", "flicker", "lower", 3, "mean second difference in time of still pixels, levels of 255"),
    Column("change", "change", "lower", 3, "mean difference of still pixels in consecutive frames, levels"),
    Column("warping", "warping error", "lower", 3, "mean difference of moving pixels after undoing the motion, levels"),
    Column("still", "still", None, 1, "% of the pixels that are still"),
)


class Stability:
    """The figures of one video, frame by frame in constant memory."""

    def __init__(self, tau: float, valid: np.ndarray) -> None:
        self.tau, self.valid = tau, valid
        self.sums: dict[str, list[float]] = {column.key: [0.0, 0.0] for column in COLUMNS}
        self.frames: list[np.ndarray] = []
        self.still: np.ndarray | None = None
        self.codes: np.ndarray | None = None

    def add(self, frame: ImageArray, flow: np.ndarray | None, codes: np.ndarray | None = None) -> None:
        """The next frame; flow (2, h, w) in pixels back to the frame before it, None for the first."""
        now = frame.astype(np.float32)
        if flow is not None:
            if codes is not None and self.codes is not None:
                blocks, side = len(codes), flow.shape[1] // len(codes)
                length = np.hypot(*flow).reshape(blocks, side, blocks, side).max((1, 3))
                self._count("codes", 100.0 * (codes != self.codes)[(length < self.tau) & (codes >= 0)])
            full = np.stack([cv2.resize(part, now.shape[1::-1], interpolation=cv2.INTER_LINEAR) for part in flow])
            still = np.hypot(*full) < self.tau
            here, moves, last = still & self.valid, ~still & self.valid, self.frames[-1]
            self._count("still", 100.0 * still[self.valid])
            self._count("change", np.abs(now - last).mean(2)[here])
            x, y = np.meshgrid(np.arange(now.shape[1], dtype=np.float32), np.arange(now.shape[0], dtype=np.float32))
            moved = cv2.remap(last, x + full[0], y + full[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            self._count("warping", np.abs(now - moved).mean(2)[moves])
            if self.still is not None:
                bend = np.abs(self.frames[0] - 2 * last + now).mean(2)
                self._count("flicker", bend[here & self.still])
            self.still = still
        self.codes = codes
        self.frames = [*self.frames[-1:], now]

    def _count(self, key: str, values: np.ndarray) -> None:
        self.sums[key][0] += float(values.sum(dtype=np.float64))
        self.sums[key][1] += values.size

    def result(self) -> dict[str, float | None]:
        """By the keys of :data:`COLUMNS`; None where nothing counted."""
        return {key: total / count if count else None for key, (total, count) in self.sums.items()}


class Bench:
    """The models and what was measured with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, choose_device(options.device)
        self.dtype = fast_dtype(self.device)
        self.shard = Shard(options.shard)
        self.face, self.generator = load_face_model(options.weights), load_generator(options.weights)
        self.mesh = MeshFlow(self.face, 128).to(self.device)
        self.values: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {name: {} for name in SCENARIOS}
        self.frames = 0

    def clips(self) -> list[int]:
        """The first stored image of each held-out clip that is measured."""
        first: dict[int, int] = {}
        for number, clip in enumerate(self.shard.image_clip.tolist()):
            if self.shard.split[clip] == "val" and not self.shard.is_image[clip] and self.shard.length[clip] >= 3:
                first.setdefault(clip, number)
        if not first:
            raise UserError(f"shard {self.shard.path} has no clip with images in its validation split")
        chosen = in_turn([str(self.shard.identity[clip]) for clip in first], self.options.limit)
        return [list(first.values())[i] for i in chosen]

    def measure(self, number: int) -> None:
        """Both scenarios of a clip."""
        shard, clip = self.shard, int(self.shard.image_clip[number])
        portrait = Portrait.stored(shard, number)
        rows = slice(shard.rows(clip).start, min(shard.rows(clip).stop, shard.rows(clip).start + self.options.frames))
        tracked = np.concatenate([shard.expression[rows], shard.pose[rows]], axis=1).astype(np.float32)
        frozen = np.repeat(tracked[[np.abs(tracked - portrait.start)[:, :64].sum(1).argmax()]], len(tracked), axis=0)
        valid = shard.valid_mask(clip)

        def add(
            found: dict[str, Stability],
            name: str,
            frame: ImageArray,
            flow: np.ndarray | None,
            codes: np.ndarray | None = None,
        ) -> None:
            found.setdefault(name, Stability(self.options.still, valid)).add(frame, flow, codes)

        for scenario, motion in (("tracked", tracked), ("frozen", frozen)):
            flows = self._flows(portrait.alpha, motion)
            found: dict[str, Stability] = {}
            driven = drive(self.generator, self.face, portrait, motion, self.device, self.dtype)
            for t, frame in enumerate(driven):
                flow = flows[t - 1] if t else None
                add(found, "VQIG", frame.image, flow, frame.codes)
                add(found, "I_w alone", frame.warped, flow)
            if scenario == "tracked" and self.options.clips is not None:
                for t, (real, rebuilt, codes) in enumerate(self._real(portrait.name, clip, len(motion))):
                    flow = flows[t - 1] if t else None
                    add(found, "real clip", real, flow)
                    add(found, "codebook of the real clip", rebuilt, flow, codes)
            for method, scores in found.items():
                self.values[scenario].setdefault(method, {})[portrait.name] = scores.result()
        self.frames += len(tracked)

    @torch.inference_mode()
    def _flows(self, alpha: np.ndarray, motion: np.ndarray) -> list[np.ndarray]:
        """Flow (2, h, w) in pixels from each frame back to the one before it."""
        values = torch.from_numpy(motion).to(self.device)
        shape = torch.from_numpy(alpha).to(self.device).expand(len(motion), -1)
        points = self.face.to(self.device).project(shape, values[:, :64], values[:, 64:])
        pairs = ((points[t - 1 : t], points[t : t + 1]) for t in range(1, len(points)))
        return [(self.mesh(*pair)[0, :2] * (self.mesh.image_size / 2)).cpu().numpy() for pair in pairs]

    @torch.inference_mode()
    def _real(self, name: str, clip: int, count: int) -> Iterator[tuple[ImageArray, ImageArray, np.ndarray]]:
        """Real frames, the same through the codebook, and their codes."""
        path = Path(self.options.clips) / name
        if not path.is_file():
            raise UserError(f"the clip {path} does not exist; give the folder that the shard was made from")
        crop = Crop(self.shard.crop[clip])
        for _, frame in zip(range(count), read_video(path), strict=False):
            real = crop.apply(frame)
            image, generator = as_tensor(real, self.device), self.generator
            region = generator.cut(image) if isinstance(generator, RegionVQIG) else image
            codes = generator.autoencoder.encode(region)[1][0].cpu().numpy()
            yield real, to_image(generator.reconstruct(image)[0]), on_crop(generator, codes)

    def table(self, scenario: str) -> Table:
        """Means over the clips."""
        rows = []
        for method, clips in self.values[scenario].items():
            known = {c.key: [v for row in clips.values() if (v := row[c.key]) is not None] for c in COLUMNS}
            values = {key: float(np.mean(found)) if found else None for key, found in known.items()}
            rows.append(Row(method, values, len(clips), self.frames, "real" in method, clips))
        title = f"Stability of portraits of held-out people, driven by {SCENARIOS[scenario]}"
        notes = (f"still: below {self.options.still} pixels of the 512x512 crop a frame, by the face mesh",)
        return Table(title, COLUMNS, tuple(rows), {"render": {"dtype": str(self.dtype)}}, notes)


def main() -> None:
    """Measure, print the tables, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--clips", type=Path, help="folder of the clips that the shard was made from")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--limit", type=int, default=6, help="clips; 0 takes all")
    parser.add_argument("--frames", type=int, default=60, help="of each clip at most")
    parser.add_argument("--still", type=float, default=0.25, help="τ, pixels a frame below which a place is still")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/stability"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        bench = Bench(options)
        for number in tqdm(bench.clips()):
            bench.measure(number)
        for scenario in SCENARIOS:
            table = bench.table(scenario)
            print(markdown(table))
            files = write(table, options.output.with_name(f"{options.output.name}-{scenario}"))
            print(", ".join(map(str, files)))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
