"""Train the chain of stages in short legs, unattended, on a machine that may keep nothing between them.

    python -m flowvqtalker.train.leg --data DATA --out LEG1 --minutes 10 --stages codebook=12 vqig=18
    python -m flowvqtalker.train.leg --data DATA --out LEG2 --minutes 10 --from LEG1

A leg trains codebook, vqig, speech, expflow and poseflow one after the other (those that are asked for), stops in time,
and leaves its state in a few files of limited size; the next leg goes on from them. It needs Python, torch, lightning,
numpy, scipy, OpenCV, scikit-image, einops, safetensors and tqdm, and neither a network, PyAV nor mediapipe.
`flowvqtalker train leg` is the same command.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flowvqtalker.errors import UserError
from flowvqtalker.train import stage_module
from flowvqtalker.train.config import to_dict
from flowvqtalker.train.hardware import process_age
from flowvqtalker.train.leg_plan import CHAIN, configuration, fit_steps, parse_stages
from flowvqtalker.train.leg_state import KINDS, MANIFEST, Limits, fitting, read_bundle, write_bundle

__all__ = ["Leg", "main", "run_leg"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leg:
    """What a leg is to do; the command line describes each, but for ``begun``: when the time began to run
    (``time.monotonic()``; None: now)."""

    data: Path
    out: Path
    minutes: float = 0.0
    earlier: tuple[Path, ...] = ()
    stages: tuple[str, ...] = ()
    configs: Path = Path("configs/gpu")
    settings: tuple[str, ...] = ()
    state: str = "auto"
    limits: Limits = field(default_factory=Limits)
    leave_out: tuple[str, ...] = ()
    work: Path = Path("runs/leg")
    samples: int = 6
    reserve: float = 20.0
    probe: float = 20.0
    begun: float | None = None


def run_leg(leg: Leg) -> dict[str, Any]:
    """Train one leg.

    Returns:
        the manifest of what was written to ``leg.out``.

    Raises:
        UserError: if something given cannot be used, before anything is trained.
    """
    begun = time.monotonic() if leg.begun is None else leg.begun
    end = begun + leg.minutes * 60 - leg.reserve if leg.minutes else math.inf
    if end <= time.monotonic():
        raise UserError(f"--minutes {leg.minutes:g} leaves no time beside --reserve {leg.reserve:g} seconds")
    about = _begin(leg)
    for name, entry in about["stages"].items():
        if not entry["done"]:
            _config(name, leg, about)  # a mistake in the last stage's shows before the first one trains
    runs = {name: leg.work / name for name in about["stages"]}
    for name, entry in about["stages"].items():
        if time.monotonic() >= end:
            break
        if not entry["done"] and not _train(name, leg, about, runs, end):
            break
    about["legs"].append({"seconds": round(time.monotonic() - begun, 1)})
    with tempfile.TemporaryDirectory() as scratch:
        extras = [*_curves(runs, Path(scratch)), *sorted(leg.work.glob("*.png"))]
        _write(leg, about, runs, extras)
    for name, entry in about["stages"].items():
        logger.info("%s: step %d of %d%s", name, entry["step"], entry["steps"], ", finished" if entry["done"] else "")
    return about


def _begin(leg: Leg) -> dict[str, Any]:
    """The plan, and the earlier legs' state in the folder of the runs."""
    if not leg.earlier:
        for folder, sign in ((leg.out, MANIFEST), (leg.work, "*")):
            if any(folder.glob(sign)):
                raise UserError(f"{folder} already holds a leg; give --from to go on with one, or choose other folders")
        plan = parse_stages(leg.stages, leg.data)
        fresh: dict[str, Any] = {
            "done": False,
            "step": 0,
            "steps": 0,
            "seconds": 0.0,
            "config": None,
            "kind": "full",
            "speed": {},
        }
        about: dict[str, Any] = {"stages": {name: {"minutes": m, **fresh} for name, m in plan.items()}, "legs": []}
    else:
        shutil.rmtree(leg.work, ignore_errors=True)
        for folder in leg.earlier:
            about = read_bundle(folder, None, leg.work)
        about = {key: about[key] for key in ("stages", "legs")}
        if leg.stages:
            named = parse_stages(leg.stages, leg.data)
            unknown = [name for name in named if name not in about["stages"]]
            if unknown:
                raise UserError(f"--stages: {', '.join(unknown)} was not planned by the earlier leg; begin a new chain")
    unknown = [name for name in leg.leave_out if name not in about["stages"]]
    unknown += [s for s in leg.settings if "=" not in s or s.partition(".")[0] not in about["stages"]]
    if unknown:
        raise UserError(f"--leave-out, --set: {', '.join(unknown)} names no stage of {', '.join(about['stages'])}")
    left = [name for name in leg.leave_out if not about["stages"][name]["done"]]
    if left:
        raise UserError(f"--leave-out {', '.join(left)}: only a stage that an earlier leg finished can be left out")
    return about


def _config(name: str, leg: Leg, about: Mapping[str, Any]) -> Any:
    """A stage's configuration: the earlier leg's or its file's, on this machine."""
    mine = [setting.partition(".")[2] for setting in leg.settings if setting.startswith(f"{name}.")]
    settings = dict(setting.split("=", 1) for setting in mine)
    stages = list(about["stages"])
    return configuration(name, stages, leg.data, leg.work, leg.configs, about["stages"][name]["config"], settings)


def _train(name: str, leg: Leg, about: dict[str, Any], runs: Mapping[str, Path], end: float) -> bool:
    """Train a stage until it is done or the time is over; whether it is done."""
    from flowvqtalker.train.leg_report import last_rows, sheet
    from flowvqtalker.train.loop import Watch, fit

    entry, run = about["stages"][name], runs[name]
    config = _config(name, leg, about)
    started = time.monotonic()
    if entry["config"] is None and entry["minutes"] > 0:
        config = fit_steps(name, config, entry["minutes"], min(leg.probe, (end - started) / 2))
    torch.manual_seed(config.loop.seed)
    stage = stage_module(name).build(config)
    trained = sum(p.numel() for group in stage.parameter_groups().values() for p in group)
    others = sum(
        _weights(runs[other]) for other in runs if other not in leg.leave_out and about["stages"][other]["done"]
    )
    kind = fitting(trained, others, leg.limits, leg.state)
    if kind != KINDS[0]:
        logger.warning("%s: the state is kept as %r to fit the files; going on from it is not exact", name, kind)
    entry |= {"config": to_dict(config), "steps": config.loop.steps, "kind": kind}
    before = entry["seconds"]

    def note(step: int) -> None:
        entry["step"] = step
        entry["seconds"] = round(before + time.monotonic() - started, 1)

    def saved(step: int) -> None:
        note(step)
        if step < config.loop.steps:
            _write(leg, about, runs, ())

    watch = Watch(end, saved, lambda fabric: _show(sheet, stage, fabric, leg, name))
    result = fit(stage, config.loop, run, resume=True, watch=watch)
    note(int(result["step"]))
    entry["done"] = entry["step"] >= config.loop.steps
    entry["scores"] = {key: value for key, value in result.items() if key != "step"} or entry.get("scores", {})
    entry["speed"] = last_rows(run)
    if entry["done"]:
        _write(leg, about, runs, ())
    return bool(entry["done"])


def _show(sheet: Any, stage: Any, fabric: Any, leg: Leg, name: str) -> None:
    """Write the sheet of held-out pictures."""
    sheet(stage, fabric, leg.samples, leg.work / f"{name}-pictures.png")


def _weights(run: Path) -> int:
    """Bytes of a finished stage's weights."""
    file = run / "weights.safetensors"
    return file.stat().st_size if file.is_file() else 0


def _curves(runs: Mapping[str, Path], folder: Path) -> Sequence[Path]:
    from flowvqtalker.train.leg_report import draw_curves

    return draw_curves(runs, folder)


def _write(leg: Leg, about: dict[str, Any], runs: Mapping[str, Path], extras: Sequence[Path]) -> None:
    """Write what there is to the leg's folder."""
    begun = {name: run for name, run in runs.items() if about["stages"][name]["step"] or about["stages"][name]["done"]}
    kinds = {about["stages"][name]["kind"] for name in begun if not about["stages"][name]["done"]}
    write_bundle(
        begun,
        leg.out,
        about,
        kind=kinds.pop() if kinds else KINDS[0],
        limits=leg.limits,
        leave_out=leg.leave_out,
        extras=extras,
    )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m flowvqtalker.train.leg") -> dict[str, Any]:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    own = Leg(Path(), Path())
    stages = ", ".join(CHAIN)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="unpacked data (python -m flowvqtalker.data.pack)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the leg leaves its files")
    add("--minutes", type=float, default=own.minutes, help="time of this leg in all; 0 (default): no limit")
    add("--from", dest="earlier", type=Path, nargs="+", default=(), metavar="FOLDER",
        help="what the earlier leg left; with --leave-out the legs that hold the rest, oldest first")  # fmt: skip
    add("--stages", nargs="+", default=(), metavar="NAME[=MINUTES]",
        help=f"stages of {stages}; MINUTES of training over all legs, from which the number of steps follows by "
        "measuring the speed (without: as its configuration says). Default: those whose data is there")  # fmt: skip
    add("--configs", type=Path, default=own.configs, metavar="FOLDER", help="holds NAME.yaml (default: %(default)s)")
    add("--set", dest="settings", nargs="+", default=(), metavar="STAGE.KEY=VALUE",
        help="settings over those of the files, for instance vqig.loop.batch_size=16")  # fmt: skip
    add("--state", choices=("auto", *KINDS), default=own.state,
        help="what is kept of the stage that still trains: full (exact, 16 bytes a weight), half (8), weights (4); "
        "default: the first that fits")  # fmt: skip
    add("--max-files", type=int, default=own.limits.max_files, help="files that a leg may leave (default: %(default)s)")
    add("--max-file-mib", type=float, default=own.limits.max_file_mib, help="size of each (default: %(default)s)")
    add("--leave-out", nargs="+", default=(), metavar="STAGE", help="finished stages whose weights are kept elsewhere")
    add("--work", type=Path, default=own.work, metavar="FOLDER", help="folder for the runs (default: %(default)s)")
    add("--samples", type=int, default=own.samples, help="rows of the sheet of pictures (default: %(default)s)")
    add("--reserve", type=float, default=own.reserve,
        help="seconds kept for the sheet and the last files (default: %(default)s)")  # fmt: skip
    add("--probe", type=float, default=own.probe, help="seconds to measure a stage's speed (default: %(default)s)")
    given = vars(parser.parse_args(arguments))
    limits = Limits(given.pop("max_files"), given.pop("max_file_mib"))
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return run_leg(replace(own, **given, limits=limits, begun=time.monotonic() - process_age()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except UserError as error:
        logger.error("error: %s", error)
        sys.exit(2)
