"""Temporal stability of driven portraits of held-out people: flicker of codes and pixels where nothing should move.

    python benchmarks/stability.py SHARD [--clips ../shared/data/clips] [--weights FOLDER] [--limit 6] [--frames 60]

SHARD is a shard of ``flowvqtalker prepare`` with pictures; its validation split (by identity) is used, people in turn.
Each portrait is driven by the clip's tracked motion, by that of the mouth alone, and by frozen coefficients, through
the renderer that users get. Rows: VQIG, I_w alone, and, with --clips, the real clip and its frames through the codebook
one by one (what the codes do without a generator). Columns: :mod:`flowvqtalker_eval.metrics.stability`. Writes OUT-tracked,
OUT-mouth and OUT-frozen (.md, .csv, .json) and pictures of the first clip (.png, .pdf).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS
from flowvqtalker.io.media import Picture
from flowvqtalker.loading import choose_device, fast_dtype, load_face_model, load_generator
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.figures import stability as figure
from flowvqtalker_eval.figures import style
from flowvqtalker_eval.metrics.codebook_scores import rebuild
from flowvqtalker_eval.metrics.stability import (
    COLUMNS,
    SCENARIOS,
    STILL,
    Stability,
    Take,
    consecutive_flows,
    drive,
    motion_of,
    real_frames,
    takes,
)
from flowvqtalker_eval.report import Row, Table, markdown, write

Found = dict[str, tuple[Stability, Picture]]


class Bench:
    """The models and what was measured with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, choose_device(options.device)
        self.dtype = fast_dtype(self.device)
        self.shard = Shard(options.shard)
        self.face: FaceModel = load_face_model(options.weights)
        self.generator: VQIG = load_generator(options.weights)
        self.mesh = MeshFlow(self.face, 128).to(self.device)
        self.values: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {name: {} for name in SCENARIOS}
        self.frames = dict.fromkeys(SCENARIOS, 0)

    def clip(self, take: Take) -> dict[str, dict[str, figure.Video]]:
        """Measure a clip; returns what to draw of it."""
        drawn = {}
        for scenario in SCENARIOS:
            motion = motion_of(scenario, self.face, take)
            with torch.inference_mode():
                face = self.face.to(self.device)
                alpha = torch.from_numpy(take.alpha).to(self.device)
                vertices = face.project(
                    alpha.expand(len(motion), -1), motion[:, :64].to(self.device), motion[:, 64:].to(self.device)
                )
            flows = [flow.cpu().numpy() for flow in consecutive_flows(self.mesh, vertices)]
            row = int(vertices[0, list(LIPS), 1].mean().clamp(0, 511))
            found: Found = {}
            driven = drive(self.generator, self.face, take, motion, device=self.device, dtype=self.dtype)
            for t, frame in enumerate(driven):
                self._add(found, "VQIG", frame.image, flows, t, take, row, frame.codes)
                self._add(found, "I_w alone", frame.warped, flows, t, take, row)
            if scenario == "tracked" and self.options.clips is not None:
                for t, (real, rebuilt, codes) in enumerate(self._real(take)):
                    self._add(found, "real clip", real, flows, t, take, row)
                    self._add(found, "codebook of the real clip", rebuilt, flows, t, take, row, codes)
            for method, (scores, _) in found.items():
                self.values[scenario].setdefault(method, {})[take.name] = scores.result()
            self.frames[scenario] += len(motion)
            drawn[scenario] = {
                name: figure.Video(shown, scores.deviation, scores.slice, row)
                for name, (scores, shown) in found.items()
            }
        return drawn

    def _add(
        self,
        found: Found,
        name: str,
        frame: Picture,
        flows: list[np.ndarray],
        t: int,
        take: Take,
        row: int,
        codes: np.ndarray | None = None,
    ) -> None:
        if name not in found:
            found[name] = Stability(self.options.still, take.valid, row), frame
        if t == len(flows) // 2:
            found[name] = found[name][0], frame
        found[name][0].add(frame, flows[t - 1] if t else None, codes)

    def _real(self, take: Take) -> Iterator[tuple[Picture, Picture, np.ndarray]]:
        for frame in real_frames(self.shard, take, self.options.clips):
            rebuilt, _, codes = rebuild(self.generator.autoencoder, frame, device=self.device, dtype=self.dtype)
            yield frame, rebuilt, codes

    def table(self, scenario: str) -> Table:
        """Means over the clips."""
        rows = []
        for method, clips in self.values[scenario].items():
            values = {}
            for column in COLUMNS:
                known = [v for row in clips.values() if (v := row[column.key]) is not None]
                mean = max if column.key == "largest" else np.mean
                values[column.key] = float(mean(known)) if known else None
            rows.append(Row(method, values, len(clips), self.frames[scenario], "real" in method, clips))
        title = f"Stability of portraits of held-out people, driven by: {SCENARIOS[scenario]}"
        notes = (f"still: below {self.options.still} pixels of the 512x512 crop a frame, by the face mesh",)
        return Table(title, COLUMNS, tuple(rows), {"render": {"dtype": str(self.dtype), "batch": 4}}, notes)


def main() -> None:
    """Measure, print the tables, write them and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--clips", type=Path, help="folder of the clips that the shard was made from")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--limit", type=int, default=6, help="clips; 0 takes all")
    parser.add_argument("--frames", type=int, default=60, help="at most so many frames of each clip")
    parser.add_argument("--still", type=float, default=STILL, help="pixels a frame below which a place is still")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/stability"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        bench = Bench(options)
        files: list[Path] = []
        for i, take in enumerate(tqdm(takes(bench.shard, options.limit, options.frames))):
            drawn = bench.clip(take)
            for scenario, videos in drawn.items() if i == 0 else ():
                base = options.output.with_name(f"{options.output.name}-{scenario}.png")
                files += style.save(figure.make(videos), base)
        for scenario in SCENARIOS:
            table = bench.table(scenario)
            print(markdown(table))
            files += write(table, options.output.with_name(f"{options.output.name}-{scenario}"))
        print(", ".join(map(str, files)))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
