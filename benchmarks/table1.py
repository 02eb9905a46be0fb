"""Time of Table 1 for a pair of 10-second videos of 512x512, everything that needs no download.

    python benchmarks/table1.py [--pair GENERATED.mp4 REAL.mp4] [--jobs 2] [--runs 3] [--protocol eat]

Without a pair, two takes of the bundled speech are made first (out/benchmark/). Prints the median wall time of the
whole table from an empty cache (budget: 60 s on 2 cores), the start of the processes and the loading of the models
included, its processor time, and what each extractor takes a frame on one core.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from flowvqtalker_eval.metrics.analysis import Extractor, analyse
from flowvqtalker_eval.tables.measures import Options, all_measures
from flowvqtalker_eval.tables.pairs import Method, Pair
from flowvqtalker_eval.tables.table1 import available, measure


def clocked(extractor: Extractor, spent: dict[str, float]) -> None:
    """Make every call of an extractor's class add its processor time to its name's."""
    kind: Any = type(extractor)
    plain = kind.__call__

    @functools.wraps(plain)
    def timed(self: Any, *arguments: Any) -> dict[str, Any]:
        start = time.process_time()
        found: dict[str, Any] = plain(self, *arguments)
        spent[self.name] = spent.get(self.name, 0.0) + time.process_time() - start
        return found

    kind.__call__ = timed


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Two takes of the bundled speech by the bundled portrait."""
    import skimage.data

    from flowvqtalker.pipeline import Talker

    speech = Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "take0.mp4", folder / "take1.mp4"
    if not all(path.is_file() for path in paths):
        talker = Talker.from_pretrained()
        for seed, path in enumerate(paths):
            print(f"making {path}")
            talker.animate(np.asarray(skimage.data.astronaut()), speech, path, emotion="happy", seed=seed)
    return paths


def processor_seconds() -> float:
    """Of this process and of those that it started and that ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, nargs=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--protocol", default="eat")
    given = parser.parse_args()
    made, real = given.pair or make_pair(Path("out/benchmark"))
    method = Method("take", (Pair("take", made, real, "happy"),))
    options = Options(protocol=given.protocol, jobs=given.jobs)
    walls, processors = [], []
    frames = 0
    for _ in range(given.runs):
        start, used = time.perf_counter(), processor_seconds()
        table = measure([method], options)
        walls.append(time.perf_counter() - start)
        processors.append(processor_seconds() - used)
        frames = table.rows[1].frames
    print(f"{frames} frames a video, protocol {given.protocol}, {given.jobs} processes, {os.cpu_count()} cores")
    print(
        f"whole table: {statistics.median(walls):.1f} s (median of {given.runs}, {min(walls):.1f} to {max(walls):.1f})"
    )
    print(f"processor time: {statistics.median(processors):.1f} s")
    print(f"columns: {', '.join(column.key for column in table.columns)}")
    for note in table.notes:
        if note.startswith("left out"):
            print(note[:100])

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _, extractors, _ = available(all_measures(options), ())
    spent: dict[str, float] = {}
    for extractor in extractors.values():
        clocked(extractor, spent)
    analyse(real, list(extractors.values()))  # loads the models
    spent.clear()
    with tempfile.TemporaryDirectory() as cache:
        start = time.process_time()
        found = analyse(made, list(extractors.values()), cache)
        total = time.process_time() - start
    for extractor in extractors.values():
        getattr(extractor, "close", int)()
    print("\n| extractor | ms a frame, one core |\n|---|---:|")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1000 * seconds / found.frames:.1f} |")
    rest = total - sum(spent.values())
    print(f"| decoding, cache | {1000 * rest / found.frames:.1f} |\n| all | {1000 * total / found.frames:.1f} |")


if __name__ == "__main__":
    main()
