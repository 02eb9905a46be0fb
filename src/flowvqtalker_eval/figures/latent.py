"""Latents z = f(β) of real frames by emotion, of one or several flows side by side: the paper's figure 6.

Every frame is encoded as in training: given the true frames before it, its speech, its source and its own emotion. So
what is shown is where the flow puts each emotion's frames, not whether it could tell them apart; the second number
beside each map answers that, with the emotion hidden. Numbers (ours, the paper prints none):

* nearest mean: share of frames whose z is nearest to the mean μ of their own emotion;
* by likelihood: share of clips whose β is most likely under their own emotion, log p(β | c, e) over the nine e;
* silhouette: of z by emotion (Rousseeuw 1987), -1 to 1.
Shares are means over the emotions, so that each counts alike however many frames it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowvqtalker.data.shards import Shard
    from flowvqtalker.motion.flow import ExpFlow
    from flowvqtalker.train.sequences import MotionClip

__all__ = ["Latent", "Panel", "embed", "encode", "make", "nearest_mean", "pick_clips", "silhouette"]

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Method = Literal["pca", "tsne"]

_TITLES: dict[Method, str] = {"pca": "PCA", "tsne": "t-SNE"}
_KINDS = {"student": "SMM", "gaussian-mixture": "GMM", "gaussian": "Gaussian"}
_PERPLEXITY = 30.0
#: Frames of a clip that are encoded, from its start.
_LONGEST = 100


@dataclass(frozen=True)
class Panel:
    """One column of the figure.

    Attributes:
        name: of the flow.
        latents: (N, D).
        labels: (N,) emotion of each.
        scores: numbers to print above the maps, by their names.
    """

    name: str
    latents: Array
    labels: Labels
    scores: Mapping[str, float] = field(default_factory=dict)


def _learn() -> Any:
    try:
        import sklearn
    except ImportError as error:
        raise MissingDependency(
            "maps of latents need scikit-learn, which is not installed; run pip install 'flowvqtalker[eval]'"
        ) from error
    return sklearn


def embed(latents: Array, method: Method = "pca") -> Array:
    """Points (N, 2) of latents (N, D): their first two principal components, or t-SNE (perplexity 30, at most a third
    of the points; started from the components, so that the same latents give the same map)."""
    latents = np.asarray(latents, np.float64)
    if latents.ndim != 2 or len(latents) < 4 or not np.isfinite(latents).all():
        raise UserError(f"a map needs at least 4 finite latents (N, D), got an array of shape {latents.shape}")
    _learn()
    if method == "pca":
        from sklearn.decomposition import PCA

        points: Array = PCA(2, svd_solver="full").fit_transform(latents)
        return points
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(latents) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(latents)
    return points


def silhouette(latents: Array, labels: Labels) -> float:
    """Mean silhouette of latents (N, D) by label (N,), mean over the labels; NaN with a single label."""
    _learn()
    from sklearn.metrics import silhouette_samples

    if len(np.unique(labels)) < 2:
        return float("nan")
    return _by_class(silhouette_samples(latents, labels), labels)


def nearest_mean(latents: Array, labels: Labels, means: Array) -> float:
    """Share of latents (N, D) that lie nearest to the mean (C, D) of their own label, mean over the labels."""
    latents, means = np.asarray(latents, np.float64), np.asarray(means, np.float64)
    squared = ((latents[:, None] - means) ** 2).sum(-1)
    return _by_class((squared.argmin(1) == labels).astype(float), labels)


def _by_class(values: Array, labels: Labels) -> float:
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def make(panels: Sequence[Panel], methods: Sequence[Method] = ("tsne", "pca")) -> Figure:
    """A column for each panel, a row for each kind of map.

    Raises:
        UserError: if there is no panel or no kind of map.
    """
    if not panels or not methods:
        raise UserError("there is nothing to draw; give at least one flow and one of tsne, pca")
    maps = [[embed(one.latents, method) for one in panels] for method in methods]
    with style.look():
        figure, axes = style.subplots(len(methods), len(panels), 2.9, 2.7)
        for row, (method, points) in enumerate(zip(methods, maps, strict=True)):
            for column, (one, where) in enumerate(zip(panels, points, strict=True)):
                cell = axes[row, column]
                for label in np.unique(one.labels):
                    name, own = EMOTIONS[label], one.labels == label
                    cell.scatter(
                        *where[own].T,
                        s=6,
                        c=style.EMOTION_COLOURS[name],
                        marker=style.EMOTION_MARKERS[name],
                        linewidths=0,
                        alpha=0.7,
                        label=name,
                        rasterized=True,
                    )
                cell.set_xticks([])
                cell.set_yticks([])
                if column == 0:
                    cell.set_ylabel(_TITLES[method])
                if row == 0:
                    numbers = "\n".join(f"{key} {value:.2f}" for key, value in one.scores.items())
                    cell.set_title(f"{one.name}\n{numbers}" if numbers else one.name, fontsize=8)
        handles = {
            text: handle for cell in axes.flat for handle, text in zip(*cell.get_legend_handles_labels(), strict=True)
        }
        shown = [name for name in EMOTIONS if name in handles]
        figure.legend(
            [handles[name] for name in shown],
            shown,
            loc="outside lower center",
            ncols=min(len(shown), (3, 5, 9)[min(len(panels), 3) - 1]),
            markerscale=2,
        )
    return figure


# ------------------------------------------------------------------------------------------------------------ latents


def pick_clips(shard: Shard, split: str, count: int, shortest: int = 12, frontend: str = "mel") -> list[MotionClip]:
    """Up to ``count`` clips of every emotion of a split, spread over its people; their speech by a front end.

    Raises:
        UserError: if there is none.
    """
    from flowvqtalker.speech.features import log_mel
    from flowvqtalker.train.sequences import MotionClip

    numbers = shard.select(split, picture=False, min_length=shortest)
    clips = []
    for label in range(len(EMOTIONS)):
        people: dict[str, int] = {}
        order = []
        for number in numbers[shard.emotion[numbers] == label].tolist():
            person = str(shard.identity[number])
            people[person] = people.get(person, 0) + 1
            order.append((people[person], number))
        for _, number in sorted(order)[:count]:
            speech = bool(shard.speech[number] and shard.sound[number])
            rows = slice(shard.rows(number).start, min(shard.rows(number).stop, shard.rows(number).start + _LONGEST))
            mel = log_mel(shard.wave(number), frontend).astype(np.float16) if speech else None
            frames = np.array(shard.expression[rows], np.float32)
            clips.append(MotionClip(frames, mel, label, speech, str(shard.identity[number]), frontend=frontend))
    if not clips:
        raise UserError(f"{shard.path} has no clip with a known emotion in split {split!r}; choose train or val")
    return clips


def encode(flow: ExpFlow, clips: Sequence[MotionClip], frames: int = 150) -> tuple[Array, Labels, dict[str, float]]:
    """Latents of the clips' frames, and how well they tell the emotions apart.

    Arguments:
        flow: in eval mode.
        clips: of known emotions.
        frames: kept of each emotion at most, drawn evenly with a fixed seed.

    Returns:
        (N, D), their labels (N,), and the scores.
    """
    import dataclasses

    import torch

    from flowvqtalker.train.flow_stage import evaluating, whole_clips
    from flowvqtalker.train.sequences import Corpus, SequenceConfig, SequenceDataset

    corpus = Corpus(clips)
    data = SequenceDataset(corpus, SequenceConfig(), flow.audio.config, flow.config.history, plain=True)
    latents, labels, guesses, truth = [], [], [], []
    with evaluating(flow):
        for start in range(0, len(clips), 8):
            numbers = list(range(start, min(start + 8, len(clips))))
            longest = max(len(clips[n].frames) for n in numbers)
            audio_batch = whole_clips(corpus, numbers, data, longest)
            audio = flow.encode_speech(audio_batch.windows)
            batch = flow.residual(audio_batch, audio)
            targets = batch.frames[:, flow.config.history :][batch.mask]
            row = batch.mask.nonzero()[:, 0]
            likelihoods = []
            for label in range(flow.config.classes):
                told = dataclasses.replace(batch, emotion=torch.full((len(numbers),), label))
                context = flow.contexts(told, audio)
                z, logdet = flow.forward_and_logdet(targets, context)
                each = flow.latent.log_prob(z, context.emotion) + logdet
                likelihoods.append(torch.zeros(len(numbers)).index_add(0, row, each))
                for position, n in enumerate(numbers):
                    if clips[n].emotion == label:
                        latents.append(z[row == position].numpy())
                        labels.append(np.full(len(latents[-1]), label))
            guesses += torch.stack(likelihoods).argmax(0).tolist()
            truth += [clips[n].emotion for n in numbers]
    found, label_of = np.concatenate(latents), np.concatenate(labels).astype(np.int64)
    right = np.array(guesses) == np.array(truth)
    kept = np.sort(np.concatenate([_some(np.flatnonzero(label_of == label), frames) for label in np.unique(label_of)]))
    scores = {
        "nearest mean": nearest_mean(found, label_of, flow.latent.mean.detach().numpy()),
        "by likelihood": _by_class(right.astype(float), np.array(truth)),
        "silhouette": silhouette(found[kept], label_of[kept]),
    }
    return found[kept], label_of[kept], scores


def _some(rows: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    return np.random.default_rng(0).permutation(rows)[:count]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Figure 6: latents of real frames by emotion, of one or several expression flows; PNG and PDF."""

    shard: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARD")]
    """Folder of `flowvqtalker prepare`."""
    weights: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FOLDER")] = ()
    """Weights of a flow and its label; repeat it for every column. Default: those of the package."""
    split: Literal["train", "val"] = "train"
    """People the flows were trained on (as in the paper), or held-out ones."""
    clips: int = 24
    """Clips of each emotion, at most."""
    frames: int = 150
    """Frames shown of each emotion, at most."""
    maps: tuple[Method, ...] = ("tsne", "pca")
    """Kinds of map, one row each."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("latent.png")
    """Figure to write (.png or .pdf; both are written)."""

    def run(self) -> None:
        """Encode the clips with every flow and write the figure."""
        panels = self.panels()
        print(", ".join(str(path) for path in style.save(make(panels, self.maps), self.output)))
        for one in panels:
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in one.scores.items())
            print(f"{one.name}: {len(one.latents)} frames of {len(np.unique(one.labels))} emotions; {numbers}")

    def panels(self) -> list[Panel]:
        """The latents of every flow."""
        from flowvqtalker.data.shards import Shard
        from flowvqtalker.loading import load_flow
        from flowvqtalker.motion.flow import ExpFlow

        style.check_figure(self.output)
        _learn()
        if self.clips < 1 or self.frames < 1:
            raise UserError(f"--clips and --frames must be positive, got {self.clips} and {self.frames}")
        for text in self.weights:
            if not all(text.partition("=")):
                raise UserError(f"--weights {text!r}: give NAME=FOLDER, for instance --weights GMM=runs/gmm/weights")
        folders: dict[str, Path | None] = {**style.named_paths(self.weights, "--weights")} or {"": None}
        flows = {name: load_flow(ExpFlow, "expflow", folder)[0] for name, folder in folders.items()}
        shard = Shard(self.shard)
        panels = []
        for name, flow in flows.items():
            clips = pick_clips(shard, self.split, self.clips, frontend=flow.audio.config.frontend)
            panels.append(Panel(name or _KINDS[flow.config.latent], *encode(flow, clips, self.frames)))
        return panels
