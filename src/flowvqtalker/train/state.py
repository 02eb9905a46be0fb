"""What a run keeps: averaged weights, checkpoints, exported weights; every file is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from flowvqtalker.errors import UserError
from flowvqtalker.train.config import LoopConfig, to_dict
from flowvqtalker.train.stage import Stage

__all__ = ["CHECKPOINT_VERSION", "Ema", "export", "load_checkpoint", "replace_file", "save_checkpoint"]

CHECKPOINT_VERSION = 1

logger = logging.getLogger(__name__)


class Ema:
    """Exponential moving average of some parameters in float32; young averages follow faster ((1 + n) / (10 + n))."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = dict(parameters)
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averages; the parameters come back after it."""
        if self.decay == 0:
            yield
            return
        live = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.shadow[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = live[name]

    def state_dict(self) -> dict[str, Any]:
        """The averages and how often they were updated."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.updates = int(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside ``path`` and rename it, so that an interruption leaves the old one whole."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(
    path: Path,
    stage: Stage,
    config: LoopConfig,
    module: nn.Module,
    ema: Ema,
    optimizers: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    content = {
        "version": CHECKPOINT_VERSION,
        "stage": stage.name,
        "config": to_dict(stage.config),
        "loop": to_dict(config),
        "rng": {"seed": config.seed, "step": state["step"]},  # see step_seed: there is no other random state
        "model": module.state_dict(),
        "frozen": frozen(module, ema),
        "ema": ema.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        **state,
    }
    replace_file(path, lambda p: torch.save(content, p))


def frozen(module: nn.Module, ema: Ema) -> dict[str, Any]:
    """Names of the parameters that are not trained, which building the stage restores, and a hash of their values."""
    names = [name for name, _ in module.named_parameters() if name not in ema.parameters]
    digest = hashlib.sha256()
    for name in names:
        digest.update(module.get_parameter(name).detach().cpu().contiguous().numpy().tobytes())
    return {"names": names, "sha256": digest.hexdigest()}


def load_checkpoint(
    path: Path,
    stage: Stage,
    config: LoopConfig,
    module: nn.Module,
    ema: Ema,
    optimizers: Mapping[str, Any],
    state: dict[str, Any],
) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); remove it and start again"
        ) from error
    problems = []
    for key, mine in (("version", CHECKPOINT_VERSION), ("stage", stage.name)):
        if content.get(key) != mine:
            problems.append(f"{key} is {content.get(key)!r}, not {mine!r}")
    theirs, ours = (_without_loop(c) or {} for c in (content.get("config"), to_dict(stage.config)))
    changed = ", ".join(sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k)))
    if problems:
        raise UserError(f"checkpoint {path}: {'; '.join(problems)}; choose another --out")
    if changed:
        logger.warning("the configuration differs from the checkpoint's in %s", changed)
    for key in ("batch_size", "accumulate", "seed", "devices", "nodes"):
        old, new = content["loop"].get(key), getattr(config, key)
        if old != new:
            logger.warning("loop.%s was %s and is %s: the order of the data changes here", key, old, new)
    try:
        _load_model(path, module, ema, content)
        ema.load_state_dict(content["ema"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
            _align(optimizer)
    except UserError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} does not fit the model, the configuration differs in {changed or 'nothing'}; "
            "resume with its own configuration or choose another --out"
        ) from error
    state.update(step=int(content["step"]), best=float(content["best"]))


def _load_model(path: Path, module: nn.Module, ema: Ema, content: Mapping[str, Any]) -> None:
    """Parameters that are not trained may be left out of a checkpoint if the module has the same ones already."""
    left_out = set(content.get("frozen", {}).get("names", ())) - set(content["model"])
    if left_out and content["frozen"] != frozen(module, ema):
        raise UserError(f"checkpoint {path} was made with other frozen parts; give the same codebook or speech encoder")
    module.load_state_dict({name: module.get_parameter(name) for name in left_out} | content["model"])


def _align(optimizer: Any) -> None:
    """Give the moments the memory format of their parameters, which fused Adam takes for granted."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter).copy_(value)


def _without_loop(config: Any) -> Any:
    return {k: v for k, v in config.items() if k != "loop"} if isinstance(config, dict) else config


def export(stage: Stage, config: LoopConfig, step: int, path: Path, results: Mapping[str, float]) -> None:
    """Write the stage's weights as fp16 safetensors and, once beside them, the configuration."""
    tensors, settings = stage.export()
    halves = {
        key: (
            value.detach().to("cpu", torch.float16) if value.is_floating_point() else value.detach().cpu()
        ).contiguous()
        for key, value in tensors.items()
    }
    about = {"stage": stage.name, "step": step, "scores": dict(results), "config": settings, "loop": to_dict(config)}
    replace_file(path, lambda p: save_file(halves, p, metadata={"stage": stage.name, "step": str(step)}))
    text = json.dumps(about, indent=1)
    beside = path.with_name("config.json" if path.name == "weights.safetensors" else path.stem + ".json")
    replace_file(beside, lambda p: _write_text(p, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
