"""Damaged inputs: no reader may raise anything but a :class:`UserError`, hang, fill the memory or leave a file.

``python -m tests.fuzzing --inputs 10000 [--seed N] [--save FOLDER]`` mutates small files of every kind that users can
give. ``tests/test_fuzz.py`` runs it for some seconds, and runs what failed before, which is kept in ``tests/corpus``.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_tensors

from flowvqtalker import provenance, weights
from flowvqtalker.batch.table import check_jobs, read_table
from flowvqtalker.errors import UserError
from flowvqtalker.face.export import load_motion, save_live_link
from flowvqtalker.io.audio import scan, stream
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.io.image import read_image
from flowvqtalker.io.video import probe, read_video
from flowvqtalker.loading import load_face_model
from flowvqtalker.motion.emotion import EmotionTrack
from flowvqtalker.options import AnimateArguments
from flowvqtalker.train import expflow, vqig
from flowvqtalker.train.config import load_yaml
from flowvqtalker_eval.tables.splits import load_split

SLOWEST = 60  # seconds for an input, after which the process shows where it hangs and ends
LARGEST = 2 << 20  # KiB that an input may add to the memory

_TOKENS = (
    b"",
    b"nan",
    b"inf",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"\0",
    b"\xff\xfe",
    b'"',
    b",",
    b"\n",
    b"[",
    b"{",
    b"..",
    b"*",
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change, insert, remove, repeat or cut some bytes; now and then a whole token or number of 32 bits."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        start = rng.randrange(len(made) + 1)
        end = min(len(made), start + rng.choice((1, 1, 2, 4, 64)))
        piece = rng.choice((
            bytes([rng.randrange(256)]), rng.randbytes(end - start), bytes(end - start), b"\xff" * (end - start),
            made[start:end] * 2, b"", rng.choice(_TOKENS),
            rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)).to_bytes(4, rng.choice(("little", "big"))),
        ))  # fmt: skip
        made[start:end] = piece
    if rng.random() < 0.1:
        del made[rng.randrange(len(made) + 1) :]
    return bytes(made)


# --------------------------------------------------------------------------------------------------------------- seeds


def _images() -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("png", "jpeg", "webp", "tiff", "gif", "bmp", "avif"):
        file = io.BytesIO()
        options: dict[str, Any] = {"exif": exif} if kind in ("png", "jpeg", "webp", "avif") else {}
        if kind in ("gif", "webp"):
            options |= {"save_all": True, "append_images": [image.rotate(90)], "duration": 40}
        image.save(file, kind, **options)
        yield f"a.{kind}", file.getvalue()


def _clip(container: str, video: str | None, audio: str | None, frames: int = 5, **codec: str) -> bytes:
    """A moving pattern with a tone, of 0.2 seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        shown = out.add_stream(video, rate=25, width=64, height=64, options=codec) if video else None
        heard = out.add_stream(audio, rate=48_000, layout="mono") if audio else None
        for number in range(frames if shown else 0):
            pixels = np.roll(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3), 3 * number, 1)
            out.mux(shown.encode(av.VideoFrame.from_ndarray(pixels)))
        if shown:
            out.mux(shown.encode())
        if heard:
            tone = 0.3 * np.sin(np.arange(48_000 * frames // 25) * 0.05)
            frame = av.AudioFrame.from_ndarray((tone * 32767).astype("<i2")[None], format="s16", layout="mono")
            frame.sample_rate = 48_000
            convert = av.AudioResampler(heard.format.name, "mono", 48_000, heard.frame_size or None)
            for part in [*convert.resample(frame), *convert.resample(None)]:
                out.mux(heard.encode(part))
            out.mux(heard.encode())
    return file.getvalue()


def _motion(folder: Path) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    kept = Coefficients(rng.normal(size=(6, 64)), rng.normal(size=(6, 6)), np.zeros(80))
    kept.save(folder / "a.npz")
    save_live_link(folder / "a.csv", kept, rng.uniform(size=(6, 52)))
    for name in ("a.npz", "a.csv"):
        yield name, (folder / name).read_bytes()
        (folder / name).unlink()


def _mutate_npz(data: bytes, rng: random.Random) -> bytes:
    """Mutate a file inside of the archive, whose check sums then fit."""
    if rng.random() < 0.5:
        return mutate(data, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            # mostly in the header, where shape and type stand
            head = rng.choice((128, 128, len(content)))
            new.writestr(name, mutate(content[:head], rng) + content[head:] if name == chosen else content)
    return made.getvalue()


# ------------------------------------------------------------------------------------------------------------- readers


@dataclass(frozen=True)
class Kind:
    """A kind of input: what reads a file, small files, and how they are damaged."""

    read: Callable[[Path], object]
    seeds: dict[str, bytes]
    damage: Callable[[bytes, random.Random], bytes] = mutate


def _read_jobs(path: Path) -> None:
    jobs, problems = read_table(path, path.parent, AnimateArguments())
    check_jobs(jobs, problems)
    problems.stop()


def _read_weights(path: Path) -> None:
    """Weights with a hash that fits, as a folder that somebody else made would have."""
    entry = {"sha256": weights.sha256(path), "stage": "face-model"}
    manifest = path.with_name(weights.MANIFEST)
    manifest.write_text(json.dumps({path.name: entry}))
    try:
        weights.read_tensors(path)
        load_face_model(path.parent)
    finally:
        manifest.unlink()


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file but those that only a server reads."""
    face = load_face_model()
    manifest = json.dumps({"face_model.safetensors": {"sha256": "0" * 64, "stage": "face-model", "config": {"a": 1}}})
    sounds = {"a.wav": ("wav", "pcm_s16le"), "a.ogg": ("ogg", "libopus"), "a.mp3": ("mp3", "libmp3lame")}
    sounds |= {"a.flac": ("flac", "flac"), "a.m4a": ("mp4", "aac")}
    clips = {"a.mp4": ("mp4", "libx264", "aac"), "a.webm": ("webm", "libvpx-vp9", "libopus")}
    clips |= {"a.avi": ("avi", "mpeg4", None)}
    motion = dict(_motion(folder))
    table = b"portrait,speech,emotion,seed,full,output\na.png,a.wav,happy:0.7+sad,3,yes,x.mp4\n*.png,*.wav,sad,,,\n"
    return {
        "image": Kind(lambda path: (probe(path), read_image(path)), dict(_images())),
        "sound": Kind(
            lambda path: [0 for _ in stream(scan(path))], {n: _clip(c, None, a) for n, (c, a) in sounds.items()}
        ),
        "clip": Kind(
            lambda path: (probe(path), [0 for _ in read_video(path)]),
            {n: _clip(*given) for n, given in clips.items()}
            | {"fields.mkv": _clip("matroska", "libx264", None, **{"x264-params": "tff=1"})},
        ),
        "marks": Kind(provenance.verify, {"a.mp4": _clip("mp4", "libx264", None), "a.png": dict(_images())["a.png"]}),
        "motion": Kind(lambda path: load_motion(path, face).at(30), {"a.npz": motion["a.npz"]}, _mutate_npz),
        "blendshapes": Kind(lambda path: load_motion(path, face).at(30), {"a.csv": motion["a.csv"]}),
        "track": Kind(
            EmotionTrack.load,
            {
                "a.csv": b"time,emotion,intensity\n0,happy,1\n1.5,sad+angry:2,0.5\n",
                "a.srt": b"1\n00:00:00,000 --> 00:00:02,000\n[sad:0.5] It rained.\n\n",
                "a.txt": b"0:00 [neutral] Good evening.\n0:03.5 [happy+surprised:1.2] And\n",
            },
        ),
        "weights": Kind(
            _read_weights,
            {"face_model.safetensors": save_tensors({"mean": torch.zeros(2, 3), "a.scale": torch.ones(2)})},
        ),
        "manifest": Kind(lambda path: weights.load("face_model", path.parent), {weights.MANIFEST: manifest.encode()}),
        "config": Kind(
            lambda path: [load_yaml(module.Config, path) for module in (expflow, vqig)],
            {"a.yaml": b"loop:\n  steps: 10\n  betas: [0.9, 0.99]\n  lr: 1e-4\n  decay: cosine\nshards: [a, b]\n"},
        ),
        "jobs": Kind(
            _read_jobs,
            {"a.csv": table, "a.jsonl": b'{"portrait": "a.png", "speech": "a.wav", "seed": 3, "intensity": 1.5}\n'},
        ),
        "split": Kind(
            lambda path: load_split(str(path), None), {"a.csv": b"clip,emotion,voiced\na.mp4,happy,yes\nb.mp4,sad,no\n"}
        ),
    }


def requests(client: Any) -> Kind:
    """Bodies of requests to a server; the file's first line is the path, the second the type."""
    line = "--x\r\nContent-Disposition: form-data; name="
    form = "".join(
        f'{line}"{name}"\r\n\r\n{value}\r\n' for name, value in {"consent": "true", "emotion": "sad"}.items()
    )
    form += f'{line}"portrait"; filename="a.png"\r\n\r\n'
    kind = b"multipart/form-data; boundary=x"
    bodies = {
        f"form{number}": b"\n".join((path, kind, form.encode() + dict(_images())["a.png"] + b"\r\n--x--\r\n"))
        for number, path in enumerate((b"/v1/videos", b"/v1/portraits", b"/v1/speech", b"/v1/verify"))
    }
    track = [{"time": 0, "emotion": "happy"}, {"time": 1, "emotion": "sad", "intensity": 0.5}]
    order = {"portrait_id": "portrait_0", "speech_id": "speech_0", "consent": True, "emotion_track": track, "seed": 7}
    talk = {"source_url": "http://a/b.png", "script": {"type": "audio", "audio_url": "http://a/b.wav"}}
    json_bodies = {"/v1/videos": order, "/v1/speech": {"text": "Hello"}, "/talks": talk}
    json_bodies["/v1/live/offer"] = {"sdp": "v=0", "type": "offer"}
    for number, (path, body) in enumerate(json_bodies.items()):
        bodies[f"json{number}"] = f"{path}\napplication/json\n{json.dumps(body)}".encode()

    def send(path: Path) -> None:
        where, kind, body = path.read_bytes().split(b"\n", 2)
        assets = client.app.state.server.store.folder / "assets"
        before = set(assets.glob("*"))
        answer = client.post(where.decode(), content=body, headers={"content-type": kind})
        assert answer.status_code < 500 or answer.status_code == 503, f"{answer.status_code} {answer.text[:200]}"
        left = {one.name for one in set(assets.glob("*")) - before}
        if answer.status_code == 201:
            left -= {answer.json()["id"]}
            assert client.delete(f"{where.decode()}/{answer.json()['id']}").status_code == 204
        assert not left, f"left {left}"

    def damage(data: bytes, rng: random.Random) -> bytes:
        where, kind, body = data.split(b"\n", 2)
        return b"\n".join((where, kind, mutate(body, rng)))

    return Kind(send, bodies, damage)


# ----------------------------------------------------------------------------------------------------------------- run


@dataclass
class Found:
    """What a run found: the number of inputs of each kind, and failures by kind, error and place."""

    inputs: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    failures: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "")


class Hang(BaseException):
    """Nothing that handles errors handles this."""


def _alarm(number: int, frame: object) -> None:
    raise Hang(f"more than {SLOWEST} s")


def try_input(kind: Kind, path: Path) -> str | None:
    """Read a file; what was wrong with how it was read, or None. A refusal raises the UserError."""
    before = set(path.parent.iterdir())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.dump_traceback_later(2 * SLOWEST, exit=True, file=sys.__stderr__)  # where no signal is heard
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SLOWEST)
    try:
        kind.read(path)
    except UserError:
        raise
    except (Exception, Hang) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} said {str(error)[:300]}"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held > LARGEST:
        return "more than 2 GiB of memory"
    left = set(path.parent.iterdir()) - before
    return f"left {', '.join(sorted(one.name for one in left))}" if left else None


def fuzz(folder: Path, kinds: dict[str, Kind], *, seed: int, inputs: int | None = None, seconds: float = 1e9) -> Found:
    """Try mutated files until there were enough, each kind in turn.

    Arguments:
        folder: an empty folder; a file that crashes the process or hangs stays there.
        kinds: what to read.
        seed: of the mutations.
        inputs: number of files; None for as many as the seconds allow.
    """
    rng, found = random.Random(seed), Found()
    began = time.monotonic()
    while sum(found.inputs.values()) < (inputs or 1 << 60):
        for name, kind in kinds.items():
            if time.monotonic() - began > seconds:
                return found
            seed_name = rng.choice([*kind.seeds])
            data = kind.damage(kind.seeds[seed_name], rng)
            path = folder / seed_name
            path.write_bytes(data)
            started = time.monotonic()
            try:
                problem = try_input(kind, path)
            except UserError:
                problem = None
                found.refused += 1
            found.slowest = max(found.slowest, (time.monotonic() - started, f"{name}/{seed_name}"))
            found.inputs[name] += 1
            path.unlink(missing_ok=True)
            if problem is not None:
                place = f"{name}/{seed_name}: {problem}"
                found.failures.setdefault(place.rpartition(" said ")[0] or place, (place, data))
    return found


def main() -> int:
    """Run from the command line; exit code 1 if something failed."""
    from tests.serve.conftest import here_client

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--save", type=Path, help="folder for the inputs that failed")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, here_client(Path(folder) / "data") as client:
        files = Path(folder) / "files"
        files.mkdir()
        chosen = {
            name: kind
            for name, kind in {**kinds(files), "http": requests(client)}.items()
            if not given.only or name in given.only
        }
        found = fuzz(files, chosen, seed=given.seed, inputs=given.inputs, seconds=given.seconds)
    total, spent = sum(found.inputs.values()), time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(
        f"seed {given.seed}: {total} inputs in {spent:.0f} s, {found.refused} refused, {len(found.failures)} failures"
    )
    print(f"slowest {found.slowest[0]:.1f} s ({found.slowest[1]}), peak memory {peak:.2f} GiB; {dict(found.inputs)}")
    for number, (problem, data) in enumerate(found.failures.values()):
        print(problem)
        if given.save:
            kind, _, name = problem.partition(":")[0].partition("/")
            target = given.save / kind / f"{number}_{name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
