"""A run's state in a few files of limited size, so that it can travel between machines.

A *bundle* is a folder::

    leg.json                 what it holds: stages, steps, settings, every tensor's type and shape, every file's sha256
    state-NAME-00.safetensors ...   the tensors, one after the other; a file's limit may fall inside a tensor
    report.zip               tables of numbers, curves and sheets of pictures

What is kept of a stage that still trains, by kind: ``full``: everything as it is, float32 (going on is exact to the
last bit); ``half``: weights and averages in float16, Adam's moments in bfloat16 (8 instead of 16 bytes a weight; going
on is like a run whose weights were nudged by up to 0.05 % and whose moments by 0.4 %); ``weights``: weights and
averages in float16 (4 bytes a weight; Adam begins anew). Parameters that are not trained come from the stage that
trained them. Of a finished stage only its exported weights are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.train.state import replace_file

__all__ = ["KINDS", "MANIFEST", "Limits", "fitting", "read_bundle", "write_bundle"]

logger = logging.getLogger(__name__)

KINDS = ("full", "half", "weights")
MANIFEST, REPORT = "leg.json", "report.zip"
_VERSION = 1
_MIB = 2**20
#: Bytes that a file's header takes at most: of the whole, and of one tensor beside its name.
_HEADER, _ENTRY = 256, 160
#: Files of a stage's run that travel in the report.
_TABLES = ("log.csv", "validation.csv", "config.json", "best.json")


@dataclass(frozen=True)
class Limits:
    """How many files a bundle may have, and how large one may be."""

    max_files: int = 8
    """Files in all, the manifest and the report among them."""
    max_file_mib: float = 16.0
    """Size of one file in MiB."""

    def __post_init__(self) -> None:
        if self.max_files < 3 or self.max_file_mib <= 0:
            raise UserError(
                f"a bundle of {self.max_files} files of {self.max_file_mib:g} MiB cannot be: it takes at least 3 files"
            )

    @property
    def file_bytes(self) -> int:
        """Bytes of one file."""
        return int(self.max_file_mib * _MIB)


def write_bundle(
    runs: Mapping[str, Path],
    out: str | Path,
    about: Mapping[str, Any],
    *,
    kind: str = "full",
    limits: Limits | None = None,
    leave_out: Sequence[str] = (),
    extras: Sequence[Path] = (),
) -> list[Path]:
    """Write the state of some stages. An earlier bundle in ``out`` is whole until this one is, and gone after it.

    Arguments:
        runs: stage -> folder of its run (:func:`flowvqtalker.train.loop.fit`).
        out: folder; may exist.
        about: what else the manifest is to say; ``about["stages"][name]["done"]`` says whether a stage is finished.
        kind: see the module.
        limits: number and size of the files.
        leave_out: stages of which only the tables are kept.
        extras: further files for the report.

    Returns:
        the files.

    Raises:
        UserError: if the state does not fit; nothing is changed then.
    """
    if kind not in KINDS:
        raise UserError(f"state {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    limits, out = limits or Limits(), Path(out)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    stages: dict[str, Any] = {}
    for name, folder in runs.items():
        done = bool(about.get("stages", {}).get(name, {}).get("done"))
        own, rest = ({}, {}) if name in leave_out else _finished(folder) if done else _state(folder, kind)
        tensors |= {f"{name}/{key}": value for key, value in own.items()}
        sizes[name] = sum(value.nbytes for value in own.values())
        stages[name] = {"kept": "none" if name in leave_out else "export" if done else kind, "rest": rest}
    out.mkdir(parents=True, exist_ok=True)
    beside = out / ".writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        report = beside / REPORT
        _write_report(runs, extras, report)
        if report.stat().st_size > limits.file_bytes:
            raise UserError(
                f"the report takes {report.stat().st_size / _MIB:.1f} MiB, a file may have {limits.max_file_mib:g}; "
                "allow larger files (--max-file-mib) or fewer sheets (--samples 0)"
            )
        files, described = _write_shards(tensors, beside, limits, sizes, kind)
        manifest = {
            "version": _VERSION,
            **about,
            "kept": stages,
            "tensors": described,
            "files": {p.name: {"sha256": _digest(p), "bytes": p.stat().st_size} for p in (*files, report)},
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        old = _files_of(out)
        for path in files:
            os.replace(path, out / path.name)
        os.replace(report, out / REPORT)
        os.replace(beside / MANIFEST, out / MANIFEST)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    kept = {*(p.name for p in files), REPORT, MANIFEST}
    for name in old - kept:
        (out / name).unlink(missing_ok=True)
    return [out / name for name in sorted(kept)]


#: Bytes of a trained weight with its average and moments.
_BYTES = {"full": 16, "half": 8, "weights": 4}


def fitting(trained: int, others: int, limits: Limits, kind: str = "auto") -> str:
    """The kind in which a stage's state fits, known before it trains.

    Arguments:
        trained: trained weights.
        others: bytes of the finished stages' weights.
        limits: number and size of the files.
        kind: one of :data:`KINDS`, or "auto" for the first of them that fits.

    Raises:
        UserError: if it does not fit.
    """
    room = (limits.max_files - 2) * limits.file_bytes * 0.995
    for one in KINDS if kind == "auto" else (kind,):
        if trained * _BYTES[one] + others <= room:
            return one
    need = trained * _BYTES[KINDS[-1] if kind == "auto" else kind]
    raise _too_large({"this stage": need, "finished stages": others}, limits, KINDS[-1] if kind == "auto" else kind)


def _too_large(sizes: Mapping[str, int], limits: Limits, kind: str) -> UserError:
    room, total = (limits.max_files - 2) * limits.file_bytes, sum(sizes.values())
    lesser = KINDS[KINDS.index(kind) + 1 :]
    parts = ", ".join(f"{name} {size / _MIB:.1f}" for name, size in sizes.items() if size)
    ways = [f"--state {' or '.join(lesser)}"] if lesser else []
    ways += ["--leave-out for finished stages whose weights you keep elsewhere", "larger --max-files, --max-file-mib"]
    return UserError(
        f"the state takes {total / _MIB:.1f} MiB ({parts}) and the files for it hold {room / _MIB:.1f}; "
        f"use {', or '.join(ways)}"
    )


def read_bundle(folder: str | Path, runs: Mapping[str, Path] | None, work: Path) -> dict[str, Any]:
    """Put the state of a bundle where :func:`flowvqtalker.train.loop.fit` finds it.

    Arguments:
        folder: the bundle.
        runs: stage -> folder of its run; None: ``work / stage`` of every stage in the bundle.
        work: folder for the runs.

    Returns:
        the manifest.

    Raises:
        UserError: if a file is missing or damaged.
    """
    folder = Path(folder)
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise UserError(f"{folder / MANIFEST} has version {manifest['version']}, {_VERSION} is needed")
        for name, given in manifest["files"].items():
            if _digest(folder / name) != given["sha256"]:
                raise UserError(f"{folder / name} is damaged (its sha256 is not the manifest's); copy it again")
        tensors = _read_shards(folder, manifest)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} holds no whole leg ({type(error).__name__}: {error}); copy all of it") from error
    runs = runs or {name: work / name for name in manifest["kept"]}
    _read_report(folder / REPORT, runs)
    for name, run in runs.items():
        kept = manifest["kept"].get(name)
        if kept is None or kept["kept"] == "none":
            continue
        run.mkdir(parents=True, exist_ok=True)
        own = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        if kept["kept"] == "export":
            replace_file(run / "weights.safetensors", partial(save_file, own))
        else:
            content = _content(own, kept["rest"])
            replace_file(run / "checkpoint.pt", partial(torch.save, content))
    return manifest


def _state(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint in the types they are kept in, and what of it is no tensor."""
    content = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    plain = torch.float32 if kind == "full" else torch.float16
    left_out = set(content["frozen"]["names"])
    own = {f"model/{key}": _as(value, plain) for key, value in content["model"].items() if key not in left_out}
    own |= {f"ema/{key}": _as(value, plain) for key, value in content["ema"]["shadow"].items()}
    rest = {key: value for key, value in content.items() if key not in ("model", "ema", "optimizers")}
    rest["ema_updates"] = content["ema"]["updates"]
    rest["optimizers"] = {name: value["param_groups"] for name, value in content["optimizers"].items()}
    rest["best"] = None if rest["best"] == float("inf") else rest["best"]
    moments = torch.float32 if kind == "full" else torch.bfloat16
    for name, value in content["optimizers"].items():
        for number, entry in value["state"].items():
            for key, tensor in entry.items():
                if key == "step" or kind != "weights":
                    own[f"optimizer/{name}/{number}/{key}"] = _as(tensor, torch.float32 if key == "step" else moments)
    return own, rest


def _content(own: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's content from its tensors and the rest of it; moments that were not kept begin at zero."""
    model = {key.partition("/")[2]: value for key, value in own.items() if key.startswith("model/")}
    shadow = {key.partition("/")[2]: value for key, value in own.items() if key.startswith("ema/")}
    optimizers: dict[str, Any] = {
        name: {"state": {}, "param_groups": groups} for name, groups in rest["optimizers"].items()
    }
    for key, value in own.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            group, number, which = name.split("/")
            optimizers[group]["state"].setdefault(int(number), {})[which] = value
    for value in optimizers.values():
        for entry in value["param_groups"]:
            entry["betas"] = tuple(entry["betas"])
        if any("exp_avg" not in entry for entry in value["state"].values()):
            value["state"] = {}  # Adam begins anew, its bias correction too
    kept = {key: value for key, value in rest.items() if key not in ("ema_updates", "optimizers")}
    kept["best"] = float("inf") if kept["best"] is None else kept["best"]
    ema = {"updates": rest["ema_updates"], "shadow": shadow}
    return {**kept, "model": model, "ema": ema, "optimizers": optimizers}


def _finished(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "weights.safetensors"), {}


def _as(value: Tensor, kind: torch.dtype) -> Tensor:
    return value.to(kind).contiguous() if value.dtype == torch.float32 else value.contiguous()


def _pieces(tensors: Mapping[str, Tensor], room: int) -> Iterator[dict[str, Tensor]]:
    """Files' contents: tensors cut where a file is full. A piece's name is the tensor's, and where in it it begins."""
    content: dict[str, Tensor] = {}
    left = room - _HEADER
    for key, tensor in tensors.items():
        flat = tensor.reshape(-1)
        begin = 0
        while begin < len(flat) or (begin == 0 and not len(flat)):
            name = f"{key}@{begin}"
            fits = (left - _ENTRY - 2 * len(name.encode())) // flat.element_size()
            if fits < min(len(flat) - begin, 1024):
                if not content:
                    raise UserError(f"a file of {room} bytes is too small for any of the state; allow larger ones")
                yield content
                content, left = {}, room - _HEADER
                continue
            piece = flat[begin : begin + fits]
            content[name] = piece.clone()
            left -= piece.nbytes + _ENTRY + 2 * len(name.encode())
            begin += max(1, len(piece))
    if content:
        yield content


def _write_shards(
    tensors: Mapping[str, Tensor], folder: Path, limits: Limits, sizes: Mapping[str, int], kind: str
) -> tuple[list[Path], dict[str, Any]]:
    paths: list[Path] = []
    stem = hashlib.sha256()
    for number, content in enumerate(_pieces(tensors, limits.file_bytes)):
        if number >= limits.max_files - 2:
            raise _too_large(sizes, limits, kind)
        path = folder / f"{number}"
        save_file(content, path)
        assert path.stat().st_size <= limits.file_bytes, (path.stat().st_size, limits)
        stem.update(_digest(path).encode())
        paths.append(path)
    # A name of its own for every state, so that an interruption leaves the earlier one whole.
    named = [folder / f"state-{stem.hexdigest()[:8]}-{number:02d}.safetensors" for number in range(len(paths))]
    for path, name in zip(paths, named, strict=True):
        path.rename(name)
    described = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in tensors.items()
    }
    return named, described


def _read_shards(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, dict[int, Tensor]] = {}
    for file in manifest["files"]:
        if file.endswith(".safetensors"):
            for name, piece in load_file(folder / file).items():
                key, _, begin = name.rpartition("@")
                found.setdefault(key, {})[int(begin)] = piece
    result = {}
    for key, given in manifest["tensors"].items():
        pieces = torch.cat([piece for _, piece in sorted(found[key].items())])
        value = pieces.reshape(given["shape"])
        keep = manifest["kept"][key.partition("/")[0]]["kept"] == "export" or not value.is_floating_point()
        result[key] = value if keep else value.float()
    return result


def _write_report(runs: Mapping[str, Path], extras: Iterable[Path], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, folder in runs.items():
            for table in _TABLES:
                if (folder / table).is_file():
                    archive.write(folder / table, f"{name}/{table}")
        for extra in extras:
            archive.write(extra, extra.name)


def _read_report(path: Path, runs: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name, _, table = member.partition("/")
            if table in _TABLES and name in runs:
                runs[name].mkdir(parents=True, exist_ok=True)
                (runs[name] / table).write_bytes(archive.read(member))


def _files_of(folder: Path) -> set[str]:
    """Files of the bundle that is there."""
    return {p.name for p in folder.glob("state-*.safetensors")} | {
        name for name in (REPORT, MANIFEST) if (folder / name).exists()
    }


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_MIB):
            found.update(block)
    return found.hexdigest()
