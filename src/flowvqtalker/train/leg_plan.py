"""What a leg trains: the stages, their configurations, where their data is, and how many steps fit their time."""

from __future__ import annotations

import csv
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from flowvqtalker.errors import UserError
from flowvqtalker.train import stage_module
from flowvqtalker.train.config import from_dict, load_yaml, to_dict

__all__ = ["CHAIN", "available", "configuration", "fit_steps", "parse_stages"]

logger = logging.getLogger(__name__)

#: The stages in the order in which they need each other, and the part of the data folder that each reads.
CHAIN = {"codebook": "faces", "vqig": "pictures", "speech": "speech", "expflow": "motion", "poseflow": "motion"}
#: Share of a stage's time that its steps may take; validation, checkpoints and starting take the rest.
_USABLE = 0.85


def parse_stages(given: Sequence[str] | None, data: Path) -> dict[str, float]:
    """Stage -> minutes in all (0: as many steps as its configuration says), from ``NAME`` or ``NAME=MINUTES``.

    Without any, the stages whose data is there.

    Raises:
        UserError: if a stage is unknown, has no data, or none is left.
    """
    if not given:
        found = {name: 0.0 for name in CHAIN if available(name, data)}
        if not found:
            raise UserError(f"{data} holds no data of any stage; unpack a data pack there (flowvqtalker.data.pack)")
        return found
    stages: dict[str, float] = {}
    problems = []
    for entry in given:
        name, equals, minutes = entry.partition("=")
        try:
            stages[name] = float(minutes) if equals else 0.0
        except ValueError:
            stages[name] = -1
        if name not in CHAIN:
            problems.append(f"{name!r} is no stage of the chain ({', '.join(CHAIN)})")
        elif not 0 <= stages[name] < math.inf:
            problems.append(f"{entry!r}: minutes must be a number that is not negative")
        elif not available(name, data):
            problems.append(f"{name} needs {data / CHAIN[name]}, which is not there")
    if problems:
        raise UserError(f"--stages: {'; '.join(problems)}")
    return {name: stages[name] for name in CHAIN if name in stages}


def available(name: str, data: Path) -> bool:
    """Whether the data of a stage is there."""
    return (data / CHAIN[name]).is_dir()


def configuration(
    name: str, stages: Sequence[str], data: Path, work: Path, configs: Path, earlier: Any, settings: Mapping[str, Any]
) -> Any:
    """A stage's configuration: that of an earlier leg or of a file, with the paths of this machine, then ``settings``.

    Arguments:
        name: the stage.
        stages: all stages of the chain.
        data: folder of the unpacked data.
        work: folder of the runs.
        configs: folder with NAME.yaml (or NAME.json).
        earlier: plain values of an earlier leg, or None.
        settings: ``loop.steps`` -> value.
    """
    config_class = stage_module(name).Config
    if earlier is None:
        file = next((f for f in (configs / f"{name}.yaml", configs / f"{name}.json") if f.is_file()), None)
        if file is None:
            raise UserError(f"no configuration of {name} in {configs}; give a folder with {name}.yaml (--configs)")
        earlier = to_dict(load_yaml(config_class, file))
    values = json.loads(json.dumps(earlier))
    for path, value in {**_paths(name, stages, data, work), **settings}.items():
        *parents, last = path.split(".")
        place = values
        for part in parents:
            place = place.setdefault(part, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            raise UserError(f"--set {name}.{path}: there is no such setting")
        place[last] = yaml.safe_load(value) if isinstance(value, str) and path in settings else value
    config = from_dict(config_class, values)
    if config.loop.devices * config.loop.nodes != 1:
        raise UserError(f"{name}: a leg trains on one device; for several use `flowvqtalker train {name}`")
    return config


def _paths(name: str, stages: Sequence[str], data: Path, work: Path) -> dict[str, Any]:
    """Settings that depend on the machine."""
    if name == "codebook":
        table = data / "faces.csv"
        return {"data.pictures": str(data / "faces"), "data.table": str(table) if table.is_file() else None}
    if name == "vqig":
        found = {"data.shard": str(data / "pictures"), "data.face_model": str(_face_model(data))}
        trained = work / "codebook" / "weights.safetensors"
        if "codebook" in stages or trained.is_file():
            found["data.codebook"] = str(trained)
        return found
    face = data / "face_model.safetensors"
    found = {} if not face.is_file() or name == "poseflow" else {"face_model": str(face)}
    if name == "speech":
        whisper = data / "whisper"
        return found | {"sets": [str(data / "speech")], "whisper": str(whisper) if whisper.is_dir() else None}
    heard = work / "speech" if "speech" in stages else data / "listener"
    there = heard if "speech" in stages or heard.is_dir() else None
    return found | {"shards": [str(data / "motion")], "hearing.listener": str(there) if there else None}


def _face_model(data: Path) -> Path:
    own = data / "face_model.safetensors"
    if own.is_file():
        return own
    from flowvqtalker import weights

    return weights.folder() / "face_model.safetensors"


def fit_steps(name: str, config: Any, minutes: float, probe: float) -> Any:
    """The configuration with as many steps as the time allows, measured here; what is counted in steps moves along.

    Measured with every loss switched on from the first step, so it is the slowest part that counts.

    Arguments:
        name: the stage.
        config: its configuration.
        minutes: time of the stage in all.
        probe: seconds to measure.
    """
    from flowvqtalker.train.loop import Watch, fit

    phases = [key for key in ("code_steps", "adversarial_start") if hasattr(config, key)]
    loop = replace(
        config.loop, steps=10**9, warmup=0, decay="constant", log_every=2, save_every=10**9, validate_every=0, minutes=0
    )
    trial = replace(config, loop=loop, **dict.fromkeys(phases, 0))
    with tempfile.TemporaryDirectory() as scratch:
        stage = stage_module(name).build(trial)
        stage.validate = lambda fabric: {}  # type: ignore[method-assign]
        result = fit(stage, loop, scratch, watch=Watch(deadline=time.monotonic() + probe))
        with open(Path(scratch) / "log.csv", newline="", encoding="utf-8") as file:
            speeds = [float(row["steps_per_s"]) for row in csv.DictReader(file)]
    speed = statistics.median(speeds[1:] or speeds)  # the first steps choose algorithms and fill caches
    steps = max(1, int(speed * minutes * 60 * _USABLE))
    scale = steps / config.loop.steps
    logger.info(
        "%s: %.2f steps/s over %d steps, so %d steps in %g minutes", name, speed, result["step"], steps, minutes
    )
    moved = {key: int(getattr(config, key) * scale) for key in phases}
    warmup = min(int(config.loop.warmup * max(scale, 0.25)), steps // 4)
    return replace(config, loop=replace(config.loop, steps=steps, warmup=warmup), **moved)
