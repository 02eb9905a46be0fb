"""Time of Table 1 for a pair of 10-second videos of 512x512, with every metric that needs no download.

    python benchmarks/table1.py [--pair GENERATED.mp4 REAL.mp4] [--jobs 2] [--runs 3] [--protocol eat]

Without a pair, two samples of the bundled speech are made first (out/benchmark/). Prints the median wall time of the
whole table from an empty cache (budget: 60 s on 2 cores), including starting the processes and loading the models, its
processor time, and the time of each extractor per frame on one core.
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


def make_pair(folder: Path) -> list[Path]:
    """Two samples of the bundled speech on a public-domain portrait."""
    import skimage.data

    from flowvqtalker.pipeline import Talker

    speech = Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "sample0.mp4", folder / "sample1.mp4"]
    if not all(path.is_file() for path in paths):
        talker = Talker.from_pretrained()
        for seed, path in enumerate(paths):
            print(f"making {path}")
            talker.animate(np.asarray(skimage.data.astronaut()), speech, path, emotion="happy", seed=seed)
    return paths


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def time_table(method: Method, options: Options, runs: int) -> None:
    """Print wall and processor time of the whole table."""
    walls, processors = [], []
    for _ in range(runs):
        start, used = time.perf_counter(), processor_seconds()
        table = measure([method], options)
        walls.append(time.perf_counter() - start)
        processors.append(processor_seconds() - used)
    print(f"{table.rows[1].frames} frames per video, {options.jobs} processes, {os.cpu_count()} cores")
    print(f"whole table: {statistics.median(walls):.1f} s (median of {runs}, {min(walls):.1f} to {max(walls):.1f})")
    print(f"processor time: {statistics.median(processors):.1f} s")
    print(f"columns: {', '.join(column.key for column in table.columns)}")
    print(*(note[:100] for note in table.notes if note.startswith(("protocol", "left out"))), sep="\n")


def clock(extractor: Extractor, spent: dict[str, float]) -> None:
    """Let every call of an extractor's class add its processor time under its name."""
    kind: Any = type(extractor)
    plain = kind.__call__

    @functools.wraps(plain)
    def timed(self: Any, *arguments: Any) -> dict[str, Any]:
        start = time.process_time()
        found: dict[str, Any] = plain(self, *arguments)
        spent[self.name] = spent.get(self.name, 0.0) + time.process_time() - start
        return found

    kind.__call__ = timed


def time_extractors(generated: Path, real: Path, options: Options) -> None:
    """Print milliseconds per frame of each extractor on one core."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    extractors = list(available(all_measures(options), ())[1].values())
    spent: dict[str, float] = {}
    for extractor in extractors:
        clock(extractor, spent)
    analyse(real, extractors)  # loads the models
    spent.clear()
    with tempfile.TemporaryDirectory() as cache:
        start = time.process_time()
        frames = analyse(generated, extractors, cache).frames
        total = time.process_time() - start
    for extractor in extractors:
        getattr(extractor, "close", int)()
    rows = sorted(spent.items(), key=lambda item: -item[1])
    rows += [("decoding, cache", total - sum(spent.values())), ("total", total)]
    print("\n| extractor | ms per frame, one core |\n|---|---:|")
    print(*(f"| {name} | {1000 * seconds / frames:.1f} |" for name, seconds in rows), sep="\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, nargs=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--protocol", choices=("eat", "native"), default="eat")
    given = parser.parse_args()
    generated, real = given.pair or make_pair(Path("out/benchmark"))
    options = Options(protocol=given.protocol, jobs=given.jobs)
    time_table(Method("sample", (Pair("sample", generated, real, "happy"),)), options, given.runs)
    time_extractors(generated, real, options)


if __name__ == "__main__":
    main()
