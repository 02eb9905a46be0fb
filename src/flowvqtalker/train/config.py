"""Configurations: frozen nested dataclasses that check themselves, with a YAML round trip and a command line.

A configuration is one value: the command line, the Python interface, the file beside the weights and the checkpoint all
hold the same object. Every problem of a configuration is collected before it is refused.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from flowvqtalker.errors import UserError

__all__ = ["ConfigError", "LoopConfig", "check", "from_dict", "load_yaml", "parse", "save_yaml", "to_dict"]

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot be used; ``problems`` lists everything that is wrong with it."""

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
    """Optimiser steps in all."""
    batch_size: int = 8
    """Items of one forward pass on one device."""
    lr: float = 1e-4
    """Learning rate of Adam after the warm-up; a stage may scale it for one of its groups."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's averaging constants."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up; cosine falls to a twentieth at the last step."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: autocast to bfloat16, weights and optimiser in float32."""
    accumulate: int = 1
    """Forward passes whose gradients are averaged into one step."""
    clip: float = 0.0
    """Largest gradient norm of a group; 0 does not clip."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is validated and exported; 0: none."""
    seed: int = 0
    """Seed of the data order and of everything random in a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    devices: int = 1
    """Devices (CPU: processes) of one node."""
    nodes: int = 1
    """Machines; start the same command on each, with the variables of torchrun."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its default."""
    workers: int = 0
    """Processes that load data; 0 loads the next batch in a thread, which is best on few cores."""
    channels_last: bool = False
    """Keep pictures and convolution weights channels-last: faster convolutions in bfloat16."""
    compile: bool = False
    """Let torch.compile translate the network's parts: a minute or more before the first step, faster ones after it."""
    overfit: bool = False
    """Train on the first batch only, to see whether a model can learn at all."""
    log_every: int = 50
    """Steps between two rows of log.csv (means over the steps between)."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    validate_every: int = 1000
    """Steps between two validations; 0: only before the first and after the last step."""
    minutes: float = 0.0
    """Wall-clock limit of this run, after which it saves and stops; 0: none."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "devices", "nodes", "log_every", "save_every")
        sizes = ("warmup", "clip", "threads", "workers", "validate_every", "minutes")
        check(
            *((getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}") for name in counts),
            *((getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}") for name in sizes),
            (self.lr > 0, f"lr must be positive, got {self.lr}"),
            (all(0 <= b < 1 for b in self.betas), f"betas must be in [0, 1), got {self.betas}"),
            (0 <= self.ema < 1, f"ema must be in [0, 1), got {self.ema}"),
        )


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists, numbers and strings (what YAML, JSON and a checkpoint can hold)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a configuration of type ``cls`` from plain values; keys left out keep their default.

    Raises:
        ConfigError: with every unknown key, wrong type and broken rule, each named by its path (``loop.batch_size``).
    """
    problems: list[str] = []
    result = _build(cls, values, "", problems)
    if problems or result is None:
        raise ConfigError(problems)
    return typing.cast(T, result)


def _build(cls: Any, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{path.rstrip('.') or 'configuration'}: expected a mapping, got {values!r}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    before = len(problems)
    for key in values:
        if key not in fields:
            problems.append(f"{path}{key}: unknown; allowed: {', '.join(sorted(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"{path}{name}: missing")
    given = {k: _coerce(hints[k], v, path + str(k), problems) for k, v in values.items() if k in fields}
    if len(problems) > before:
        # The rules of __post_init__ are still worth telling, on the values whose type is right.
        bad = {p.removeprefix(path).split(":")[0].split(".")[0] for p in problems[before:]}
        given = {k: v for k, v in given.items() if k not in bad}
    try:
        return cls(**given)
    except ConfigError as error:
        problems.extend(f"{path}{problem}" for problem in error.problems)
    except TypeError:  # a required field is missing, which was said above
        pass
    return None


def _coerce(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """``value`` as the annotated type, or a problem."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _build(hint, value, path + ".", problems)
    if origin is Literal:
        if value in arguments:
            return value
        problems.append(f"{path}: {value!r} is not allowed; choose one of {', '.join(map(str, arguments))}")
        return None
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            trial: list[str] = []
            result = _coerce(option, value, path, trial)
            if not trial:
                return result
        return _coerce(options[-1], value, path, problems)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is list or arguments[-1] is Ellipsis:
            return origin(_coerce(arguments[0], v, f"{path}[{i}]", problems) for i, v in enumerate(value))
        if len(value) == len(arguments):
            pairs = zip(arguments, value, strict=True)
            return tuple(_coerce(a, v, f"{path}[{i}]", problems) for i, (a, v) in enumerate(pairs))
        problems.append(f"{path}: expected {len(arguments)} values, got {len(value)}")
        return None
    if origin is dict and isinstance(value, Mapping):
        return {k: _coerce(arguments[1], v, f"{path}.{k}", problems) for k, v in value.items()}
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    elif hint is int and isinstance(value, bool):
        pass
    elif hint is Any or (hint in (bool, int, str) and isinstance(value, hint)):
        return value
    problems.append(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return None


def load_yaml(cls: type[T], path: str | Path) -> T:
    """Read a configuration of type ``cls`` from a YAML (or JSON) file.

    Raises:
        UserError: if the file is missing, is no YAML, or holds a configuration with problems.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"configuration {path} is no valid YAML: {' '.join(str(error).split())}") from error
    return from_dict(cls, values if values is not None else {})


def save_yaml(config: Any, path: str | Path) -> None:
    """Write a configuration to a YAML file that :func:`load_yaml` reads back to an equal one."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def parse(cls: type[T], arguments: Sequence[str], *, prog: str, config: str | Path | None = None) -> T:
    """A configuration from the command line: a file, if given, then the flags (``--loop.steps 10``) over it."""
    import tyro

    default = load_yaml(cls, config) if config is not None else None
    if default is None:
        return tyro.cli(cls, prog=prog, args=list(arguments))
    return tyro.cli(cls, prog=prog, args=list(arguments), default=default)
