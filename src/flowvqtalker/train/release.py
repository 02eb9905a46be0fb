"""Release trained weights: ``weights-add`` stores a run's in a folder of weights, ``weights-list`` checks a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import save
from torch import Tensor

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.weights import STAGES, TERMS, Entry

__all__ = ["WeightsAdd", "WeightsList", "add_weights", "write_entry"]

logger = logging.getLogger(__name__)

# Stored as int8, since float16 would exceed the package's size limit; smaller matrices are not worth it.
_QUANTISED, _SMALLEST_QUANTISED = ("speech_encoder", "speech_encoder_live"), 2**16


def add_weights(
    source: str | Path,
    name: str,
    *,
    path: str | Path | None = None,
    data: str = "",
    terms: str = TERMS,
    commercial: bool = False,
    config: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> Entry:
    """Put the weights of a training run into a folder of weights, as float16, with their manifest entry.

    Large matrices and convolutions of the speech encoder are stored as int8 with one scale per row (output channel). A
    tensor that float16 cannot hold stays float32.

    Arguments:
        source: a run's folder (``weights.safetensors`` and ``config.json``), or a safetensors file.
        name: a key of :data:`flowvqtalker.weights.STAGES`.
        path: folder of weights, made if it does not exist; None is the package's own.
        data: what they were trained on, in a sentence.
        terms: terms of use.
        commercial: whether these terms allow commercial use.
        config: configuration; None takes it from the JSON file beside the weights.
        steps: optimiser steps; None takes them from there as well.

    Raises:
        UserError: if the source is missing or belongs to another stage.
    """
    if name not in STAGES:
        raise UserError(f"unknown weights {name!r}; choose one of {', '.join(STAGES)}")
    file = Path(source)
    if file.is_dir():
        file = file / "weights.safetensors"
    if not file.is_file():
        raise UserError(f"weights {file} do not exist; give the folder of a finished run or a safetensors file")
    beside = next((f for f in (file.with_suffix(".json"), file.with_name("config.json")) if f.is_file()), None)
    about: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if beside is not None else {}
    stage = str(about.get("stage", STAGES[name]))
    if stage != STAGES[name]:
        raise UserError(f"{file} is of stage {stage!r}, but {name} needs {STAGES[name]!r}")

    tensors = weights.read_tensors(file)
    stored: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        stored[key] = (half if torch.isfinite(half).all() or not torch.isfinite(tensor).all() else tensor).contiguous()
        if name in _QUANTISED and tensor.ndim >= 2 and tensor.numel() >= _SMALLEST_QUANTISED:
            stored.update(_quantised(key, tensor))
    folder = weights.folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.safetensors"
    atomic_write(target, lambda temporary: temporary.write_bytes(save(stored)))
    entry = Entry(
        sha256=weights.sha256(target),
        stage=STAGES[name],
        config=dict(config if config is not None else about.get("config", {})),
        data=data,
        steps=int(steps if steps is not None else about.get("step", 0)),
        terms=terms,
        commercial=commercial,
        parameters=sum(t.numel() for t in tensors.values() if t.is_floating_point()),
    )
    write_entry(target, entry)
    return entry


def write_entry(file: Path, entry: Entry) -> None:
    """Put the entry of a file into the manifest beside it."""
    entries = {**weights.manifest(file.parent, own=True), file.name: entry}
    text = json.dumps({key: asdict(value) for key, value in sorted(entries.items())}, indent=1) + "\n"
    atomic_write(file.with_name(weights.MANIFEST), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _quantised(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """A matrix (n, m), or the weights of a convolution (n, m, ...), as int8 steps and the step of each row."""
    rows = tensor.flatten(1)
    scale = (rows.abs().amax(1) / 127).clamp_min(1e-7).half()
    steps = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {key: steps.view(tensor.shape), key + weights.SCALE: scale}


@dataclass(frozen=True)
class WeightsAdd:
    """Copy a run's weights into a folder of weights as float16 and write their manifest entry."""

    name: Annotated[str, tyro.conf.Positional]
    """face_model, codebook, vqig, expflow, poseflow, speech_encoder, speech_encoder_live, voice_emotion, or an
    evaluator: sync, motion_emotion."""
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished training run, or a safetensors file."""
    data: str = ""
    """What they were trained on, in a sentence."""
    terms: str = TERMS
    """Terms of use."""
    commercial: bool = False
    """These terms allow commercial use."""
    folder: Path | None = None
    """Folder of weights; default: inside the package."""

    def run(self) -> None:
        """Add the weights and log their hash."""
        entry = add_weights(
            self.source, self.name, path=self.folder, data=self.data, terms=self.terms, commercial=self.commercial
        )
        logger.info("%s: %s parameters, sha256 %s", self.name, f"{entry.parameters:,}", entry.sha256)


@dataclass(frozen=True)
class WeightsList:
    """Show the manifest of a folder of weights and check every hash."""

    folder: Path | None = None
    """Folder of weights; default: inside the package."""

    def run(self) -> None:
        """Log one line per file.

        Raises:
            UserError: if a file is missing or damaged.
        """
        damaged = []
        for name, entry in weights.manifest(self.folder, own=True).items():
            file = weights.folder(self.folder) / name
            whole = file.is_file() and weights.sha256(file) == entry.sha256
            damaged += [] if whole else [name]
            size = file.stat().st_size / 2**20 if file.is_file() else 0.0
            about = f"{entry.parameters:,} parameters, {size:.1f} MiB, step {entry.steps}"
            logger.info("%s: %s, %s", name, about, "ok" if whole else "DAMAGED")
        if damaged:
            raise UserError(f"{', '.join(damaged)} missing or damaged; install the package again or copy the files")
