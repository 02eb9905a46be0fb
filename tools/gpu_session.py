"""Train the codebook and the image generator on a borrowed GPU: pack the data here, train there, bring weights back.

    python tools/gpu_session.py pack data/shards data/shards-mouths -o session.tar.gz --limit-mib 60
    python tools/gpu_session.py train session.tar.gz --minutes 9 -o results    # there

The archive holds a shard of few images, blurred outside the region of interest, the face model, and the weights of the
perceptual loss. Training needs neither PyAV nor MediaPipe. The number of steps is chosen so that both stages end in
time: a few steps of each are measured first. The same command goes on with an interrupted session.

With `pack --start FOLDER` the archive holds the weights of both stages too, and `train` goes on from them at the image
level, with configs/gpu/vqig-image-level.yaml: the codebook stays as it is.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro

from flowvqtalker.data.gaps import EYES_SHUT, LIPS_OPEN, eye_gap, lip_gap
from flowvqtalker.data.shards import Clip, Shard, ShardWriter
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE
from flowvqtalker.render.perceptual import find_weights
from flowvqtalker.render.region_vqvae import RegionCodebookConfig
from flowvqtalker.train import codebook as codebook_stage
from flowvqtalker.train import train
from flowvqtalker.train import vqig as vqig_stage
from flowvqtalker.train.config import load_yaml

logger = logging.getLogger("gpu_session")

ROOT = Path(__file__).resolve().parents[1]
#: Names inside the archive.
SHARD, FACE, PERCEPTUAL = "shard", "face_model.safetensors", "mobilenet_v2-b0353104.pth"
BOOK, START = "codebook.safetensors", "vqig.safetensors"
#: Share of the time that the codebook gets; the image generator gets the rest.
CODEBOOK_SHARE = 0.37
#: Share of the time for which steps are planned.
_RESERVE = 0.95
#: Pixels around the region of interest that stay sharp, and over how many more the blur sets in.
MARGIN, RAMP = 40, 24


@dataclass(frozen=True)
class Images:
    """The images of one clip that could be packed.

    Attributes:
        shard, clip: where they are.
        numbers: (n,) numbers of the images in the shard.
        data: their WebPs.
        plain: a lone image with shut lips and open eyes, of which there are always enough.
    """

    shard: Shard
    clip: int
    numbers: np.ndarray[Any, Any]
    data: list[bytes]
    plain: bool

    def at_most(self, most: int) -> Images:
        """At most so many of the images, evenly spread."""
        places = spread(np.arange(len(self.numbers)), most)
        return replace(self, numbers=self.numbers[places], data=[self.data[i] for i in places])


@dataclass(frozen=True)
class Pack:
    """Write an archive of at most a given size."""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SHARD")]
    """Shards of `flowvqtalker prepare`; a folder of mouths is prepared as any folder of images."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("session.tar.gz")
    """Archive to write."""
    limit_mib: float = 60.0
    """Largest size of the archive."""
    per_clip: int = 16
    """Images taken of a clip at most; fewer where the archive would grow too large."""
    min_native: float = 195.0
    """Leave out images whose crop had fewer pixels a side in the original."""
    max_residual: float = 0.06
    """Leave out frames that the face model fits worse, in eye distances."""
    quality: int = 84
    """Quality of the WebPs."""
    hold_out: tuple[str, ...] = ()
    """Identities to validate on, beside those of the validation split."""
    face_model: Path = ROOT / "src" / "flowvqtalker" / "weights" / FACE
    """Face model with which the shards were made."""
    start: Path | None = None
    """Folder of weights from which the image generator goes on."""

    def run(self) -> None:
        """Write the archive."""
        if not self.face_model.is_file():
            raise UserError(f"{self.face_model} not found; name the shards' face model with --face-model")
        shards = [Shard(path) for path in self.shards]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            shutil.copyfile(self.face_model, folder / FACE)
            shutil.copyfile(find_weights("mobilenet"), folder / PERCEPTUAL)
            for name in (BOOK, START) if self.start is not None else ():
                if not (self.start / name).is_file():
                    raise UserError(f"{self.start} has no {name}; name a folder of weights with --start")
                shutil.copyfile(self.start / name, folder / name)
            room = self.limit_mib * 2**20 - sum(file.stat().st_size for file in folder.iterdir())
            clips = thin([item for shard in shards for item in self._images(shard)], room)
            with ShardWriter(folder / SHARD) as writer:
                for images in clips:
                    writer.add(self._clip(images))
            (folder / SHARD / "audio.npy").unlink()
            with tarfile.open(self.output, "w:gz") as archive:
                for file in sorted(folder.iterdir()):
                    archive.add(file, file.name)
        size = self.output.stat().st_size / 2**20
        count = sum(len(images.data) for images in clips)
        logger.info("%s: %d images of %d clips, %.1f MiB", self.output, count, len(clips), size)
        if size > self.limit_mib:
            raise UserError(f"{self.output} has {size:.1f} MiB; lower --per-clip or --quality, or allow more")

    def _images(self, shard: Shard) -> Iterator[Images]:
        """The images of each clip of a shard."""
        for clip in np.flatnonzero(shard.native >= self.min_native):
            numbers = shard.images_of(np.array([clip]))
            residual = np.asarray(shard.residual[shard.image_row[numbers]], np.float32)
            numbers = spread(numbers[~(residual > self.max_residual)], self.per_clip)
            if not len(numbers):
                continue
            landmarks = shard.landmarks(shard.image_row[numbers])
            telling = (lip_gap(landmarks) > LIPS_OPEN) | (eye_gap(landmarks) < EYES_SHUT)
            plain = len(numbers) == 1 and not telling.any() and shard.split[clip] == "train"
            yield Images(shard, int(clip), numbers, [self._encoded(shard.image(int(n))) for n in numbers], plain)

    def _encoded(self, image: np.ndarray[Any, Any]) -> bytes:
        """An image as WebP, blurred where no code will draw: a third of the bytes."""
        small = cv2.GaussianBlur(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), (0, 0), 0.7)
        low = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        mask = sharp_mask(RegionCodebookConfig().roi, image.shape[0])
        mixed = np.clip(image * mask + low * (1 - mask) + 0.5, 0, 255).astype(np.uint8)
        done, data = cv2.imencode(".webp", mixed[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, self.quality])
        if not done:
            raise UserError("this OpenCV cannot write WebP; install opencv-contrib-python")
        return bytes(data.tobytes())

    def _clip(self, images: Images) -> Clip:
        """The chosen frames as a clip of their own. Of the landmarks only lips and eyes are kept."""
        shard, clip, numbers = images.shard, images.clip, images.numbers
        rows = shard.image_row[numbers]
        landmarks = np.full((len(rows), 478, 3), np.nan, np.float32)
        kept = [*LIPS, *RIGHT_EYE, *LEFT_EYE]
        landmarks[:, kept, :2] = shard.landmarks(rows)[:, kept, :2]
        identity = str(shard.identity[clip])
        return Clip(
            name=str(shard.name[clip]), source=str(shard.source[clip]), identity=identity,
            split="val" if identity in self.hold_out else str(shard.split[clip]),
            emotion=int(shard.emotion[clip]), speech=False, is_image=bool(shard.is_image[clip]),
            identity_shape=shard.identity_shape[clip], expression=shard.expression[rows], pose=shard.pose[rows],
            blendshapes=np.zeros((len(rows), 52), np.float32), landmarks=landmarks,
            residual=np.asarray(shard.residual[rows], np.float32), audio=None, crop=shard.crop[clip],
            valid=shard.valid[clip], native=float(shard.native[clip]), images=list(enumerate(images.data)),
        )  # fmt: skip


def spread(numbers: np.ndarray[Any, Any], most: int) -> np.ndarray[Any, Any]:
    """At most so many of the numbers, evenly spread."""
    places = np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)
    return np.asarray(numbers[places])


def sharp_mask(roi: tuple[int, int, int, int], side: int) -> np.ndarray[Any, Any]:
    """(side, side, 1): 1 on the region and its margin, falling to 0 beyond."""
    place = np.arange(side, dtype=np.float32) + 0.5
    top, left, height, width = roi
    rows, columns = (
        np.clip(np.minimum(place - (low - MARGIN), low + size + MARGIN - place) / RAMP + 1, 0, 1)
        for low, size in ((top, height), (left, width))
    )
    return np.asarray((rows[:, None] * columns)[..., None])


def thin(clips: list[Images], room: float) -> list[Images]:
    """Take fewer images of each clip, and fewer of the lone images with shut lips and open eyes, until all fit.

    Arguments:
        clips: what could be packed.
        room: bytes for it, of which 4 % and 1 kB an image are for all but the images themselves.
    """
    most = max((len(clip.data) for clip in clips), default=0)
    plain = [place for place, clip in enumerate(clips) if clip.plain]
    for level in range(11):
        kept = set(spread(np.array(plain, int), round(len(plain) * (1 - level / 10))).tolist())
        per_clip = max(2, round(most * (1 - level / 12)))
        chosen = [clip.at_most(per_clip) for place, clip in enumerate(clips) if not clip.plain or place in kept]
        if chosen and sum(1.04 * len(image) + 1024 for clip in chosen for image in clip.data) <= room:
            return chosen
    raise UserError("too many images even without plain ones; raise --limit-mib or --min-native, or lower --quality")


@dataclass(frozen=True)
class Train:
    """Train on an archive's data within a time limit; weights (float16 safetensors), configurations and logs go into
    OUTPUT/codebook and OUTPUT/vqig."""

    archive: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ARCHIVE")]
    """Archive of `pack`."""
    minutes: float = 9.0
    """Wall-clock limit of everything, validation and saving included."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = Path("results")
    """Folder of the results."""
    work: Path = Path("session")
    """Folder of the data and the runs. If it holds an interrupted session, that goes on."""
    codebook: Path = ROOT / "configs" / "gpu" / "codebook.yaml"
    """Configuration of stage codebook, with a region."""
    vqig: Path | None = None
    """Configuration of stage vqig, with a region. Default: vqig.yaml in configs/gpu, or vqig-image-level.yaml for an
    archive with weights."""
    measured_steps: int = 40
    """Steps of each kind that are measured to choose the number of steps; 0: take the configurations' numbers."""
    started: tyro.conf.Suppress[float] = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Train the codebook, then the image generator."""
        if not self.archive.is_file():
            raise UserError(f"archive {self.archive} does not exist; make it with `gpu_session.py pack`")
        data = self.work / "data"
        if not (data / SHARD / "index.npz").is_file():
            with tarfile.open(self.archive) as archive:
                archive.extractall(data, filter="data")
        begun = (data / START).is_file()
        default = ROOT / "configs" / "gpu" / ("vqig-image-level.yaml" if begun else "vqig.yaml")
        book = load_yaml(codebook_stage.Config, self.codebook)
        generator = load_yaml(vqig_stage.Config, self.vqig or default)
        if book.region is None or generator.region is None:
            raise UserError("both configurations need a region; take those in configs/gpu")
        region = replace(book.region, shard=data / SHARD)
        if not begun:
            weights = data / PERCEPTUAL if book.perceptual == "mobilenet" else None
            self._stage("codebook", replace(book, region=region, perceptual_weights=weights), CODEBOOK_SHARE)
        model = replace(generator.region.model, codebook=region.model)
        paths = replace(
            generator.data, shard=data / SHARD, face_model=data / FACE, start=data / START if begun else None,
            codebook=data / BOOK if begun else self.work / "codebook" / "weights.safetensors",
        )  # fmt: skip
        weights = data / PERCEPTUAL if generator.perceptual == "mobilenet" else None
        region_training = replace(generator.region, model=model)
        self._stage("vqig", replace(generator, data=paths, region=region_training, perceptual_weights=weights), 1.0)

    def _left(self) -> float:
        """Seconds until the limit."""
        return self.minutes * 60 - (time.monotonic() - self.started)

    def _stage(self, name: str, config: Any, share: float) -> None:
        """Train one stage, in a share of the seconds that are left."""
        run, end = self.work / name, self._left() * (1 - share)
        module = codebook_stage if name == "codebook" else vqig_stage
        around = 0.0
        if (run / "checkpoint.pt").is_file():  # its number of steps is settled
            config = load_yaml(module.Config, run / "config.yaml")
        elif self.measured_steps:
            per_step, around = self._measure(name, config)
            steps = max(1, int(_RESERVE * (self._left() - end - around) / per_step))
            logger.info("%s: %d steps of %.3f s, %.0f s around them", name, steps, per_step, around)
            loop = config.loop
            config = replace(config, loop=replace(loop, steps=steps, warmup=min(loop.warmup, steps // 10)))
        loop = replace(config.loop, minutes=max(1.0, self._left() - end - around) / 60)
        result = train(name, replace(config, loop=loop), run, resume=True)
        (self.output / name).mkdir(parents=True, exist_ok=True)
        for file in (*run.glob("*.safetensors"), *run.glob("*.json"), *run.glob("*.csv"), run / "config.yaml"):
            shutil.copyfile(file, self.output / name / file.name)
        logger.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in result.items()))
        if result["step"] < loop.steps:
            logger.warning("%s stopped at step %.0f of %d: out of time", name, result["step"], loop.steps)

    def _measure(self, name: str, config: Any) -> tuple[float, float]:
        """Mean seconds of a step over the run, and the seconds that starting, validating and saving take."""
        region, count = config.region, self.measured_steps
        if name == "codebook":
            late = 1 - region.adversarial_from
            kinds = [(1 - late, {"adversarial_from": 1.0, "quantise_from": 0.0}), (late, {"adversarial_from": 0.0})]
        else:
            late = 1 - region.image_from
            kinds = [(1 - late, {"image_from": 1.0, "adversarial_from": 1.0}),
                     (late, {"image_from": 0.0, "adversarial_from": 0.0})]  # fmt: skip
        loop = replace(config.loop, steps=2 * count, log_every=count, warmup=0, validate_every=0, minutes=0.0)
        mean = around = 0.0
        for part, changes in kinds:
            if not part:
                continue
            with tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                train(name, replace(config, region=replace(region, **changes), loop=loop), folder)
                rows = (Path(folder) / "log.csv").read_text(encoding="utf-8").splitlines()
                rates = [float(row.split(",")[rows[0].split(",").index("steps_per_s")]) for row in rows[1:]]
                around = time.monotonic() - begun - count / rates[0] - count / rates[1]
                mean += part / rates[1]
        return mean, around


def main() -> int:
    """Pack or train; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms %(message)s")
    command = tyro.extras.subcommand_cli_from_dict({"pack": Pack, "train": Train}, description=__doc__)
    try:
        command.run()
    except (UserError, MissingDependency) as error:
        print(f"gpu_session: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
