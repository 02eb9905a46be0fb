"""Training: one loop, one file per stage.

Each stage's module holds ``Config`` (a frozen dataclass; a field ``loop`` of type
:class:`~flowvqtalker.train.config.LoopConfig` says how to train) and either ``build(config) -> Stage``, for the common
loop, or ``run(config, out, resume)`` for a stage that is not trained by gradient descent.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from flowvqtalker.errors import UserError

__all__ = ["STAGES", "stage_module", "train"]

#: Name on the command line -> module.
STAGES = {
    "face-model": "flowvqtalker.train.face_model",
    "codebook": "flowvqtalker.train.codebook",
    "vqig": "flowvqtalker.train.vqig",
    "speech": "flowvqtalker.train.speech",
    "speech-live": "flowvqtalker.train.speech_live",
    "voice-emotion": "flowvqtalker.train.voice_emotion",
    "expflow": "flowvqtalker.train.expflow",
    "poseflow": "flowvqtalker.train.poseflow",
}


def stage_module(name: str) -> Any:
    """The module of a stage of :data:`STAGES`, imported now.

    Raises:
        UserError: if there is no such stage.
    """
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}; choose one of {', '.join(STAGES)}")
    return importlib.import_module(STAGES[name])


def train(stage: str | ModuleType, config: Any, out: str | Path, resume: bool = False) -> dict[str, float]:
    """Run a stage; see :func:`flowvqtalker.train.loop.fit` for what ``out`` holds afterwards.

    Arguments:
        stage: a name of :data:`STAGES`, or the module of a stage that lives elsewhere.
        config: an instance of the module's ``Config``; a copy is kept in ``out`` as ``config.yaml``.
        out: folder of the run.
        resume: continue the run in that folder.
    """
    from flowvqtalker.train.config import save_yaml

    module: Any = stage_module(stage) if isinstance(stage, str) else stage
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not resume or not (out / "config.yaml").exists():
        save_yaml(config, out / "config.yaml")
    if hasattr(module, "run"):
        return dict(module.run(config, out, resume) or {})
    from flowvqtalker.train.loop import fit

    return fit(module.build(config), config.loop, out, resume)
