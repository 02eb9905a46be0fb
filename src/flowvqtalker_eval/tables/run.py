"""The benchmark runner: animates every item of a split, resumes where it was stopped, then prints Table 1."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import tyro

from flowvqtalker import __version__
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.loading import choose_device
from flowvqtalker.weights import manifest
from flowvqtalker_eval.report import markdown, write
from flowvqtalker_eval.tables.methods import Animator
from flowvqtalker_eval.tables.pairs import Method, Pair, common
from flowvqtalker_eval.tables.plan import METHODS, plan
from flowvqtalker_eval.tables.splits import Item, load_split
from flowvqtalker_eval.tables.table1 import Options, measure
from flowvqtalker_eval.tables.workers import make_all

__all__ = ["Run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Animate every item of a split and print Table 1.

    The videos of each method are OUT/METHOD/NAME.mp4 (512x512, 25 fps), beside the real ones, OUT/real/NAME.mp4, cut to
    the portrait's crop and to the same frames. Existing videos are kept, so the same command resumes an interrupted
    run. Items that fail are listed in OUT/errors.csv.
    """

    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")]
    """mead-test, hdtf-test, shared-val, or a table (.csv) with a column clip."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the clips of the split are."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    """Folder to write."""
    method: tuple[Literal["animate", "reenact", "copy", "warp", "codebook"], ...] = ("animate",)
    """One or more of animate (portrait and speech), reenact (the clip's own tracked motion), copy (the portrait
    repeated), warp (the warped portrait alone), codebook (each real frame through the codebook)."""
    seeds: int = 1
    """Number of samples of animate; with more than one the table shows their diversity."""
    limit: int | None = None
    """Only the first so many items."""
    seconds: float | None = None
    """At most so much of each clip."""
    jobs: int = 1
    """Number of processes. With several GPUs each takes the next one."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the renderer's arithmetic; auto is the fastest on the device."""
    table: bool = True
    """Print Table 1 at the end (and write OUT/table1.md, .csv and .json)."""
    protocol: Literal["eat", "native"] = "eat"
    """Of the table, see `flowvqtalker evaluate table1`."""

    def run(self) -> None:
        """Make the missing videos, then the table."""
        self._check()
        items = load_split(self.split, self.data)[: self.limit]
        tasks = plan(items, self.output, self.method, self.seeds)
        _same_settings(self.output, self._settings())
        _write_items(self.output / "items.csv", items)
        total = sum(len(task.outputs) for task in plan(items, None, self.method, self.seeds))
        left = sum(len(task.outputs) for task in tasks)
        logger.info("%d clips, %d videos to make, %d exist already", len(items), left, total - left)
        failed = make_all(tasks, self.animator, self.output / "errors.csv", self.jobs)
        if failed:
            logger.warning("%d videos could not be made; see %s", failed, self.output / "errors.csv")
        if self.table:
            print(self._table(items).rstrip())

    def animator(self, number: int = 0) -> Animator:
        """For the process with a number; processes share the cores, and take the GPUs in turn."""
        device = choose_device(self.device)
        name = str(device)
        if self.jobs > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.jobs))
            if device.type == "cuda" and device.index is None:
                name = f"cuda:{number % torch.cuda.device_count()}"
        return Animator(self.output, self.weights, name, self.dtype, self.seconds)

    def _check(self) -> None:
        if not self.method:
            raise UserError(f"no --method was given; choose from {', '.join(METHODS)}")
        for name in ("seeds", "jobs", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        if self.seconds is not None and self.seconds <= 0:
            raise UserError(f"--seconds must be positive, got {self.seconds:g}")

    def _settings(self) -> dict[str, Any]:
        """What the videos depend on; a folder holds videos of the same settings only."""
        hashes = {name: entry.sha256[:16] for name, entry in sorted(manifest(self.weights).items())}
        needed = ("face_model", "codebook", "vqig", "expflow", "poseflow")
        kept = {name: digest for name, digest in hashes.items() if name.partition(".")[0] in needed}
        return {"version": __version__, "weights": kept, "seconds": self.seconds}

    def _methods(self, items: Sequence[Item]) -> list[Method]:
        """The videos that exist, as rows of a table."""
        methods = []
        for name in self.method:
            pairs = []
            for task in plan(items, None, (name,), self.seeds):
                real = self.output / "real" / f"{task.item.name}.mp4"
                portrait = self.output / "portraits" / f"{task.item.name}.png"
                for output in task.outputs:
                    path = self.output / output.path
                    if path.is_file() and real.is_file():
                        seed = output.seed if self.seeds > 1 and name == "animate" else None
                        pairs.append(Pair(task.item.name, path, real, task.item.emotion, portrait, seed))
            if pairs:
                methods.append(Method(name, tuple(pairs)))
            else:
                logger.warning("%s made no video and is left out of the table", name)
        return methods

    def _table(self, items: Sequence[Item]) -> str:
        """Table 1 over the clips that every method made, as Markdown; the files are written too."""
        methods = self._methods(items)
        if not methods:
            raise UserError(f"no video was made; see {self.output / 'errors.csv'}")
        shared = common(methods)
        made = {pair.name for method in methods for pair in method.pairs}
        kept = {pair.name for pair in shared[0].pairs}
        notes = [f"split {self.split}: {len(items)} clips, {len(kept)} of them made by every method"]
        if made - kept:
            notes.append(f"left out, since not every method made them: {', '.join(sorted(made - kept))}")
        options = Options(
            protocol=self.protocol,
            cache=self.output / "analysis",
            jobs=self.jobs,
            device=self.device,
            weights=self.weights,
        )
        table = measure(shared, options, title=f"Table 1, {self.split}", notes=notes)
        write(table, self.output / "table1")
        return markdown(table)


# ---------------------------------------------------------------------------------------------------------- the folder


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Store the settings in the folder, or refuse a folder whose videos were made with other settings."""
    file = folder / "run.json"
    if file.is_file():
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is damaged; remove it to keep the videos in the folder") from error
        different = [name for name in settings if former.get(name) != settings[name]]
        if different:
            raise UserError(
                f"{folder} holds videos made with other settings ({', '.join(different)}); choose another with -o"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be created ({error.strerror}); choose another with -o") from error
    atomic_write(file, lambda part: part.write_text(json.dumps(settings, indent=1), encoding="utf-8"))


def _write_items(path: Path, items: Sequence[Item]) -> None:
    """Names and labels, as `evaluate table1 --labels` reads them."""
    rows = [(item.name, item.emotion, "yes" if item.has_speech else "no", item.clip) for item in items]
    table = pd.DataFrame(rows, columns=["name", "emotion", "voiced", "clip"])
    atomic_write(path, lambda part: table.to_csv(part, index=False))
