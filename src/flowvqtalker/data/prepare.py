"""Clips and images -> a shard: track, fit, crop, align the sound, tell unknown people apart.

``flowvqtalker prepare --data FOLDER --out SHARD --model face_model.safetensors [--workers N]``

Each source leaves a file in ``SHARD.parts``, so an interrupted run resumes and one broken clip stops nothing: errors
are listed at the end and in ``errors.csv``.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from flowvqtalker.data.lip_sync import Alignment
from flowvqtalker.data.shards import Clip, ShardWriter
from flowvqtalker.data.sources import Source, catalogue
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError

__all__ = ["Prepare", "PrepareConfig", "Report", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Result of a preparation.

    Attributes:
        clips, images: sources in the shard, by kind.
        rows: frames in the shard.
        crops: images stored in the shard.
        errors: key and reason of each source that was left out.
        people: identities found among people of unknown name.
        lags: collection -> (median lag of lips after sound in frames, median correlation there, clips, clips moved).
        lookalikes: pairs of names that look like one person, with their distance.
    """

    clips: int
    images: int
    rows: int
    crops: int
    errors: dict[str, str]
    people: int
    lags: dict[str, tuple[float, float, int, int]]
    lookalikes: list[tuple[str, str, float]]


# Neutral clips of collections of natural speech are the class "natural".
_EMOTION_OF_NATURAL = {EMOTIONS.index("neutral"): EMOTIONS.index("natural")}

_Job = tuple[Source, Path]


@functools.cache
def _process_tools(config: PrepareConfig) -> Tools:
    """The tools of a worker process."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return Tools(config)


def _work(kind: str, job: _Job, tools: Tools | PrepareConfig) -> tuple[str, str]:
    """Do one job; returns the source's key and the error ("" if none)."""
    source, folder = job
    if isinstance(tools, PrepareConfig):
        tools = _process_tools(tools)
    try:
        if kind == "fit":
            content = fit_source(source, tools)
        elif kind == "who":
            content = describe_source(source, tools)
        else:
            content = cut_images(source, _read_part(folder / f"{source.key}.fit.npz"), tools.config)
    except Exception as error:
        reason = str(error).strip().splitlines()
        detail = reason[0] if reason else ""
        return source.key, detail if isinstance(error, UserError) else f"{type(error).__name__}: {detail}"
    save_npz(folder / f"{source.key}.{kind}.npz", content)
    return source.key, ""


def _read_part(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def _run(kind: str, jobs: Sequence[_Job], tools: Tools, alone: bool) -> dict[str, str]:
    """Do the jobs without a result yet; returns the errors by key."""
    todo = [job for job in jobs if not (job[1] / f"{job[0].key}.{kind}.npz").exists()]
    label = {"who": "describe faces", "fit": "track and fit", "cut": "cut images"}[kind]
    errors: dict[str, str] = {}

    def results() -> Iterator[tuple[str, str]]:
        if alone or tools.config.workers <= 1:
            yield from (_work(kind, job, tools) for job in todo)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(tools.config.workers, context) as pool:
            for done in as_completed([pool.submit(_work, kind, job, tools.config) for job in todo]):
                yield done.result()

    for key, problem in tqdm(results(), total=len(todo), desc=label, dynamic_ncols=True):
        if problem:
            errors[key] = problem
    return errors


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
    sources = catalogue(config.data)
    sources = sources[: config.limit] if config.limit else sources
    if fit is None and not config.model.is_file():
        raise UserError(f"no face model at {config.model}; learn one with `flowvqtalker train face-model`")
    parts = _parts_folder(config)
    tools = Tools(config, make_tracker, fit)
    alone = make_tracker is not None or fit is not None

    errors = _run("fit", [(s, parts) for s in sources], tools, alone)
    fitted = [s for s in sources if (parts / f"{s.key}.fit.npz").exists()]
    if not fitted:
        first = next(iter(errors.items()), ("", "nothing"))
        raise UserError(f"none of {len(sources)} sources could be used; the first: {first[0]}: {first[1]}")
    errors |= _run("who", [(s, parts) for s in to_describe(fitted)], tools, alone)
    people, lookalikes, count = _identities(fitted, parts, tools.describer)
    found = _align(fitted, parts)
    lags = _lags(fitted, found, config)
    errors |= _run("cut", [(s, parts) for s in _with_images(fitted, people, parts, config)], tools, alone)
    report = _write(fitted, people, found, lags, parts, config)
    with open(config.out / "identities.csv", "w", newline="", encoding="utf-8") as stream:
        rows = [(s.name, s.collection, people[s.key], split_of(people[s.key])) for s in fitted]
        csv.writer(stream).writerows([("file", "source", "identity", "split"), *rows])
    with open(config.out / "errors.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file", "error"), *sorted(errors.items())])
    for key, problem in sorted(errors.items()):
        logger.warning("%s: %s", key, problem)
    return replace(report, errors=errors, people=count, lookalikes=lookalikes)


def _parts_folder(config: PrepareConfig) -> Path:
    """Folder of the parts; fits and images made with other settings are deleted."""
    keep = ("min_length", "max_missing", "max_residual", "smooth", "frames", "quality")
    digest = hashlib.sha256(config.model.read_bytes()).hexdigest() if config.model.is_file() else ""
    settings = json.dumps({**{key: getattr(config, key) for key in keep}, "model": digest}, sort_keys=True)
    folder = config.out.with_name(config.out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "settings.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != settings:
        old = [*folder.glob("*.fit.npz"), *folder.glob("*.cut.npz")]
        if old:
            logger.warning("%d parts are made again: the face model or the settings have changed", len(old))
        for path in old:
            path.unlink()
    stamp.write_text(settings, encoding="utf-8")
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
    about = json.dumps({"settings": {k: str(v) for k, v in vars(config).items()}, "lags": lags})
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
                    split=split_of(identity),
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
            "%d clips, %d images, %d frames, %d stored crops, %d people told apart, %d errors",
            *(report.clips, report.images, report.rows, report.crops, report.people, len(report.errors)),
        )
        for collection, (lag, height, count, moved) in report.lags.items():
            text = "%-18s lips %+.1f frames after the sound (r = %.2f, %d clips), sound of %d moved"
            logger.info(text, collection, lag, height, count, moved)
