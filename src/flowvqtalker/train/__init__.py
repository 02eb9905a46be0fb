"""Training: one loop, one file per stage.

Each stage's module holds ``Config`` (a frozen dataclass; a field ``loop`` of type
:class:`~flowvqtalker.train.config.LoopConfig` says how to train) and either ``build(config) -> Stage``, for the common
loop, or ``run(config, out, resume)`` for a stage that is no gradient descent.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowvqtalker.errors import UserError

__all__ = ["STAGES", "main", "stage_module", "train"]

#: Name on the command line -> module.
STAGES = {
    "face-model": "flowvqtalker.train.face_model",
    "codebook": "flowvqtalker.train.codebook",
    "vqig": "flowvqtalker.train.vqig",
    "mouth": "flowvqtalker.train.mouth",
    "speech": "flowvqtalker.train.speech",
    "expflow": "flowvqtalker.train.expflow",
    "poseflow": "flowvqtalker.train.poseflow",
    "sync": "flowvqtalker_eval.evaluators.sync_training",
    "emotion": "flowvqtalker_eval.evaluators.emotion_training",
    "motion-emotion": "flowvqtalker_eval.evaluators.motion_emotion",
}


def stage_module(name: str) -> Any:
    """The module of a stage, imported now.

    Raises:
        UserError: if there is no such stage.
    """
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}; choose one of {', '.join(STAGES)}")
    return importlib.import_module(STAGES[name])


def train(name: str, config: Any, out: str | Path, resume: bool = False) -> dict[str, float]:
    """Run a stage with its configuration; see :func:`flowvqtalker.train.loop.fit` for what ``out`` holds afterwards."""
    from flowvqtalker.train.config import save_yaml

    module = stage_module(name)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not resume or not (out / "config.yaml").exists():
        save_yaml(config, out / "config.yaml")
    if hasattr(module, "run"):
        return dict(module.run(config, out, resume) or {})
    from flowvqtalker.train.loop import fit

    return fit(module.build(config), config.loop, out, resume)


def main(name: str, arguments: Sequence[str]) -> dict[str, float]:
    """``flowvqtalker train NAME --out FOLDER [--config FILE] [--resume] [--loop.steps 10 ...]``.

    Arguments:
        name: the stage.
        arguments: the rest of the command line.
    """
    import argparse

    from flowvqtalker.train.config import parse

    prog = f"flowvqtalker train {name}"
    module = stage_module(name)
    own = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    own.add_argument("--out", default=f"runs/{name}")
    own.add_argument("--config")
    own.add_argument("--resume", action="store_true")
    options, rest = own.parse_known_args(list(arguments))
    out, source = Path(options.out), options.config
    if options.resume and source is None and (out / "config.yaml").exists():
        source = out / "config.yaml"
    return train(name, parse(module.Config, rest, prog=prog, config=source), out, options.resume)
