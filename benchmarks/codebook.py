"""The codebook on held-out people: what 16x16 codes keep of a face, of its mouth and of its eyes.

    python benchmarks/codebook.py SHARD [--weights FOLDER | --run NAME=runs/codebook ...] [--limit 100]
    python benchmarks/codebook.py ../shared/data/faces --table ../shared/data/faces.csv

SHARD is a shard of ``flowvqtalker prepare``: its stills and the frames of its clips are measured apart. A folder of
pictures is measured as it is, with faces found by the tracker. The split is by identity; people are taken in turn.
Rows: each codebook, the same without codes, and the picture reduced to as many bits by other means; columns as
:class:`flowvqtalker_eval.metrics.codebook_scores.CodebookScores` describes them. Writes OUT-stills and OUT-frames (.md,
.csv, .json) and a grid of pictures (.png, .pdf).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.loading import choose_device, fast_dtype
from flowvqtalker.render.vqvae import VQAutoencoder
from flowvqtalker_eval.figures import grid, style
from flowvqtalker_eval.metrics.codebook_scores import (
    CodebookScores,
    Portrait,
    load_codebook,
    still_portraits,
    stored_portraits,
)
from flowvqtalker_eval.report import markdown, write


def pictures(options: argparse.Namespace) -> dict[str, Iterable[Portrait]]:
    """The sets to measure."""
    if not (options.data / "index.npz").is_file():
        return {"stills": tqdm(still_portraits(options.data, options.table, options.limit), desc="stills")}
    shard = Shard(options.data)

    def shown(kind: Literal["stills", "frames"]) -> Iterable[Portrait]:
        for call in tqdm(stored_portraits(shard, kind, options.limit), desc=kind):
            yield call()

    clips = np.flatnonzero(shard.split == "val")
    held = set(shard.picture[clips[np.isin(clips, shard.image_clip)]].tolist())
    if not held:
        raise UserError(f"shard {options.data} has no picture of a person of the validation split; prepare another")
    return {kind: shown(kind) for kind, still in (("stills", True), ("frames", False)) if still in held}


def measure(name: str, portraits: Iterable[Portrait], models: Mapping[str, VQAutoencoder], options: argparse.Namespace,
            device: torch.device) -> None:  # fmt: skip
    """Measure one set, print its table, write it and its grid."""
    scores = CodebookScores(models, fid=not options.no_frechet, device=device, dtype=fast_dtype(device))
    every = max(1, options.limit // options.rows)
    shown: dict[str, list] = {}
    zoom: dict[str, list] = {}
    columns: list[str] = []
    for i, portrait in enumerate(portraits):
        made = scores.add(portrait)
        if i % every == 0 and len(shown) < options.rows and portrait.boxes:
            columns = ["Held out", *made]
            shown[portrait.name] = [portrait.image, *made.values()]
            zoom[portrait.name] = [list(portrait.boxes.values())] * len(columns)
    people = len(scores.people)
    table = scores.table(f"Codebook on {name} of {people} held-out people from {options.data.name}")
    base = options.output.with_name(f"{options.output.name}-{name}")
    print(markdown(table))
    files = list(write(table, base))
    if shown:
        figure = grid.make(shown, columns=columns, zoom=zoom, labels=False, cell=1.6, inset=0.4)
        files += style.save(figure, base.with_suffix(".png"))
    print(", ".join(map(str, files)))


def main() -> None:
    """Measure, print the tables, write them and the grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="SHARD_OR_FOLDER")
    parser.add_argument("--table", type=Path, help="csv with the columns file and identity of a folder's pictures")
    parser.add_argument("--weights", type=Path, help="folder of weights; the package's own where it is left out")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER", help="run of stage codebook")
    parser.add_argument("--limit", type=int, default=100, help="pictures of each set; 0 takes all")
    parser.add_argument("--rows", type=int, default=4, help="rows of the grid")
    parser.add_argument("--no-frechet", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/codebook"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        runs = style.named_paths((text if "=" in text else f"{Path(text).name}={text}" for text in options.run), "--run")
        makers: dict[str, Callable[[], VQAutoencoder]] = {}
        if options.weights is not None or not runs:
            makers["codebook"] = lambda: load_codebook(options.weights)
        makers |= {name: (lambda path=path: load_codebook(path)) for name, path in runs.items()}  # type: ignore[misc]
        models = {name: make() for name, make in makers.items()}
        for name, portraits in pictures(options).items():
            measure(name, portraits, models, options, device)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
