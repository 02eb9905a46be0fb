"""What a run keeps: checkpoints to resume from, and exported weights; every file appears whole or not at all."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.train.config import LoopConfig, to_dict
from flowvqtalker.train.stage import Stage

__all__ = ["export", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)

#: Settings whose product is the number of items that a step reads; as long as it stays, so does the order of the data.
_ITEMS = ("batch_size", "accumulate", "devices", "nodes")


def save_checkpoint(
    path: Path, stage: Stage, config: LoopConfig, progress: Mapping[str, float], parts: Mapping[str, Any]
) -> None:
    """Write the state of a run. No state of a random generator is needed: every step seeds its own.

    Arguments:
        path: the file.
        stage, config: what is trained, and how.
        progress: the numbers of the run (``step``, ``best``).
        parts: modules and optimisers, anything with ``state_dict``, by name.
    """
    content = {
        "stage": stage.name,
        "config": to_dict(stage.config),
        "loop": to_dict(config),
        "progress": dict(progress),
        "parts": {name: part.state_dict() for name, part in parts.items()},
    }
    atomic_write(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, stage: Stage, config: LoopConfig, parts: Mapping[str, Any]) -> dict[str, float]:
    """Restore the parts that :func:`save_checkpoint` wrote, and return the run's ``progress``.

    Raises:
        UserError: if the file cannot be read, or belongs to another stage or to a model of another shape.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        name, saved, loop = content["stage"], content["config"] or {}, content["loop"]
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        raise UserError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); remove it and start again"
        ) from error
    if name != stage.name:
        raise UserError(f"checkpoint {path}: stage is {name!r}, not {stage.name!r}; choose another --out")
    own = to_dict(stage.config) or {}
    changed = ", ".join(sorted(k for k in {*saved, *own} - {"loop"} if saved.get(k) != own.get(k)))
    if changed:
        logger.warning("the configuration differs from the checkpoint's in %s", changed)
    if loop.get("seed") != config.seed:
        logger.warning("loop.seed was %s and is %s: the order of the data changes here", loop.get("seed"), config.seed)
    old, new = (math.prod(int(values.get(k, 1)) for k in _ITEMS) for values in (loop, to_dict(config)))
    if old != new:
        logger.warning("a step read %d items and reads %d: the order of the data changes here", old, new)
    try:
        for key, part in parts.items():
            part.load_state_dict(content["parts"][key])
            if isinstance(part, torch.optim.Optimizer):
                _match_memory_format(part)
        return {key: value for key, value in content["progress"].items()}
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} does not fit the model, the configuration differs in {changed or 'nothing'}; "
            "resume with its own configuration or choose another --out"
        ) from error


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory format of their parameters, which fused Adam takes for granted."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter).copy_(value)


def export(stage: Stage, config: LoopConfig, step: int, path: Path, results: Mapping[str, float]) -> None:
    """Write the stage's weights as fp16 safetensors, and the configuration beside them as JSON."""
    tensors, settings = stage.export()
    about = {"stage": stage.name, "step": step, "scores": dict(results), "config": settings, "loop": to_dict(config)}
    # One entry only: safetensors writes several in a random order, and equal runs shall give equal files.
    metadata = {"stage": stage.name}
    halves = {key: _half(value) for key, value in tensors.items()}
    atomic_write(path, lambda temporary: temporary.write_bytes(save(halves, metadata)))
    beside = path.with_name("config.json" if path.name == "weights.safetensors" else path.stem + ".json")
    atomic_write(beside, lambda temporary: temporary.write_text(json.dumps(about, indent=1), encoding="utf-8"))


def _half(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype).contiguous()
