"""Clips and images -> a shard: track, fit, crop, align the sound, tell unknown people apart.

``flowvqtalker prepare --data FOLDER --out SHARD --model face_model.safetensors [--workers N]``

Each source leaves a file in ``SHARD.parts``, so an interrupted run resumes and one broken clip stops nothing. What was
left out and why is counted at the end and listed in ``dropped.csv``. The number of workers does not change the result.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data import lip_sync
from flowvqtalker.data.extract import (
    MakeTracker,
    PrepareConfig,
    Tools,
    cut_images,
    describe_source,
    fit_source,
    save_npz,
    split_jpegs,
)
from flowvqtalker.data.identity import Describer, cluster, merge_known, to_describe
from flowvqtalker.data.layouts import catalogue, unpack
from flowvqtalker.data.lip_sync import Alignment
from flowvqtalker.data.shards import Clip, ShardWriter
from flowvqtalker.data.sources import Source
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.workers import Backend, Processes, WorkerDied, parse_shard, run_tasks

__all__ = ["Prepare", "PrepareConfig", "Report", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Result of a preparation.

    Attributes:
        clips, images: sources in the shard, by kind.
        rows: frames in the shard.
        crops: images stored in the shard.
        dropped: name -> reason and details, of each source that was left out.
        people: identities found among people of unknown name.
        lags: collection -> (median lag of lips after sound in frames, median correlation there, clips, clips moved).
        lookalikes: pairs of names that look like one person, with their distance.
    """

    clips: int
    images: int
    rows: int
    crops: int
    dropped: dict[str, Drop]
    people: int
    lags: dict[str, tuple[float, float, int, int]]
    lookalikes: list[tuple[str, str, float]]


# Neutral clips of collections of natural speech are the class "natural".
_EMOTION_OF_NATURAL = {EMOTIONS.index("neutral"): EMOTIONS.index("natural")}

#: Why a source was left out: a short name for statistics, and details.
Drop = tuple[str, str]

# Reasons that a source itself gives. They are kept beside the parts, so that another run does not try again.
_VERDICTS = ("too_short", "no_face", "two_faces", "cut", "blurred", "bad_fit")

_Task = tuple[str, Source, Path]


def make_worker(config: PrepareConfig, threads: int, number: int) -> Callable[[_Task], Drop]:
    """The function of a worker."""
    import torch

    torch.set_num_threads(1)  # more would change the last digits of a fit
    cv2.setNumThreads(1)
    return functools.partial(_work, tools=Tools(config))


def _work(task: _Task, tools: Tools) -> Drop:
    """Do one task; returns why there is no result, or two empty texts."""
    kind, source, folder = task
    try:
        if kind == "fit":
            content = fit_source(source, tools)
        elif kind == "who":
            content = describe_source(source, tools)
        else:
            content = cut_images(source, _read_part(folder / f"{source.key}.fit.npz"), tools.config)
    except Exception as error:
        detail = (str(error).strip().splitlines() or [""])[0]
        if kind == "fit" and isinstance(error, UserError) and error.code in _VERDICTS:
            text = json.dumps([error.code, detail])
            atomic_write(_verdict(task), lambda path: path.write_text(text, encoding="utf-8"))
            return error.code, detail
        return "error", detail if isinstance(error, UserError) else f"{type(error).__name__}: {detail}"
    save_npz(folder / f"{source.key}.{kind}.npz", content)
    return "", ""


def _verdict(task: _Task) -> Path:
    kind, source, folder = task
    return folder / f"{source.key}.{kind}.drop.json"


def _read_part(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def _run(kind: str, sources: Sequence[Source], parts: Path, tools: Tools, backend: Backend | None) -> dict[str, Drop]:
    """Do what has no result yet, in this process if there is no backend; returns what failed, by name."""
    dropped: dict[str, Drop] = {}
    todo: list[_Task] = []
    for source in sources:
        task = kind, source, parts
        if _verdict(task).exists():
            code, detail = json.loads(_verdict(task).read_text(encoding="utf-8"))
            dropped[source.name] = code, detail
        elif not (parts / f"{source.key}.{kind}.npz").exists():
            todo.append(task)
    label = {"who": "describe faces", "fit": "track and fit", "cut": "cut images"}[kind]
    done = ((task, _work(task, tools)) for task in todo) if backend is None else run_tasks(todo, backend)
    for task, result in tqdm(done, total=len(todo), desc=label, dynamic_ncols=True):
        if isinstance(result, WorkerDied):
            result = "error", str(result)
        if result[0]:
            dropped[task[1].name] = result if kind == "fit" else ("kept", f"{label}: {result[1]}")
    return dropped


def prepare(
    config: PrepareConfig, *, make_tracker: MakeTracker | None = None, fit: Callable[..., Any] | None = None
) -> Report:
    """Make a shard.

    Arguments:
        config: what to read and what to keep.
        make_tracker: replaces :class:`flowvqtalker.face.tracker.FaceTracker`; all work is then done in this process.
        fit: (landmarks (T, 478, 3), smooth) -> :class:`flowvqtalker.face.fit.Fit`, replaces fitting ``config.model``.

    Raises:
        UserError: if there is nothing to read or nothing could be used.
    """
    number, count = parse_shard(config.part)
    if fit is None and not config.model.is_file():
        raise UserError(f"no face model at {config.model}; learn one with `flowvqtalker train face-model`")
    parts = _parts_folder(config)
    unpack(config.data, parts / "unpacked", config.views)
    found = catalogue(config.data, config.layout, config.views, parts / "unpacked")
    sources = found.sources[: config.limit] if config.limit else found.sources
    dropped: dict[str, Drop] = {name: ("layout", reason) for name, reason in found.left_out.items()}
    tools = Tools(config, make_tracker, fit)
    with tools.open as stack:
        alone = make_tracker is not None or fit is not None
        backend = None if alone else _backend(config, stack)
        if count > 1:
            chosen = sources[number - 1 :: count]
            dropped = _run("fit", chosen, parts, tools, backend)
            images = sum(source.is_image for source in chosen if source.name not in dropped)
            return Report(len(chosen) - len(dropped) - images, images, 0, 0, dropped, 0, {}, [])
        dropped |= _run("fit", sources, parts, tools, backend)
        fitted = [s for s in sources if (parts / f"{s.key}.fit.npz").exists()]
        if not fitted:
            name, (code, detail) = next(iter(sorted(dropped.items())))
            raise UserError(f"none of {len(sources)} sources could be used; the first: {name}: {detail or code}")
        dropped |= _run("who", to_describe(fitted), parts, tools, backend)
        aligned = _align(fitted, parts)
        unsynchronised = {
            key: ("out_of_sync", f"lips and sound correlate by {alignment.correlation:.2f}")
            for key, alignment in aligned.items()
            if alignment.correlation < config.min_sync
        }
        dropped |= {s.name: unsynchronised[s.key] for s in fitted if s.key in unsynchronised}
        fitted = [source for source in fitted if source.key not in unsynchronised]
        people, lookalikes, unknown = _identities(fitted, parts, tools.describer)
        lags = _lags(fitted, aligned, config)
        dropped |= _run("cut", _with_images(fitted, people, parts, config), parts, tools, backend)
    report = _write(fitted, people, aligned, lags, parts, config)
    rows = [(s.name, s.collection, people[s.key], split_of(people[s.key], config.held_out)) for s in fitted]
    _write_table(config.out / "identities.csv", [("file", "source", "identity", "split"), *rows])
    listed = [(name, *drop) for name, drop in sorted(dropped.items())]
    _write_table(config.out / "dropped.csv", [("file", "reason", "detail"), *listed])
    return replace(report, dropped=dropped, people=unknown, lookalikes=lookalikes)


def _backend(config: PrepareConfig, stack: contextlib.ExitStack) -> Backend:
    make = functools.partial(make_worker, config)
    if config.ray is None:
        return Processes(max(1, config.workers), make)
    from flowvqtalker.workers.cluster import RayActors

    return stack.enter_context(RayActors(config.ray, config.workers, make))


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)

    atomic_write(path, write)


def _parts_folder(config: PrepareConfig) -> Path:
    """Folder of the parts; fits and images made with other settings are deleted."""
    keep = ["min_length", "max_missing", "max_residual", "smooth", "frames", "quality"]
    keep += ["max_jump", "min_sharpness", "max_other_face"]
    digest = hashlib.sha256(config.model.read_bytes()).hexdigest() if config.model.is_file() else ""
    settings = json.dumps({**{key: getattr(config, key) for key in keep}, "model": digest}, sort_keys=True)
    folder = config.out.with_name(config.out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "settings.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != settings:
        old = [*folder.glob("*.fit.npz"), *folder.glob("*.cut.npz"), *folder.glob("*.drop.json")]
        if old:
            logger.warning("%d parts are made again: the face model or the settings have changed", len(old))
        for path in old:
            path.unlink()
        atomic_write(stamp, lambda path: path.write_text(settings, encoding="utf-8"))
    return folder


def _identities(
    sources: Sequence[Source], parts: Path, describer: Describer
) -> tuple[dict[str, str], list[tuple[str, str, float]], int]:
    """Identity by source key; pairs of names that look like one person; number of people found among the unknown."""
    people = {source.key: source.identity or source.name for source in sources}
    described: dict[str, npt.NDArray[np.float32]] = {}
    for source in sources:
        path = parts / f"{source.key}.who.npz"
        if path.exists():
            who = _read_part(path)
            described[source.key] = who["descriptor"]
            if str(who["kind"]) == "colour":  # colour alone separates lighting rather than people
                shape = _read_part(parts / f"{source.key}.fit.npz")["identity_shape"]
                described[source.key] = np.concatenate([who["descriptor"], 0.05 * shape[:40]]).astype(np.float32)
    count = 0
    for collection in sorted({s.collection for s in sources}):
        unknown = [s.key for s in sources if s.identity is None and s.collection == collection and s.key in described]
        if unknown:
            labels = cluster(np.stack([described[key] for key in unknown]), describer.threshold)
            count += int(labels.max()) + 1
            stem = "".join(c for c in collection.lower() if c.isalnum())
            people.update({key: f"{stem}_{label:03d}" for key, label in zip(unknown, labels, strict=True)})
    if not described or describer.name != "dlib":
        return people, [], count
    keys = list(described)
    alike = merge_known(
        [people[key] for key in keys], np.stack([described[key] for key in keys]), 0.85 * describer.threshold
    )
    for first, second, distance in alike:
        logger.warning("%s and %s look like one person (distance %.2f)", first, second, distance)
    return people, alike, count


def _align(sources: Sequence[Source], parts: Path) -> dict[str, Alignment]:
    """Lag of the lips of each source with speech, by key."""
    speaking: dict[str, lip_sync.LipClip] = {}
    for source in sources:
        if source.speech:
            with np.load(parts / f"{source.key}.fit.npz") as file:
                if "sound" in file.files:
                    speaking[source.key] = lip_sync.LipClip(source.collection, file["lips"], file["sound"])
    return dict(zip(speaking, lip_sync.align(list(speaking.values())), strict=True))


def _lags(
    sources: Sequence[Source], found: dict[str, Alignment], config: PrepareConfig
) -> dict[str, tuple[float, float, int, int]]:
    """Summary by collection."""
    groups: dict[str, list[Alignment]] = {}
    for source in sources:
        if source.key in found:
            groups.setdefault(source.collection, []).append(found[source.key])
    return {
        name: (
            float(np.median([a.lag for a in group])),
            float(np.median([a.correlation for a in group if np.isfinite(a.correlation)] or [np.nan])),
            len(group),
            sum(bool(_shift(a, config)) for a in group),
        )
        for name, group in sorted(groups.items())
    }


def _shift(found: Alignment | None, config: PrepareConfig) -> float:
    """Frames by which to move a clip's sound."""
    return found.lag if found is not None and found.known and abs(found.lag) >= config.min_shift else 0.0


def _with_images(sources: Sequence[Source], people: dict[str, str], parts: Path, config: PrepareConfig) -> list[Source]:
    """Sources of which images are kept: sharp enough, and not too many of one person."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        with np.load(parts / f"{source.key}.fit.npz") as file:
            if float(file["native"]) >= config.min_native:
                groups.setdefault(people[source.key], []).append(source)
    chosen: list[Source] = []
    for group in groups.values():
        count = min(len(group), config.frame_clips)
        chosen += [group[i] for i in np.linspace(0, len(group) - 1, count).round().astype(int)]
    return chosen


def _write(
    sources: Sequence[Source],
    people: dict[str, str],
    found: dict[str, Alignment],
    lags: dict[str, tuple[float, float, int, int]],
    parts: Path,
    config: PrepareConfig,
) -> Report:
    """Join the parts into the shard."""
    how = ("out", "workers", "ray", "part")  # these do not change the result
    about = json.dumps({"settings": {k: str(v) for k, v in vars(config).items() if k not in how}, "lags": lags})
    rows = crops = 0
    with ShardWriter(config.out, about) as writer:
        for source in tqdm(sources, desc="write shard", dynamic_ncols=True):
            part = _read_part(parts / f"{source.key}.fit.npz")
            cut = parts / f"{source.key}.cut.npz"
            stored = split_jpegs(_read_part(cut)) if cut.exists() else []
            alignment = found.get(source.key)
            shift = _shift(alignment, config)
            audio = lip_sync.shift_audio(part["audio"], shift) if "audio" in part else None
            identity = people[source.key]
            columns = ("identity_shape", "expression", "pose", "blendshapes", "landmarks", "residual", "crop", "valid")
            writer.add(
                Clip(
                    name=source.name,
                    source=source.collection,
                    identity=identity,
                    split=split_of(identity, config.held_out),
                    emotion=_EMOTION_OF_NATURAL.get(source.emotion, source.emotion)
                    if source.collection in config.natural
                    else source.emotion,
                    speech=source.speech and audio is not None,
                    is_image=source.is_image,
                    **{key: part[key] for key in columns},
                    audio=audio,
                    native=float(part["native"]),
                    lag=alignment.lag - shift if alignment is not None and alignment.known else float("nan"),
                    correlation=alignment.correlation if alignment is not None else float("nan"),
                    shifted=shift,
                    images=stored,
                )
            )
            rows += len(part["expression"])
            crops += len(stored)
    images = sum(source.is_image for source in sources)
    return Report(len(sources) - images, images, rows, crops, {}, 0, lags, [])


@dataclass(frozen=True)
class Prepare(PrepareConfig):
    """Turn clips and images on disk into a shard for training."""

    def run(self) -> None:
        """Write the shard and log a summary."""
        report = prepare(self)
        logger.info(
            "%d clips, %d images, %d frames, %d stored crops, %d people told apart, %d left out",
            *(report.clips, report.images, report.rows, report.crops, report.people, len(report.dropped)),
        )
        for reason, count in Counter(reason for reason, _ in report.dropped.values()).most_common():
            logger.info("left out, %s: %d", reason, count)
        for collection, (lag, height, count, moved) in report.lags.items():
            text = "%-18s lips %+.1f frames after the sound (r = %.2f, %d clips), sound of %d moved"
            logger.info(text, collection, lag, height, count, moved)
