"""The paper's figure 7: what each part of the image generator adds, in pictures and in numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flowvqtalker.errors import UserError
from flowvqtalker_eval.figures import grid, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowvqtalker.render.vqig import VQIG
    from flowvqtalker_eval.metrics.reenactment import Pair

__all__ = ["EXTRA", "Ablation", "configuration", "load_variant", "make", "train_missing"]

logger = logging.getLogger(__name__)

_CONFIG = Path("configs/vqig-ablation.yaml")

#: Variants of ours beside the paper's: the whole generator with one thing changed, and their labels.
EXTRA = {"no-mesh": "+C, no mesh", "frozen": "+C, frozen D_h", "vgg19": "+C, VGG19", "mobilenet": "+C, MobileNet"}


def make(pairs: Sequence[Pair], methods: Mapping[str, str], *, zoom: bool = True, cell: float = 1.3) -> Figure:
    """A row for each pair: source, target, and each method's picture, with the mouth enlarged.

    Arguments:
        pairs: from :class:`flowvqtalker_eval.metrics.reenactment.Reenactment`.
        methods: keys of the pairs' images and their headings.
        zoom: whether the mouth is enlarged (not in the source, where it is elsewhere).
        cell: width of a picture in inches.

    Raises:
        UserError: if there is no pair or a method is missing from one.
    """
    if not pairs:
        raise UserError("there is no pair of pictures to draw; --rows must be at least 1")
    missing = [name for name in methods if any(name not in pair.images for pair in pairs)]
    if missing:
        raise UserError(f"no picture by {', '.join(missing)}; the methods are {', '.join(pairs[0].images)}")
    rows = {pair.name: [pair.source, pair.target, *(pair.images[name] for name in methods)] for pair in pairs}
    boxes = {pair.name: [[], *([[pair.boxes["mouth"]] if zoom else []] * (1 + len(methods)))] for pair in pairs}
    return grid.make(
        rows, columns=["Source", "Target", *methods.values()], zoom=boxes, labels=False, cell=cell, inset=0.36
    )


def configuration(base: Any, variant: str, *, residual: bool = False) -> Any:
    """The training configuration (:class:`flowvqtalker.train.vqig.Config`) of a variant of fig. 7.

    Arguments:
        base: the configuration that all variants share.
        variant: a key of :data:`flowvqtalker.render.vqig.ABLATION` or of :data:`EXTRA`.
        residual: let D_h draw what is added to I_w, in its window, as the default weights do. The paper's D_h draws
            the whole picture, and only so is it seen what the parts add.
    """
    model = base.model.ablated("C" if variant in EXTRA else variant)
    model = replace(model, residual=residual, window=model.window if residual else None)
    if variant == "no-mesh":
        model = replace(model, warp=replace(model.warp, prior="none"), openings=False)
    elif variant == "frozen":
        model = replace(model, tune_decoder=False)
    elif variant in EXTRA:
        base = replace(base, perceptual=variant)
    return replace(base, model=model)


def train_missing(base: Any, variants: Sequence[str], folder: Path, *, residual: bool = False) -> dict[str, Path]:
    """Train the variants that are not trained to the last step yet, one after the other, into ``folder/VARIANT``.

    A run that was interrupted goes on where it was; one that is complete is left alone.

    Returns:
        the run's folder of each variant.

    Raises:
        UserError: if a run was trained otherwise than it would be now, or stopped before its last step.
    """
    from flowvqtalker.train import train
    from flowvqtalker.train.config import load_yaml, to_dict
    from flowvqtalker.train.vqig import Config

    configs = {variant: configuration(base, variant, residual=residual) for variant in variants}
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
            logger.info("variant %s is trained already", variant)
            continue
        logger.info("training variant %s into %s", variant, folder / variant)
        result = train("vqig", config, folder / variant, resume=True)
        if result["step"] < config.loop.steps:
            raise UserError(
                f"variant {variant} stopped at step {result['step']:.0f} of {config.loop.steps}; "
                "give the same command again to go on"
            )
    return {variant: folder / variant for variant in variants}


def _steps(run: Path) -> int:
    """Steps behind the exported weights of a run; 0 where there are none."""
    return int(_about(run).get("step", 0)) if (run / "weights.safetensors").is_file() else 0


def _about(place: Path) -> dict[str, Any]:
    """What was exported beside weights: stage, step, config; empty where there is nothing."""
    beside = [place / "config.json"] if place.is_dir() else [place.with_suffix(".json"), place.with_name("config.json")]
    for file in beside:
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} is no valid JSON ({error}); export the weights again") from error
            return dict(found) if isinstance(found, dict) else {}
    return {}


def load_variant(path: str | Path, weights_folder: str | Path | None = None) -> VQIG:
    """An image generator from a run's folder, an exported safetensors file with its JSON, or a folder of weights.

    E_h, C and D_h, which a run does not hold, are those that the run was trained on (``data.codebook`` in its
    ``config.yaml``), or else the ones of ``weights_folder`` (the package's own where it is left out).

    Raises:
        UserError: if the file is missing, is of another stage, or does not fit its configuration.
    """
    from flowvqtalker import weights
    from flowvqtalker.loading import load_generator
    from flowvqtalker.render.vqig import VQIG, VQIGConfig

    path = Path(path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return load_generator(path)
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"weights {file} do not exist; give a run's folder or a safetensors file of stage vqig")
    about = _about(path)
    if about.get("stage") != "vqig" or not isinstance(about.get("config"), dict):
        raise UserError(
            f"{file} has no JSON beside it that says that it is of stage vqig, but {about.get('stage', 'nothing')}; "
            "keep the config.json of its run with it"
        )
    try:
        model = VQIG(VQIGConfig.from_dict(about["config"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the configuration beside {file} cannot be used ({error}); export the weights again"
        ) from error
    book = _codebook_of(path if path.is_dir() else path.parent)
    codebook = weights.load("codebook", weights_folder)[0] if book is None else _tensors(book)
    frozen = {f"autoencoder.{key}": value for key, value in codebook.items()}
    own, given = model.state_dict(), {**frozen, **_tensors(file)}
    wrong = [key for key in {*own, *given} if key not in own or key not in given or own[key].shape != given[key].shape]
    if wrong:
        raise UserError(f"{file} does not fit its configuration or its codebook in {len(wrong)} tensors ({min(wrong)})")
    model.load_state_dict(given)
    return model.eval()


def _codebook_of(run: Path) -> Path | None:
    """The codebook that a run was trained on, if it is still there."""
    from flowvqtalker.train.config import load_yaml
    from flowvqtalker.train.vqig import Config

    if not (run / "config.yaml").is_file():
        return None
    file = load_yaml(Config, run / "config.yaml").data.codebook
    return file if file.is_file() else None


def _tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Figure 7: the image generator's variants B, +W, +φ, +M, +C on held-out clips; pictures (PNG, PDF) and numbers
    (Markdown, csv, json)."""

    shard: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARD")]
    """Folder of a shard with pictures (`flowvqtalker prepare`); its held-out people are used."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("ablation.png")
    """Figure to write (.png or .pdf; both are written); the tables lie beside it."""
    variant: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=WEIGHTS")] = ()
    """Label and weights (a run's folder or a safetensors file) of a generator; repeat it. Default: the five variants
    in --runs."""
    extra: tuple[Literal["no-mesh", "frozen", "vgg19", "mobilenet"], ...] = ()
    """Variants beyond the paper's five: W without the flow of the face mesh, D_h frozen, and the perceptual loss on
    VGG19 or MobileNet."""
    runs: Path = Path("runs/ablation")
    """Where the variants are, or are trained: B, W, phi, M, C, and those of --extra."""
    train: bool = False
    """Train what is missing in --runs first; an interrupted run goes on."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Training configuration of stage vqig that the variants share. Default: configs/vqig-ablation.yaml."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training steps of each variant instead of the configuration's."""
    residual: bool = False
    """Train variants whose D_h draws what is added to the warped picture, as that of the default weights does, instead
    of the whole picture."""
    limit: int = 60
    """Pairs to measure, spread evenly; 0 takes all."""
    rows: int = 4
    """Pairs to draw: of as many equal stretches of the pairs those whose target differs most from the source."""
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
        from tqdm import tqdm

        from flowvqtalker.loading import choose_device, fast_dtype, load_face_model
        from flowvqtalker_eval.metrics.reenactment import BASELINES, Reenactment, Scores
        from flowvqtalker_eval.report import markdown, write

        style.check_figure(self.output)
        if self.rows < 1 or self.limit < 0:
            raise UserError(f"--rows must be at least 1 and --limit at least 0, got {self.rows} and {self.limit}")
        places, notes = self._places()
        device = choose_device(self.device)
        generators = {name: load_variant(path, self.weights) for name, path in places.items()}
        clash = set(generators) & set(BASELINES)
        if clash:
            raise UserError(f"--variant {min(clash)!r} is the name of a baseline; choose another label")
        pairs = Reenactment(self.shard, load_face_model(self.weights), generators, limit=self.limit, device=device,
                            dtype=fast_dtype(device))  # fmt: skip
        scores = Scores(self.perceptual, device=device)
        shown: dict[int, Pair] = {}
        for i, pair in enumerate(tqdm(pairs, desc="ablation", unit="pair", disable=None, leave=False)):
            scores.add(pair)
            stretch = i * self.rows // len(pairs)
            if stretch not in shown or pair.change > shown[stretch].change:
                shown[stretch] = pair
        title = f"Ablation of the image generator, {len(pairs)} pairs of {pairs.people} held-out people"
        table = scores.table(title, notes)
        files = [
            *style.save(make(list(shown.values()), {name: name for name in generators}, zoom=self.zoom), self.output)
        ]
        files += write(table, self.output.with_suffix(""))
        print(markdown(table))
        print(", ".join(map(str, files)))

    def _places(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """Label and weights of every generator to measure, and what is to be said about their training."""
        from flowvqtalker.render.vqig import ABLATION

        given = style.named_paths(self.variant, "--variant")
        if given:
            if self.train or self.extra:
                raise UserError("--train and --extra are about the variants in --runs; leave them or --variant out")
            return given, ()
        wanted = dict(ABLATION)
        wanted.update((name, EXTRA[name]) for name in self.extra)
        if self.train:
            train_missing(self._training(), list(wanted), self.runs, residual=self.residual)
        missing = [variant for variant in wanted if not _steps(self.runs / variant)]
        if missing:
            raise UserError(
                f"{self.runs} has no weights of {', '.join(missing)}; add --train, or give --variant NAME=WEIGHTS"
            )
        steps = {variant: _steps(self.runs / variant) for variant in wanted}
        if len(set(steps.values())) > 1:
            logger.warning("the variants differ in their training: steps %s", steps)
        count = ", ".join(str(n) for n in sorted(set(steps.values())))
        return (
            {label: self.runs / variant for variant, label in wanted.items()},
            (f"each variant trained for {count} steps{_beginning(self.runs / next(iter(ABLATION)))}",),
        )

    def _training(self) -> Any:
        """The configuration that the variants share."""
        from flowvqtalker.train.config import load_yaml
        from flowvqtalker.train.vqig import Config

        file = self.config or _CONFIG
        if not file.is_file():
            raise UserError(f"configuration {file} does not exist; give --config FILE of stage vqig")
        base = load_yaml(Config, file)
        base = replace(base, data=replace(base.data, shard=self.shard))
        return base if self.steps is None else replace(base, loop=replace(base.loop, steps=self.steps))


def _beginning(run: Path) -> str:
    """From what a run began, as its configuration tells."""
    from flowvqtalker.train.config import load_yaml
    from flowvqtalker.train.vqig import Config

    if not (run / "config.yaml").is_file():
        return ""
    start = load_yaml(Config, run / "config.yaml").data.start
    return " from scratch" if start is None else f", beginning with {start.name} as far as it has the same parts"
