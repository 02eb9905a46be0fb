"""Open data packs (:mod:`flowvqtalker.data.pack`), with numpy and OpenCV alone."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from flowvqtalker.data.pack import from_mulaw
from flowvqtalker.data.shards import LAGS, SAMPLES, SHARD_VERSION, Shard
from flowvqtalker.errors import UserError

__all__ = ["open_packs"]

_COEFFICIENTS = ("expression", "pose")


def open_packs(packs: Iterable[str | Path], out: str | Path, decode: bool = False) -> list[str]:
    """Open packs into one folder. Each part appears when it is complete.

    Arguments:
        packs: archives.
        out: folder.
        decode: also keep the pictures decoded (:meth:`~flowvqtalker.data.shards.Shard.keep_decoded`).

    Returns:
        names of the folders and files in ``out``.

    Raises:
        UserError: if an archive is damaged, or a part is there already.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    beside = out / ".opening"
    names: list[str] = []
    for pack in packs:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            contents = _read(Path(pack))
            for name, content in contents.items():
                if name == "face_model.safetensors":
                    (beside / name).write_bytes(content)
            for part, write in (("pictures", _write_pictures), ("motion", _write_motion), ("speech", _write_speech)):
                if f"{part}.npz" in contents:
                    with np.load(io.BytesIO(contents[f"{part}.npz"]), allow_pickle=False) as arrays:
                        write(beside, {key: arrays[key] for key in arrays.files}, contents)
            if decode and (beside / "pictures").is_dir():
                Shard(beside / "pictures").keep_decoded()
            made = sorted(p.name for p in beside.iterdir())
            there = [name for name in made if (out / name).exists()]
            if there:
                raise UserError(f"{out} already holds {', '.join(there)}; remove it or choose another folder")
            for name in made:
                (beside / name).rename(out / name)
            names += made
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return names


def _read(pack: Path) -> dict[str, bytes]:
    """Members of an archive, checked."""
    try:
        with zipfile.ZipFile(pack) as archive:
            manifest = json.loads(archive.read("pack.json"))
            contents = {name: archive.read(name) for name in manifest["sha256"]}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{pack} is no whole data pack ({error}); copy it again") from error
    for name, digest in manifest["sha256"].items():
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise UserError(f"{pack}: {name} is damaged (its sha256 is not the manifest's); copy the pack again")
    return contents


def _write_shard(folder: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """The part of a shard that pictures and motion have in common."""
    folder.mkdir()
    index = {k: v for k, v in arrays.items() if not k.startswith("image_") and k not in (*_COEFFICIENTS, "wave")}
    moved = index.pop("moved")
    start = np.concatenate([[0], np.cumsum(index["length"])[:-1]]).astype(np.int64)
    np.savez(folder / "index.npz", version=SHARD_VERSION, about="data pack", start=start, **cast(Any, index))
    np.savez(folder / LAGS, offset=moved, confidence=np.ones(len(moved), np.float32))
    for name in _COEFFICIENTS:
        np.save(folder / f"{name}.npy", arrays[name].astype(np.float32))


def _write_pictures(out: Path, arrays: dict[str, npt.NDArray[Any]], contents: dict[str, bytes]) -> None:
    folder, faces, codes = out / "pictures", out / "faces", contents["pictures.bin"]
    _write_shard(folder, arrays)
    clip, frame, size = (arrays[f"image_{key}"] for key in ("clip", "frame", "size"))
    start = np.concatenate([[0], np.cumsum(arrays["length"])[:-1]])
    offset = np.concatenate([[0], np.cumsum(size)[:-1]])
    np.savez(folder / "images.npz", clip=clip, row=start[clip] + frame, offset=offset, size=size)
    (folder / "images.bin").write_bytes(codes)
    faces.mkdir()
    with open(out / "faces.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "identity"))
        for number, (where, length) in enumerate(zip(offset.tolist(), size.tolist(), strict=True)):
            code = codes[where : where + length]
            name = f"{number:05d}.{'webp' if code[:4] == b'RIFF' else 'jpg'}"
            (faces / name).write_bytes(code)
            writer.writerow((name, arrays["identity"][clip[number]]))


def _write_motion(out: Path, arrays: dict[str, npt.NDArray[Any]], contents: dict[str, bytes]) -> None:
    _write_shard(out / "motion", arrays)
    sound = np.repeat(arrays["sound"], arrays["length"] * SAMPLES)
    wave = np.zeros(len(sound), np.int16)
    wave[sound] = from_mulaw(arrays["wave"])
    np.save(out / "motion" / "audio.npy", wave)


def _write_speech(out: Path, arrays: dict[str, npt.NDArray[Any]], contents: dict[str, bytes]) -> None:
    folder = out / "speech"
    folder.mkdir()
    prefix = "index/"
    index = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    np.savez(folder / "index.npz", **cast(Any, index))
    for name, values in arrays.items():
        if not name.startswith(prefix):
            np.save(folder / f"{name}.npy", values)
