"""The default weights: safetensors files in this folder, described and hashed by ``manifest.json``.

One entry of the manifest: ``{file: {sha256, stage, config, data, steps, terms, parameters}}``. Every load checks the
hash, so that a truncated download or a swapped file is named before it turns into a strange face.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowvqtalker.errors import UserError

__all__ = [
    "EVALUATORS",
    "FINISHED",
    "NAMES",
    "SPEECH_ENCODER",
    "TERMS",
    "Entry",
    "add",
    "folder",
    "load",
    "manifest",
    "needed",
    "restore",
    "sha256",
]

#: What a complete set holds, and the training stage that makes each.
NAMES = {
    "face_model": "face-model",
    "codebook": "codebook",
    "vqig": "vqig",
    "expflow": "expflow",
    "poseflow": "poseflow",
}

#: The encoder of the speech that flows without an audio encoder of their own share.
SPEECH_ENCODER = {"speech_encoder": "speech"}

#: Networks that only `evaluate` needs, and the training stage that makes each.
EVALUATORS = {
    "sync": "sync",
    "emotion": "emotion",
    "motion_emotion": "motion-emotion",
}

_STAGES = {**NAMES, **SPEECH_ENCODER, **EVALUATORS}
#: Stages that finish the weights of another one: their files hold both.
FINISHED = {"vqig": "mouth"}

#: Terms of weights that were trained on the project's data.
TERMS = "research and non-commercial use only; see docs/model_card.md"

_MANIFEST = "manifest.json"
#: Weights that would not fit the package's budget as float16.
_QUANTISED = ("speech_encoder", "vqig")
#: What the name of a quantised matrix's scales ends with, and from how many numbers on a matrix is quantised.
_SCALE, _LARGE = ".scale", 2**16


@dataclass(frozen=True)
class Entry:
    """What the manifest says about one file."""

    sha256: str
    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    steps: int = 0
    terms: str = TERMS
    parameters: int = 0


def folder(path: str | Path | None = None) -> Path:
    """The folder with the weights: ``path``, or the one inside the package."""
    return Path(__file__).parent if path is None else Path(path)


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest(path: str | Path | None = None) -> dict[str, Entry]:
    """The manifest of a folder: file name -> entry; empty where there is none.

    Raises:
        UserError: if the folder does not exist or the manifest is broken.
    """
    place = folder(path)
    if not place.is_dir():
        raise UserError(f"weights folder {place} does not exist; give the folder that holds {_MANIFEST}")
    file = place / _MANIFEST
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: Entry(**entry) for name, entry in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"weights manifest {file} is broken ({error}); install the package again") from error


def needed(path: str | Path | None = None) -> tuple[str, ...]:
    """Names of what a folder must hold to animate portraits: the speech encoder only if a flow uses it."""
    configs = (entry.config for entry in manifest(folder(path)).values())
    return (
        (*NAMES, *SPEECH_ENCODER) if any(config.get("speech_encoder") is True for config in configs) else tuple(NAMES)
    )


def load(name: str, path: str | Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one file of weights.

    Arguments:
        name: one of :data:`NAMES` or :data:`EVALUATORS`.
        path: folder; None is the package's own.

    Returns:
        the tensors on the CPU (floating point ones as float32) and the configuration that they were trained with.

    Raises:
        UserError: if the file is missing, not in the manifest, of another stage, or its sha256 is not the manifest's.
    """
    if name not in _STAGES:
        raise UserError(f"unknown weights {name!r}; choose one of {', '.join(_STAGES)}")
    place = folder(path)
    entries = manifest(place)
    file = place / f"{name}.safetensors"
    how = f"train them with `flowvqtalker train {_STAGES[name]}` and add them with `python -m flowvqtalker.weights`"
    if not file.is_file():
        raise UserError(f"weights {file} are missing; install the package again, or {how}")
    entry = entries.get(file.name)
    if entry is None:
        raise UserError(f"weights {file} are not in {_MANIFEST}; {how}")
    digest = sha256(file)
    if digest != entry.sha256:
        raise UserError(
            f"weights {file} are damaged: sha256 {digest}, expected {entry.sha256}; install the package again"
        )
    if entry.stage != _STAGES[name]:
        raise UserError(
            f"weights {file} (sha256 {digest}) are of stage {entry.stage!r}, not {_STAGES[name]!r}; check the manifest"
        )
    return _read(file), entry.config


def restore(module: nn.Module, tensors: Mapping[str, Tensor], name: str, path: str | Path | None = None) -> None:
    """Put tensors into a module, strictly.

    Raises:
        UserError: if names or shapes do not fit; names the file's sha256 and the first differences.
    """
    own = module.state_dict()
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is unknown" for key in tensors if key not in own]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if problems:
        raise mismatch(name, "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if problems[3:] else ""), path)
    module.load_state_dict(dict(tensors))


def mismatch(name: str, problem: str, path: str | Path | None = None) -> UserError:
    """The error for weights whose configuration does not fit the code; names their sha256."""
    file = folder(path) / f"{name}.safetensors"
    digest = sha256(file) if file.is_file() else "unknown"
    return UserError(
        f"weights {file} (sha256 {digest}) do not fit their configuration: {problem}; "
        f"use weights of this version or train them with `flowvqtalker train {_STAGES.get(name, name)}`"
    )


def add(
    source: str | Path,
    name: str,
    *,
    path: str | Path | None = None,
    data: str = "",
    terms: str = TERMS,
    config: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> Entry:
    """Put the weights of a training run into a folder of weights, as float16, and write their manifest entry.

    The large matrices and convolutions of the speech encoder and of the image generator are stored as int8 with a scale
    for each row (output channel).

    Arguments:
        source: a run's folder (``weights.safetensors`` and ``config.json``), or a safetensors file. A tensor that
            float16 cannot hold stays float32.
        name: one of :data:`NAMES` or :data:`EVALUATORS`.
        path: folder of weights, made if it does not exist; None is the package's own.
        data: what they were trained on, in a sentence.
        terms: terms of use.
        config: configuration; None takes it from the JSON file beside the weights.
        steps: optimiser steps; None takes them from there as well.

    Raises:
        UserError: if the source is missing or belongs to another stage.
    """
    from safetensors.torch import save_file

    if name not in _STAGES:
        raise UserError(f"unknown weights {name!r}; choose one of {', '.join(_STAGES)}")
    file = Path(source)
    if file.is_dir():
        file = file / "weights.safetensors"
    if not file.is_file():
        raise UserError(f"weights {file} do not exist; give the folder of a finished run or a safetensors file")
    about: dict[str, Any] = {}
    for beside in (file.with_suffix(".json"), file.with_name("config.json")):
        if beside.is_file():
            about = json.loads(beside.read_text(encoding="utf-8"))
            break
    stage = str(about.get("stage", _STAGES[name]))
    if stage not in (_STAGES[name], FINISHED.get(name)):
        raise UserError(f"{file} is of stage {stage!r}, but {name} needs {_STAGES[name]!r}")

    tensors = _read(file)
    halves: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        halves[key] = (half if torch.isfinite(half).all() or not torch.isfinite(tensor).all() else tensor).contiguous()
        if name in _QUANTISED and tensor.ndim >= 2 and tensor.numel() >= _LARGE:
            halves.update(_quantised(key, tensor))
    place = folder(path)
    place.mkdir(parents=True, exist_ok=True)
    target = place / f"{name}.safetensors"
    temporary = target.with_name(target.name + ".part")
    save_file(halves, str(temporary))
    os.replace(temporary, target)
    entry = Entry(
        sha256=sha256(target),
        stage=_STAGES[name],
        config=dict(config if config is not None else about.get("config", {})),
        data=data,
        steps=int(steps if steps is not None else about.get("step", 0)),
        terms=terms,
        parameters=sum(t.numel() for t in tensors.values() if t.is_floating_point()),
    )
    entries = {**manifest(place), target.name: entry}
    text = json.dumps({key: asdict(value) for key, value in sorted(entries.items())}, indent=1) + "\n"
    temporary = place / (_MANIFEST + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, place / _MANIFEST)
    return entry


def _quantised(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """A matrix (n, m), or the weights of a convolution (n, m, ...), as int8, and what each of its rows is a multiple
    of."""
    rows = tensor.flatten(1)
    scale = (rows.abs().amax(1) / 127).clamp_min(1e-7).half()
    steps = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {key: steps.view(tensor.shape), key + _SCALE: scale}


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
    result = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    for key in [key for key in result if key.endswith(_SCALE)]:
        scale = result.pop(key)
        whole = key.removesuffix(_SCALE)
        result[whole] = result[whole].float() * scale.view(-1, *[1] * (result[whole].ndim - 1))
    return result
