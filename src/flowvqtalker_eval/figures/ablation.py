"""Fig. 7 of the paper: what each part of the image generator adds, in images and in numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.loading import build_generator, choose_device, fast_dtype, load_face_model, load_generator
from flowvqtalker.render.renderer import ImageGenerator
from flowvqtalker.render.vqig import ABLATION
from flowvqtalker.train import train
from flowvqtalker.train.config import load_yaml, to_dict
from flowvqtalker.train.vqig import Config, Data
from flowvqtalker_eval.figures import grid, style
from flowvqtalker_eval.metrics.reenactment import BASELINES, Pair, Reenactment, Scores
from flowvqtalker_eval.report import markdown, write
from flowvqtalker_eval.tables.pairs import named_paths

__all__ = ["EXTRA", "Ablation", "configuration", "load_variant", "make", "train_missing"]

logger = logging.getLogger(__name__)

_CONFIG = Path("configs/vqig-ablation.yaml")

#: Variants of ours beside the paper's: the whole generator with one thing changed, and their labels.
EXTRA = {"no-mesh": "+C, no mesh", "vgg19": "+C, VGG19", "mobilenet": "+C, MobileNet"}


def make(pairs: Sequence[Pair], methods: Mapping[str, str], *, zoom: bool = True, cell: float = 1.3) -> Figure:
    """A row for each pair: source, target, and the image of each method, with the mouth enlarged.

    Arguments:
        pairs: from :class:`flowvqtalker_eval.metrics.reenactment.Reenactment`.
        methods: keys of the pairs' images and their headings.
        zoom: enlarge the mouth (not of the source, whose mouth is elsewhere).
        cell: width of an image in inches.

    Raises:
        UserError: if there is no pair or a method is missing from one.
    """
    if not pairs:
        raise UserError("there is no pair of images to draw; --rows must be at least 1")
    missing = [name for name in methods if any(name not in pair.images for pair in pairs)]
    if missing:
        raise UserError(f"no image by {', '.join(missing)}; the methods are {', '.join(pairs[0].images)}")
    rows = {pair.name: [pair.source, pair.target, *(pair.images[name] for name in methods)] for pair in pairs}
    boxes = {pair.name: [[], *([[pair.boxes["mouth"]] if zoom else []] * (1 + len(methods)))] for pair in pairs}
    columns = ["Source", "Target", *methods.values()]
    return grid.make(rows, columns=columns, zoom=boxes, labels=False, cell=cell, inset=0.36)


# ------------------------------------------------------------------------------------------------------------ variants


def configuration(base: Config, variant: str) -> Config:
    """The training configuration (:class:`flowvqtalker.train.vqig.Config`) of a variant.

    Arguments:
        base: the configuration that all variants share, of the default generator or of the paper's.
        variant: a key of :data:`flowvqtalker.render.vqig.ABLATION` or of :data:`EXTRA`.

    Raises:
        UserError: if there is no such variant of that generator.
    """
    parts = "C" if variant in EXTRA else variant
    if base.region is not None and variant == "no-mesh":
        raise UserError("the default generator needs the mesh; omit no-mesh, or give --config of the paper's generator")
    if base.region is not None:
        base = replace(base, region=replace(base.region, model=base.region.model.ablated(parts)))
    model = base.model.ablated(parts)
    if variant == "no-mesh":
        model = replace(model, warp=replace(model.warp, prior="none"))
    elif variant in EXTRA:
        base = replace(base, perceptual="vgg19" if variant == "vgg19" else "mobilenet")
    return replace(base, model=model)


def train_missing(base: Config, variants: Sequence[str], folder: Path) -> None:
    """Train the variants that are not fully trained yet, one after the other, into ``folder/VARIANT``.

    An interrupted run resumes; a complete one is left alone.

    Raises:
        UserError: if a run used another configuration, or stopped before its last step.
    """
    configs = {variant: configuration(base, variant) for variant in variants}
    for variant, config in configs.items():
        kept = folder / variant / "config.yaml"
        if kept.is_file():
            theirs, ours = to_dict(load_yaml(Config, kept)), to_dict(config)
            differing = sorted(key for key in ours if ours[key] != theirs[key])
            if differing:
                raise UserError(
                    f"{folder / variant} was trained with another configuration ({', '.join(differing)}); "
                    "choose another --runs, or remove it"
                )
    for variant, config in configs.items():
        if _steps(folder / variant) >= config.loop.steps:
            logger.info("variant %s is already trained", variant)
            continue
        logger.info("training variant %s into %s", variant, folder / variant)
        result = train("vqig", config, folder / variant, resume=True)
        if result["step"] < config.loop.steps:
            raise UserError(
                f"variant {variant} stopped at step {result['step']:.0f} of {config.loop.steps}; "
                "run the same command again to resume"
            )


def _steps(run: Path) -> int:
    """Steps behind the exported weights of a run; 0 if there are none."""
    file = run / "weights.safetensors"
    return int(_about(file).get("step", 0)) if file.is_file() else 0


def _about(weights: Path) -> dict[str, Any]:
    """The JSON exported beside weights (stage, step, config); empty if there is none."""
    for file in (weights.with_suffix(".json"), weights.with_name("config.json")):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(f"{file} is not valid JSON ({error}); export the weights again") from error
    return {}


def load_variant(path: str | Path, weights_folder: str | Path | None = None) -> ImageGenerator:
    """An image generator from a run's folder, an exported safetensors file with its JSON, or a folder of weights.

    A run does not hold E_h, C and D_h. They are those it was trained on (``data.codebook`` in its ``config.yaml``), or
    else the ones of ``weights_folder`` (None: of the package).

    Raises:
        UserError: if the file is missing, is of another stage, or does not fit its configuration.
    """
    path = Path(path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return load_generator(path)
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"weights {file} do not exist; give a run's folder or a safetensors file of stage vqig")
    about = _about(file)
    if about.get("stage") != "vqig" or not isinstance(about.get("config"), dict):
        raise UserError(
            f"the JSON beside {file} must name stage vqig, got {about.get('stage', 'none')}; "
            "keep the config.json of its run with it"
        )
    data = _run_data(file.parent)
    own = None if data is None or not data.codebook.is_file() else _tensors(data.codebook)
    codebook = own or weights.load("codebook", weights_folder)[0]
    try:
        model = build_generator(about["config"])
        model.load_state_dict({**{f"autoencoder.{key}": value for key, value in codebook.items()}, **_tensors(file)})
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        problem = str(error).splitlines()[-1].strip()
        raise UserError(f"{file} does not fit its configuration or codebook ({problem}); export it again") from error
    return model.eval()


def _run_data(run: Path) -> Data | None:
    """The data section of a run's configuration; None if the run has none."""
    file = run / "config.yaml"
    return load_yaml(Config, file).data if file.is_file() else None


def _tensors(file: Path) -> dict[str, Any]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


# ------------------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Figure 7: the image generator's variants B, +W, +φ, +M, +C on held-out clips; images (PNG, PDF) and numbers
    (Markdown, csv, json)."""

    shard: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARD")]
    """Folder of a shard with images (`flowvqtalker prepare`); its held-out people are used."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("ablation.png")
    """Figure to write (.png or .pdf; both are written); the tables lie beside it."""
    variant: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=WEIGHTS")] = ()
    """Label and weights (a run's folder or a safetensors file) of a generator; repeat it. Default: the five variants
    in --runs."""
    extra: tuple[Literal["no-mesh", "vgg19", "mobilenet"], ...] = ()
    """Variants beyond the paper's five: W without the flow of the face mesh, and the perceptual loss on VGG19 or
    MobileNet."""
    runs: Path = Path("runs/ablation")
    """Where the variants are, or are trained: B, W, phi, M, C, and those of --extra."""
    train: bool = False
    """Train what is missing in --runs first; an interrupted run resumes."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Training configuration of stage vqig that the variants share. Default: configs/vqig-ablation.yaml."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training steps of each variant instead of the configuration's."""
    limit: int = 60
    """Pairs to measure, spread evenly; 0 takes all."""
    rows: int = 4
    """Pairs to draw: from as many equal segments of the pairs, those whose target differs most from the source."""
    zoom: bool = True
    """Enlarge the mouth."""
    perceptual: Literal["mobilenet", "vgg19"] = "mobilenet"
    """Network of the perceptual distance."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with the face model and the codebook. Default: those of the package."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def run(self) -> None:
        """Train if asked to, measure, and write the figure and the tables."""
        style.check_figure(self.output)
        if self.rows < 1 or self.limit < 0:
            raise UserError(f"--rows must be at least 1 and --limit at least 0, got {self.rows} and {self.limit}")
        places, notes = self._places()
        device = choose_device(self.device)
        generators = {name: load_variant(path, self.weights) for name, path in places.items()}
        clash = set(generators) & set(BASELINES)
        if clash:
            raise UserError(f"--variant {min(clash)!r} is the name of a baseline; choose another label")
        face, dtype = load_face_model(self.weights), fast_dtype(device)
        pairs = Reenactment(self.shard, face, generators, limit=self.limit, device=device, dtype=dtype)
        scores = Scores(self.perceptual, device=device)
        shown: dict[int, Pair] = {}
        for i, pair in enumerate(tqdm(pairs, desc="ablation", unit="pair", disable=None, leave=False)):
            scores.add(pair)
            segment = i * self.rows // len(pairs)
            if segment not in shown or pair.change > shown[segment].change:
                shown[segment] = pair
        title = f"Ablation of the image generator, {len(pairs)} pairs of {pairs.people} held-out people"
        table = scores.table(title, notes)
        figure = make(list(shown.values()), {name: name for name in generators}, zoom=self.zoom)
        files = [*style.save(figure, self.output), *write(table, self.output.with_suffix(""))]
        print(markdown(table))
        print(", ".join(map(str, files)))

    def _places(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """Label and weights of every generator to measure, and notes about their training."""
        given = named_paths(self.variant, "--variant")
        if given:
            if self.train or self.extra:
                raise UserError("--train and --extra are about the variants in --runs; omit them or --variant")
            return given, ()
        wanted = dict(ABLATION)
        wanted.update((name, EXTRA[name]) for name in self.extra)
        if self.train:
            train_missing(self._training(), list(wanted), self.runs)
        steps = {variant: _steps(self.runs / variant) for variant in wanted}
        missing = [variant for variant, count in steps.items() if not count]
        if missing:
            raise UserError(
                f"{self.runs} has no weights of {', '.join(missing)}; add --train, or give --variant NAME=WEIGHTS"
            )
        if len(set(steps.values())) > 1:
            logger.warning("the variants were trained for different numbers of steps: %s", steps)
        count = ", ".join(map(str, sorted(set(steps.values()))))
        note = f"each variant trained for {count} steps{_start_of(self.runs / next(iter(ABLATION)))}"
        return {label: self.runs / variant for variant, label in wanted.items()}, (note,)

    def _training(self) -> Config:
        """The configuration that the variants share."""
        file = self.config or _CONFIG
        if not file.is_file():
            raise UserError(f"configuration {file} does not exist; give --config FILE of stage vqig")
        base = load_yaml(Config, file)
        base = replace(base, data=replace(base.data, shard=self.shard))
        return base if self.steps is None else replace(base, loop=replace(base.loop, steps=self.steps))


def _start_of(run: Path) -> str:
    """Which weights a run started from."""
    data = _run_data(run)
    if data is None:
        return ""
    return " from scratch" if data.start is None else f", starting from the matching parts of {data.start.name}"
