"""The default weights: safetensors files in this folder, described and hashed by ``manifest.json``.

An entry of the manifest: ``{file: {sha256, stage, config, data, steps, terms, parameters, commercial}}``. Every load
checks the hash, so that a damaged or swapped file is reported instead of giving a strange face. Another folder of
weights may hold some of the files: the others come from here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowvqtalker.errors import MissingDependency, UserError

__all__ = [
    "COMPILED",
    "EVALUATORS",
    "LANDMARKER",
    "LIVE",
    "MANIFEST",
    "NAMES",
    "PUBLISHED",
    "SCALE",
    "SPEECH_ENCODER",
    "STAGES",
    "TERMS",
    "VOICE",
    "Entry",
    "folder",
    "load",
    "manifest",
    "misfit",
    "mismatch",
    "needed",
    "place",
    "read_tensors",
    "restore",
    "sha256",
]

#: Files of a complete set, and the training stage of each.
NAMES = {
    "face_model": "face-model",
    "codebook": "codebook",
    "vqig": "vqig",
    "expflow": "expflow",
    "poseflow": "poseflow",
}

#: The encoder of the speech that flows without an audio encoder of their own share.
SPEECH_ENCODER = {"speech_encoder": "speech"}

#: The same with a short look-ahead, for live speech.
LIVE = {"speech_encoder_live": "speech-live"}

#: What hears the emotion ``auto``.
VOICE = {"voice_emotion": "voice-emotion"}

#: Networks that only `evaluate` needs, and the training stage of each.
EVALUATORS = {
    "sync": "sync",
    "motion_emotion": "motion-emotion",
}

#: Published networks that only `evaluate` needs (NOTICE.md); no stage trains them.
PUBLISHED = ("expression_face_api", "expression_fer")

#: The default generator compiled for CPUs (tools/compile_generator.py); its configuration names what it was made from.
COMPILED = "vqig_openvino"

#: All names but these, and the training stage of each.
STAGES = {**NAMES, **SPEECH_ENCODER, **LIVE, **VOICE, **EVALUATORS}

#: MediaPipe's Face Landmarker, which ships with the weights (NOTICE.md).
LANDMARKER = "face_landmarker.task"

#: Terms of weights that were trained on the project's data.
TERMS = "research and non-commercial use only; see docs/model_card.md"

#: Name of the file that describes a folder of weights.
MANIFEST = "manifest.json"
#: Suffix of the names of the scales of matrices that are stored as int8.
SCALE = ".scale"


@dataclass(frozen=True)
class Entry:
    """Manifest entry of one file."""

    sha256: str
    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    steps: int = 0
    terms: str = TERMS
    parameters: int = 0
    commercial: bool = False


def folder(path: str | Path | None = None) -> Path:
    """The folder with the weights: ``path``, or the one inside the package."""
    return Path(__file__).parent if path is None else Path(path)


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    path = Path(path) if isinstance(path, str) else path  # a path of a URL stays one
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest(path: str | Path | None = None, *, own: bool = False) -> dict[str, Entry]:
    """The manifest of a folder, file name -> entry, with the package's entries for what the folder lacks.

    Arguments:
        path: folder; None is the package's own.
        own: leave out the package's entries; empty where there is no manifest.

    Raises:
        UserError: if the folder does not exist or the manifest is broken.
        MissingDependency: if the folder holds no weights.
    """
    place = folder(path)
    if not place.is_dir():
        raise UserError(f"weights folder {place} does not exist; give the folder that holds {MANIFEST}")
    file = place / MANIFEST
    entries: dict[str, Entry] = {}
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            entries = {name: Entry(**entry) for name, entry in content.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"weights manifest {file} is broken ({error}); install the package again") from error
    if own or path is None:
        return entries
    if not entries:
        raise MissingDependency(
            f"weights are missing: {place} holds no {MANIFEST}; give a folder made by `weights-add`"
        )
    return {**manifest(), **entries}


def place(name: str, path: str | Path | None = None) -> Path:
    """The folder that a file of weights is taken from: the given one if it has it, else the package's.

    Raises:
        UserError: as :func:`manifest`.
    """
    file = f"{name}.safetensors"
    return folder(path if file in manifest(path, own=True) or (folder(path) / file).exists() else None)


def needed(path: str | Path | None = None) -> tuple[str, ...]:
    """Names of what animating portraits needs: the speech encoder only if a flow uses it."""
    entries = manifest(path)
    configs = (entries[f"{name}.safetensors"].config for name in NAMES if f"{name}.safetensors" in entries)
    return (
        (*NAMES, *SPEECH_ENCODER) if any(config.get("speech_encoder") is True for config in configs) else tuple(NAMES)
    )


def load(name: str, path: str | Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one file of weights.

    Arguments:
        name: a key of :data:`STAGES`, one of :data:`PUBLISHED`, or :data:`COMPILED`.
        path: folder; what it lacks is taken from the package. None is the package's own.

    Returns:
        the tensors on the CPU (floating point as float32) and their training configuration.

    Raises:
        UserError: if the file is missing, not in the manifest, of another stage, or its sha256 is not the manifest's.
    """
    known = (*STAGES, *PUBLISHED, COMPILED)
    if name not in known:
        raise UserError(f"unknown weights {name!r}; choose one of {', '.join(known)}")
    stage = STAGES.get(name, "")
    manifest(path)  # a folder without any weights is a mistake
    file = place(name, path) / f"{name}.safetensors"
    entries = manifest(file.parent, own=True)
    how = "install the package again"
    if stage:
        how += f", or train them with `flowvqtalker train {stage}` and add them with `flowvqtalker weights-add`"
    if not file.is_file():
        raise UserError(f"weights {file} are missing; {how}")
    entry = entries.get(file.name)
    if entry is None:
        raise UserError(f"weights {file} are not in {MANIFEST}; {how}")
    digest = sha256(file)
    if digest != entry.sha256:
        raise UserError(
            f"weights {file} are damaged: sha256 {digest}, expected {entry.sha256}; install the package again"
        )
    if entry.stage != stage:
        raise UserError(
            f"weights {file} (sha256 {digest}) are of stage {entry.stage!r}, not {stage!r}; check the manifest"
        )
    return read_tensors(file), entry.config


def restore(module: nn.Module, tensors: Mapping[str, Tensor], name: str, path: str | Path | None = None) -> None:
    """Load tensors into a module, strictly.

    Raises:
        UserError: if names or shapes do not fit; names the file's sha256 and the first differences.
    """
    if problem := misfit(module.state_dict(), tensors):
        raise mismatch(name, problem, path)
    module.load_state_dict(dict(tensors))


def misfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """The first differences in names and shapes between a network's tensors and those of a file; empty if they fit."""
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is unknown" for key in tensors if key not in own]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if problems[3:] else "")


def mismatch(name: str, problem: str, path: str | Path | None = None) -> UserError:
    """The error for weights that do not fit the code; names their sha256."""
    file = place(name, path) / f"{name}.safetensors"
    digest = sha256(file) if file.is_file() else "unknown"
    return UserError(
        f"weights {file} (sha256 {digest}) do not fit their configuration: {problem}; "
        f"use weights of this version or train them with `flowvqtalker train {STAGES.get(name, name)}`"
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file on the CPU; floating point and int8 ones with a scale come out as float32.

    Raises:
        UserError: if the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
    result = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    for key in [key for key in result if key.endswith(SCALE)]:
        scale = result.pop(key)
        whole = key.removesuffix(SCALE)
        try:
            result[whole] = result[whole].float() * scale.view(-1, *[1] * (result[whole].ndim - 1))
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{file}: the scale {key} has no matrix that it fits; copy the file again") from error
    return result
