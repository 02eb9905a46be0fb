"""Data packs: what of shards and speech sets fits an archive that is small enough to carry to a machine for training.

    python -m flowvqtalker.data.pack make PACK.zip --shard SHARD --mib 60
    python -m flowvqtalker.data.pack make SOUND.zip --shard SHARD --parts motion --mib 60
    python -m flowvqtalker.data.pack open PACK.zip [SOUND.zip] --out DATA

``pictures``: stills and frames of clips, encoded again, people in turn until the archive is full; with the coefficients
of their clips. ``motion``: expression, pose and sound of whole clips. ``speech``: recordings of a speech set. Opened,
they are the shards ``DATA/pictures`` and ``DATA/motion``, the speech set ``DATA/speech``, and ``DATA/faces`` with
``DATA/faces.csv``, the same pictures as files, for the codebook. What a pack changes: pictures are encoded again,
β becomes float16, sound 8-bit µ-law (38 dB). Training needs a few held-out people: they get a share of the room.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flowvqtalker.data.order import item_generator
from flowvqtalker.data.shards import FPS, SAMPLES, Shard
from flowvqtalker.data.speech_set import COLUMNS, SpeechSet
from flowvqtalker.errors import UserError

__all__ = ["PARTS", "PackConfig", "from_mulaw", "main", "make_pack", "to_mulaw"]

logger = logging.getLogger(__name__)

PARTS = ("pictures", "motion", "speech")
_MANIFEST = "pack.json"
_VERSION = 1
_MIB = 2**20
_CODES = {"webp": (".webp", cv2.IMWRITE_WEBP_QUALITY), "jpeg": (".jpg", cv2.IMWRITE_JPEG_QUALITY)}
#: Columns of the index that a part keeps, and its list of pictures.
_INDEX = (
    *("name", "source", "identity", "split", "emotion", "speech", "picture", "identity_shape", "crop", "valid"),
    *("native", "lag", "correlation", "shifted", "length", "sound"),
)
#: µ-law: the constant of G.711 and its sizes of 8 bits.
_MU = 255.0


@dataclass(frozen=True)
class PackConfig:
    """What goes into a pack."""

    shard: Path | None = None
    """Shard of `flowvqtalker prepare`."""
    speech: Path | None = None
    """Speech set of `flowvqtalker prepare-speech`, for the part `speech`."""
    face_model: Path | None = None
    """Face model of the shard, if it is not the package's."""
    parts: tuple[str, ...] = ("pictures",)
    """Parts, which share the room alike."""
    mib: float = 60.0
    """Size of the archive in MiB."""
    code: str = "webp"
    """How pictures are encoded: webp or jpeg."""
    quality: int = 85
    """Quality of the pictures, 1 to 100."""
    stills: float = 0.6
    """Share of the pictures' room for stills; the rest is for frames of clips."""
    frames: int = 12
    """Most frames of a clip, and at least two."""
    held_out: float = 0.06
    """Share of the room for held-out people."""
    min_native: float = 160.0
    """Only pictures whose crop had at least this many pixels of side in the original."""

    def __post_init__(self) -> None:
        problems = [f"{p!r} is no part ({', '.join(PARTS)})" for p in self.parts if p not in PARTS]
        problems += [] if self.parts else ["no part was given"]
        problems += [] if self.mib > 0 else [f"mib must be positive, got {self.mib}"]
        problems += [] if self.code in _CODES else [f"code must be one of {', '.join(_CODES)}, got {self.code!r}"]
        problems += [] if 1 <= self.quality <= 100 else [f"quality must be in 1 to 100, got {self.quality}"]
        problems += [] if self.frames >= 2 else [f"frames must be at least 2, got {self.frames}"]
        for key in ("stills", "held_out"):
            if not 0 <= getattr(self, key) <= 1:
                problems.append(f"{key} must be in [0, 1], got {getattr(self, key)}")
        if self.shard is None and {"pictures", "motion"} & set(self.parts):
            problems.append("pictures and motion need --shard")
        if self.speech is None and "speech" in self.parts:
            problems.append("speech needs --speech")
        if problems:
            raise UserError(f"data pack: {'; '.join(problems)}")


def to_mulaw(wave: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """16-bit sound to 8 bits whose steps grow with loudness."""
    x = wave.astype(np.float32) / 32768
    y = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
    codes: npt.NDArray[np.uint8] = np.clip(np.round(y * 127.5 + 127.5), 0, 255).astype(np.uint8)
    return codes


def from_mulaw(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Inverse of :func:`to_mulaw` but for its rounding."""
    y = codes.astype(np.float32) / 127.5 - 1
    x = np.sign(y) * np.expm1(np.abs(y) * np.log1p(_MU)) / _MU
    wave: npt.NDArray[np.int16] = np.clip(np.round(x * 32768), -32768, 32767).astype(np.int16)
    return wave


def make_pack(path: str | Path, config: PackConfig) -> dict[str, Any]:
    """Write a pack; the file appears when it is complete.

    Returns:
        its manifest, which says how much of what there is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            pack = _Pack(archive, config.mib * _MIB)
            if config.face_model is not None:
                pack.write("face_model.safetensors", config.face_model.read_bytes())
            for number, part in enumerate(config.parts):
                room = (pack.room - pack.used) / (len(config.parts) - number)
                {"pictures": _add_pictures, "motion": _add_motion, "speech": _add_speech}[part](pack, config, room)
            manifest = {"version": _VERSION, "contents": pack.about, "sha256": pack.digests}
            archive.writestr(_MANIFEST, json.dumps(manifest), zipfile.ZIP_DEFLATED)
        if beside.stat().st_size > config.mib * _MIB:
            raise UserError(f"{path}: even the least takes {beside.stat().st_size / _MIB:.1f} MiB; give a larger --mib")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return manifest


class _Pack:
    """An archive that counts what it holds."""

    #: Manifest and directory.
    _SPARE = 256 * 1024

    def __init__(self, archive: zipfile.ZipFile, room: float) -> None:
        self.archive, self.room, self.used = archive, room - min(self._SPARE, 0.1 * room), 0
        self.about: dict[str, Any] = {}
        self.digests: dict[str, str] = {}

    def write(self, name: str, content: bytes) -> None:
        self.archive.writestr(name, content)
        self.digests[name] = hashlib.sha256(content).hexdigest()
        self.used += len(content) + 2 * len(name) + 128

    def write_arrays(self, member: str, /, **arrays: npt.NDArray[Any]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self.write(member, buffer.getvalue())


def _in_turn(groups: dict[str, list[int]], seed: int = 0) -> Iterator[int]:
    """The groups' numbers, one of each group in each round, in a fixed random order."""
    order = {key: item_generator(seed, n).permutation(groups[key]).tolist() for n, key in enumerate(sorted(groups))}
    names = item_generator(seed, 2**32).permutation(sorted(order)).tolist()
    while names:
        for name in names:
            yield order[name].pop()
        names = [name for name in names if order[name]]


def _groups(shard: Shard, clips: npt.NDArray[np.int64]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for clip in clips:
        groups.setdefault(str(shard.identity[clip]), []).append(int(clip))
    return groups


def _subset(shard: Shard, clips: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Index and coefficients of some clips."""
    rows = np.concatenate([np.arange(shard.rows(c).start, shard.rows(c).stop) for c in clips])
    index = {key: getattr(shard, key)[list(clips)] for key in _INDEX}
    index["moved"] = shard.lags[list(clips)]
    return {**index, "expression": shard.expression[rows].astype(np.float16), "pose": np.array(shard.pose[rows])}


def _bytes_of_rows(shard: Shard, clip: int) -> int:
    """About what a clip's coefficients take in the archive."""
    return int(shard.length[clip]) * (64 * 2 + 6 * 4) + 1500


def _add_pictures(pack: _Pack, config: PackConfig, room: float) -> None:
    assert config.shard is not None
    shard = Shard(config.shard)
    suffix, flag = _CODES[config.code]
    numbers: dict[int, list[int]] = {}
    for number in np.flatnonzero(shard.native[shard.image_clip] >= config.min_native):
        numbers.setdefault(int(shard.image_clip[number]), []).append(int(number))
    chosen: list[tuple[int, int, bytes]] = []
    with tqdm(total=int(room), desc="pictures", unit="B", unit_scale=True, disable=None) as bar:
        for split, part in (("val", config.held_out), ("train", 1 - config.held_out)):
            for picture, share in ((True, config.stills), (False, 1 - config.stills)):
                left = room * part * share
                clips = [c for c in shard.select(split, picture=picture) if len(numbers.get(int(c), ())) >= 2 - picture]
                for clip in _in_turn(_groups(shard, np.array(clips, np.int64))):
                    stored = numbers[clip]
                    places = np.unique(np.linspace(0, len(stored) - 1, config.frames).round().astype(int))
                    encoded = []
                    for number in (stored[place] for place in places):
                        code = cv2.imencode(suffix, shard.image(number)[..., ::-1], [flag, config.quality])[1].tobytes()
                        encoded.append((clip, int(shard.image_row[number] - shard.start[clip]), code))
                    size = sum(len(code) + 40 for *_, code in encoded) + _bytes_of_rows(shard, clip)
                    if size > left:
                        break
                    left -= size
                    chosen += encoded
                    bar.update(size)
    if not chosen:
        raise UserError(f"{config.shard}: no picture fits {room / _MIB:.1f} MiB; give a larger --mib or --min-native 0")
    clips = sorted({clip for clip, *_ in chosen})
    place = {clip: n for n, clip in enumerate(clips)}
    chosen.sort(key=lambda entry: entry[:2])
    sizes = np.array([len(code) for *_, code in chosen])
    table = np.array([(place[clip], frame) for clip, frame, _ in chosen], np.int64)
    pack.write_arrays("pictures.npz", **_subset(shard, clips), image_clip=table[:, 0], image_frame=table[:, 1],
                      image_size=sizes)  # fmt: skip
    pack.write("pictures.bin", b"".join(code for *_, code in chosen))
    held = shard.split[clips] == "val"
    still = shard.picture[clips]
    pack.about["pictures"] = {
        "stills": int((still & ~held).sum()),
        "frames": int((~still & ~held)[table[:, 0]].sum()),
        "held-out stills": int((still & held).sum()),
        "held-out frames": int((~still & held)[table[:, 0]].sum()),
        "people": len(set(shard.identity[clips].tolist())),
        "quality": f"{config.code} {config.quality}",
    }


def _add_motion(pack: _Pack, config: PackConfig, room: float) -> None:
    assert config.shard is not None
    shard = Shard(config.shard)
    chosen: list[int] = []
    for split, share in (("val", config.held_out), ("train", 1 - config.held_out)):
        left = room * share
        for clip in _in_turn(_groups(shard, shard.select(split, picture=False))):
            size = _bytes_of_rows(shard, clip) + int(shard.length[clip]) * SAMPLES * bool(shard.sound[clip])
            if size <= left:
                left -= size
                chosen.append(clip)
    if not chosen:
        raise UserError(f"{config.shard}: no clip fits {room / _MIB:.1f} MiB; give a larger --mib")
    chosen.sort()
    waves = [to_mulaw(_stored_wave(shard, clip)) for clip in chosen if shard.sound[clip]]
    pack.write_arrays("motion.npz", **_subset(shard, chosen), wave=np.concatenate(waves or [np.zeros(0, np.uint8)]))
    seconds = shard.length[chosen] / FPS
    pack.about["motion"] = {
        "clips": len(chosen),
        "minutes": round(float(seconds.sum()) / 60, 1),
        "minutes with speech": round(float(seconds[shard.speech[chosen]].sum()) / 60, 1),
        "held-out clips": int((shard.split[chosen] == "val").sum()),
        "people": len(set(shard.identity[chosen].tolist())),
    }


def _stored_wave(shard: Shard, clip: int) -> npt.NDArray[np.int16]:
    return np.round(shard.wave(clip, stored=True) * 32768).astype(np.int16)


def _add_speech(pack: _Pack, config: PackConfig, room: float) -> None:
    assert config.speech is not None
    one = SpeechSet(config.speech)
    row = sum(COLUMNS.values()) * 2
    chosen: list[int] = []
    for split, share in (("val", config.held_out), ("train", 1 - config.held_out)):
        left = room * share / 0.9  # the arrays shrink by at least a tenth: most targets are NaN or smooth
        groups: dict[str, list[int]] = {}
        for number in np.flatnonzero((one.split == split) & (one.length > 0)):
            groups.setdefault(str(one.speaker[number]), []).append(int(number))
        for recording in _in_turn(groups):
            size = int(one.length[recording]) * row + int(one.mel_length[recording]) * 160
            if size <= left:
                left -= size
                chosen.append(recording)
    if not chosen:
        raise UserError(f"{config.speech}: no recording fits {room / _MIB:.1f} MiB; give a larger --mib")
    chosen.sort()
    arrays = {key: value[chosen] if len(value) == len(one) else value for key, value in one.index.items()}
    arrays["start"] = np.cumsum([0, *one.length[chosen][:-1]])
    arrays["mel_start"] = np.cumsum([0, *one.mel_length[chosen][:-1]])
    content = {f"index/{key}": value for key, value in arrays.items()}
    for key in COLUMNS:
        column = getattr(one, key)
        content[key] = np.concatenate(
            [column[s : s + n] for s, n in zip(one.start[chosen], one.length[chosen], strict=True)]
        )
    spans = zip(one.mel_start[chosen], one.mel_length[chosen], strict=True)
    content["mel"] = np.concatenate([one.mel[s : s + n] for s, n in spans])
    pack.write_arrays("speech.npz", **content)
    pack.about["speech"] = {
        "recordings": len(chosen),
        "minutes": round(float(one.length[chosen].sum()) / FPS / 60, 1),
        "speakers": len(set(one.speaker[chosen].tolist())),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    from flowvqtalker.data.unpack import open_packs

    parser = argparse.ArgumentParser(
        prog="python -m flowvqtalker.data.pack", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    own = PackConfig.__dataclass_fields__
    make = commands.add_parser("make", help="write a pack")
    make.add_argument("pack", type=Path, metavar="PACK.zip")
    make.add_argument("--shard", type=Path, metavar="FOLDER", help="of `flowvqtalker prepare`")
    make.add_argument("--speech", type=Path, metavar="FOLDER", help="of `flowvqtalker prepare-speech`")
    make.add_argument("--face-model", type=Path, metavar="FILE", help="the shard's, if it is not the package's")
    make.add_argument("--parts", nargs="+", choices=PARTS, default=own["parts"].default, help="default: pictures")
    for name, kind, text in (
        ("mib", float, "size of the archive in MiB"),
        ("code", str, "webp or jpeg"),
        ("quality", int, "of the pictures, 1 to 100"),
        ("stills", float, "share of the pictures' room for stills; the rest is for frames of clips"),
        ("frames", int, "most frames of a clip"),
        ("held_out", float, "share of the room for held-out people"),
        ("min_native", float, "pixels of side that a crop had in the original, at least"),
    ):
        default = own[name].default
        make.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} (default: %(default)s)"
        )
    opened = commands.add_parser("open", help="unpack")
    opened.add_argument("packs", type=Path, nargs="+", metavar="PACK.zip")
    opened.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    opened.add_argument("--decode", action="store_true", help="also keep the pictures decoded (0.75 MiB each): a "
                        "network that is faster than the decoding waits less")  # fmt: skip
    given = vars(parser.parse_args(arguments))
    if given.pop("command") == "open":
        for name in open_packs(given["packs"], given["out"], given["decode"]):
            logger.info("%s", given["out"] / name)
        return
    path = given.pop("pack")
    made = make_pack(path, PackConfig(**{**given, "parts": tuple(given["parts"])}))
    for part, about in made["contents"].items():
        logger.info("%s: %s", part, ", ".join(f"{value} {key}" for key, value in about.items()))
    logger.info("%s: %.1f MiB", path, path.stat().st_size / _MIB)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except UserError as error:
        logger.error("error: %s", error)
        sys.exit(2)
