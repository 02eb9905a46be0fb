"""Configurations: frozen nested dataclasses that check themselves, with a YAML round trip.

One value describes a run: the command line, the Python interface, the file beside the weights and the checkpoint all
hold the same object. Pydantic validates plain values; all problems of a configuration are reported together.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic_core import ErrorDetails, to_jsonable_python

from flowvqtalker.errors import UserError

__all__ = ["ConfigError", "LoopConfig", "check", "from_dict", "load_yaml", "save_yaml", "to_dict"]

T = TypeVar("T")


class ConfigError(UserError):
    """An invalid configuration; ``problems`` lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("configuration: " + "; ".join(self.problems))


def check(*rules: tuple[bool, str]) -> None:
    """Raise one :class:`ConfigError` with the message of every rule that does not hold.

    Meant for ``__post_init__``: ``check((self.steps > 0, f"steps must be positive, got {self.steps}"), ...)``.
    """
    problems = [message for holds, message in rules if not holds]
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast and where to train; the same for every stage."""

    steps: int = 10_000
    """Optimiser steps in total."""
    batch_size: int = 8
    """Items per forward pass on one device."""
    lr: float = 1e-4
    """Learning rate of Adam after the warm-up; a stage may scale it for one of its groups."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's averaging constants."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine falls to a twentieth at the last step."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: autocast to bfloat16; weights and optimiser stay in float32."""
    accumulate: int = 1
    """Forward passes whose gradients are averaged into one step."""
    clip: float = 0.0
    """Largest gradient norm of a group; 0 does not clip."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is validated and exported; 0: no average."""
    seed: int = 0
    """Seed of the data order and of all randomness within a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    devices: int = 1
    """Devices (CPU: processes) per node."""
    nodes: int = 1
    """Machines; start the same command on each, with the environment variables of torchrun."""
    threads: int = 0
    """CPU threads of torch; 0 keeps its default."""
    workers: int = 1
    """Processes that load batches ahead; 0 loads each batch between two steps."""
    channels_last: bool = False
    """Keep images and convolution weights channels-last: faster convolutions in bfloat16."""
    compile: bool = False
    """Compile the network's parts with torch.compile: a minute or more before the first step, faster steps after it."""
    overfit: bool = False
    """Train on the first batch only, to see whether a model can learn at all."""
    log_every: int = 50
    """Steps between two rows of log.csv, which holds means over these steps."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    validate_every: int = 1000
    """Steps between two validations; 0: only before the first and after the last step."""
    minutes: float = 0.0
    """Wall-clock limit of this run, after which it saves and stops; 0: none."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulate", "devices", "nodes", "log_every", "save_every", "lr")
        not_negative = ("warmup", "clip", "threads", "workers", "validate_every", "minutes", "seed")
        check(
            *((getattr(self, n) > 0, f"{n} must be positive, got {getattr(self, n)}") for n in positive),
            *((getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}") for n in not_negative),
            (all(0 <= b < 1 for b in self.betas), f"betas must be in [0, 1), got {self.betas}"),
            (0 <= self.ema < 1, f"ema must be in [0, 1), got {self.ema}"),
        )


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists, numbers and strings: what YAML, JSON and a checkpoint can hold."""
    return to_jsonable_python(config)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a configuration of type ``cls`` from plain values; omitted keys keep their default.

    Raises:
        ConfigError: with every unknown key, wrong type and broken rule, each named by its path (``loop.batch_size``).
    """
    try:
        return typing.cast(T, _model(typing.cast(Any, cls))(value=values).value)
    except pydantic.ValidationError as error:
        problems = [text for detail in error.errors(include_url=False) for text in _problems(cls, detail)]
        raise ConfigError(problems) from None


@functools.lru_cache
def _model(cls: Any) -> Any:
    """Pydantic takes settings for plain dataclasses, here to refuse unknown keys, only from an enclosing model."""
    return pydantic.create_model("Config", __config__=pydantic.ConfigDict(extra="forbid"), value=(cls, ...))


def _problems(cls: type, detail: ErrorDetails) -> list[str]:
    """One line for each problem in an error of pydantic."""
    place = [str(part) for part in detail["loc"][1:]]
    path = ".".join(place)
    if detail["type"] == "unexpected_keyword_argument":
        owner: Any = cls
        for name in place[:-1]:
            hint = typing.get_type_hints(owner)[name]
            owner = next((part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)), hint)
        return [f"{path}: unknown; allowed: {', '.join(sorted(f.name for f in dataclasses.fields(owner)))}"]
    if detail["type"] == "missing":
        return [f"{path}: missing"]
    if detail["type"] == "value_error":
        error = detail["ctx"]["error"]
        found = error.problems if isinstance(error, ConfigError) else [str(error)]
        return [f"{path}.{problem}" if path else problem for problem in found]
    return [f"{path or 'configuration'}: {detail['msg']}, got {detail['input']!r}"]


def load_yaml(cls: type[T], path: str | Path) -> T:
    """Read a configuration of type ``cls`` from a YAML (or JSON) file.

    Raises:
        UserError: if the file is missing, is not valid YAML, or holds an invalid configuration.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read ({error.strerror}); check the name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"configuration {path} is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    return from_dict(cls, values if values is not None else {})


def save_yaml(config: Any, path: str | Path) -> None:
    """Write a configuration to a YAML file that :func:`load_yaml` reads back to an equal one."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
