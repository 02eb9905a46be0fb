"""The options of ``animate`` as fields of a request: all that concern the video, none that concern the server."""

from __future__ import annotations

import ast
import csv
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flowvqtalker.errors import UserError
from flowvqtalker.motion.emotion import BLEND, EmotionKey, EmotionTrack
from flowvqtalker.motion.options import FILES, LIMITS, lowest
from flowvqtalker.options import AnimateArguments
from flowvqtalker.serve.problems import Problem, from_user_error

__all__ = ["check_options", "describe_options", "load_track"]

# The server decides on these.
_NOT_OFFERED = {"device", "dtype", "weights", "exact", "mark", "mark_id", "sign_cert", "sign_key", "timestamp_url"}
_HINTS = typing.get_type_hints(AnimateArguments)
_OPTIONS = {f.name: f for f in fields(AnimateArguments) if f.name not in _NOT_OFFERED}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def check_options(given: Mapping[str, Any], files: Iterable[str], max_samples: int) -> dict[str, Any]:
    """Values of the options that were given, checked as ``animate`` checks them.

    Arguments:
        given: name -> text of a form, or value from JSON.
        files: names of the options that came as files.
        max_samples: largest number of samples.

    Raises:
        Problem: for the first that cannot be used.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _OPTIONS or name in FILES:
            raise Problem("invalid", f"There is no field {name!r}; GET /v1/options lists the options.", name)
        if value is None or value == "":
            continue
        try:
            values[name] = TypeAdapter(_HINTS[name]).validate_python(value)
        except ValidationError as error:
            raise Problem("invalid", f"{name} {value!r}: {error.errors()[0]['msg']}.", name) from error
        if name in LIMITS or name == "emotion":
            _check({name: values[name]}, name)
    if not 1 <= values.get("num_samples", 1) <= max_samples:
        raise Problem("out_of_range", f"num_samples must be from 1 to {max_samples}.", "num_samples")
    if (values.get("face") or 0) < 0:
        raise Problem("out_of_range", "face must be a number from 0.", "face")
    _check(values | {name: Path(name) for name in files})
    return values


def _check(values: dict[str, Any], field: str | None = None) -> None:
    try:
        arguments = replace(AnimateArguments(), **values)
        arguments.motion_options()
        arguments.video()
    except UserError as error:
        # Of two that exclude each other, the one that the message names last.
        named = [name for name in re.findall(r"\w+", str(error)) if name in values]
        raise from_user_error(error, field or (named[-1] if named else None)) from error


def load_track(path: Path, given: str | list[Any]) -> None:
    """Write an emotion track to a file and check it.

    Arguments:
        path: csv file to write.
        given: csv text, or a list (also as JSON text) of objects with time, emotion and optionally intensity.

    Raises:
        Problem: if it cannot be understood.
    """
    field = "emotion_track"
    try:
        if isinstance(given, str) and re.match(r"\s*\[\s*[{\]]", given):
            given = json.loads(given)
        if isinstance(given, list):
            keys = TypeAdapter(list[EmotionKey]).validate_python(given)
            with open(path, "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(("time", "emotion", "intensity"))
                rows.writerows((key.time, key.emotion, key.intensity) for key in keys)
        else:
            path.write_text(given, encoding="utf-8")
        EmotionTrack.load(path)
    except ValidationError as error:
        where = ", ".join(map(str, error.errors()[0]["loc"]))
        raise Problem("invalid", f"The emotion track, entry {where}: {error.errors()[0]['msg']}.", field) from error
    except UserError as error:
        raise from_user_error(error, field, **{str(path): "the emotion track"}) from error
    except ValueError as error:
        raise Problem("invalid", f"The emotion track is broken JSON ({error}).", field) from error


def describe_options() -> list[dict[str, Any]]:
    """Every option with its type, default, limits and help."""
    help_texts = _help()
    described = []
    for name, option in _OPTIONS.items():
        kind = next((_TYPES[t] for t in (_HINTS[name], *typing.get_args(_HINTS[name])) if t in _TYPES), "string")
        default = None if option.default is MISSING else option.default
        entry = {"name": name, "type": "file" if name in FILES else kind, "default": default}
        if name in LIMITS:
            entry |= {"min": lowest(name), "max": LIMITS[name]}
        described.append(entry | {"help": help_texts.get(name, "")})
    described.append({
        "name": "transition", "type": "number", "default": BLEND, "min": 0.0, "max": 60.0,
        "help": "Seconds of a change of emotion in a track.",
    })  # fmt: skip
    return described


def _help() -> dict[str, str]:
    """Option -> the text below it in the source, which the command line shows too."""
    found = {}
    for kind in reversed(AnimateArguments.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
