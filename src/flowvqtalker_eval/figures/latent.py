"""Latents z = f(β) of real frames by emotion, of one or several flows side by side: Fig. 6 of the paper.

Every frame is encoded as in training, given the true frames before it, its speech, its source and its own emotion. The
maps therefore show where a flow puts the frames of each emotion, not whether it could tell the emotions apart; the
score "by likelihood" answers that, with the emotion hidden. Scores (ours; the paper prints none):

* nearest mean: share of frames whose z is nearest to the mean μ of their own emotion;
* by likelihood: share of clips whose β is most likely under their own emotion, log p(β | c, e) over the nine e;
* silhouette: of z by emotion (Rousseeuw 1987), -1 to 1.

Each score is a mean over the emotions, so that emotions with many frames do not dominate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.loading import load_flow
from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.likelihood import contexts, residual
from flowvqtalker.speech.features import log_mel
from flowvqtalker.train.corpus import Corpus, MotionClip
from flowvqtalker.train.flow_stage import evaluating, whole_clips
from flowvqtalker.train.sequences import SequenceConfig, SequenceDataset
from flowvqtalker_eval.figures import style
from flowvqtalker_eval.tables.pairs import named_paths

__all__ = ["Latent", "Panel", "embed", "encode", "make", "nearest_mean", "pick_clips", "silhouette"]

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Method = Literal["pca", "tsne"]

_TITLES: dict[Method, str] = {"pca": "PCA", "tsne": "t-SNE"}
_KINDS = {"student": "SMM", "gaussian-mixture": "GMM", "gaussian": "Gaussian"}
_PERPLEXITY = 30.0
_SHORTEST, _LONGEST = 12, 100  # frames of a clip: the least, and how many are encoded from its start
_BATCH = 8  # clips


@dataclass(frozen=True)
class Panel:
    """One column of the figure.

    Attributes:
        name: of the flow.
        latents: (N, D).
        labels: (N,) emotion of each.
        scores: printed above the maps.
    """

    name: str
    latents: Array
    labels: Labels
    scores: Mapping[str, float] = field(default_factory=dict)


def embed(latents: Array, method: Method = "pca") -> Array:
    """Points (N, 2) of latents (N, D): two principal components, or t-SNE.

    t-SNE has perplexity 30 (at most a third of the points) and starts from the components, so that the same latents
    give the same map.
    """
    latents = np.asarray(latents, np.float64)
    if latents.ndim != 2 or len(latents) < 4 or not np.isfinite(latents).all():
        raise UserError(f"a map needs at least 4 finite latents (N, D), got an array of shape {latents.shape}")
    if method == "pca":
        return np.asarray(PCA(2, svd_solver="full").fit_transform(latents))
    perplexity = min(_PERPLEXITY, (len(latents) - 1) / 3)
    return np.asarray(TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(latents))


def silhouette(latents: Array, labels: Labels) -> float:
    """Mean silhouette of latents (N, D) by label (N,), mean over the labels; NaN with a single label."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return _mean_by_class(silhouette_samples(latents, labels), labels)


def nearest_mean(latents: Array, labels: Labels, means: Array) -> float:
    """Share of latents (N, D) that are nearest to the mean (C, D) of their own label, mean over the labels."""
    return _mean_by_class((cdist(latents, means).argmin(1) == labels).astype(float), labels)


def _mean_by_class(values: Array, labels: Labels) -> float:
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
        handles: dict[str, Any] = {}
        for row, method in enumerate(methods):
            axes[row, 0].set_ylabel(_TITLES[method])
            for column, one in enumerate(panels):
                handles |= _scatter(axes[row, column], maps[row][column], one.labels)
        for cell, one in zip(axes[0], panels, strict=True):
            cell.set_title(
                "\n".join([one.name, *(f"{key} {value:.2f}" for key, value in one.scores.items())]), fontsize=8
            )
        shown = [name for name in EMOTIONS if name in handles]
        columns = min(len(shown), (3, 5, 9)[min(len(panels), 3) - 1])
        legend = [handles[name] for name in shown]
        figure.legend(legend, shown, loc="outside lower center", ncols=columns, markerscale=2)
    return figure


def _scatter(axes: Any, points: Array, labels: Labels) -> dict[str, Any]:
    """Draw points (N, 2) by label; returns the handles of the legend by emotion."""
    axes.set_xticks([])
    axes.set_yticks([])
    handles = {}
    for label in np.unique(labels):
        name = EMOTIONS[label]
        look = {"c": style.EMOTION_COLOURS[name], "marker": style.EMOTION_MARKERS[name], "linewidths": 0, "alpha": 0.7}
        handles[name] = axes.scatter(*points[labels == label].T, s=6, rasterized=True, **look)
    return handles


# ------------------------------------------------------------------------------------------------------------- latents


def pick_clips(shard: Shard, split: str, count: int, frontend: str = "mel") -> list[MotionClip]:
    """Up to ``count`` clips of every emotion of a split, spread over its people, with features of a speech frontend.

    Raises:
        UserError: if there is none.
    """
    numbers = shard.select(split, is_image=False, min_length=_SHORTEST)
    clips = []
    for label in range(len(EMOTIONS)):
        turns: dict[str, int] = {}
        order = []
        for number in numbers[shard.emotion[numbers] == label].tolist():
            person = str(shard.identity[number])
            turns[person] = turns.get(person, 0) + 1
            order.append((turns[person], number))
        for _, number in sorted(order)[:count]:
            speech = bool(shard.speech[number] and shard.sound[number])
            frames = np.array(shard.expression[shard.rows(number)][:_LONGEST], np.float32)
            mel = log_mel(shard.wave(number), frontend).astype(np.float16) if speech else None
            clips.append(MotionClip(frames, mel, label, speech, str(shard.identity[number]), frontend=frontend))
    if not clips:
        raise UserError(f"{shard.path} has no clip with a known emotion in split {split!r}; choose train or val")
    return clips


def encode(flow: ExpFlow, clips: Sequence[MotionClip], frames: int = 150) -> tuple[Array, Labels, dict[str, float]]:
    """Latents of the clips' frames, and how well they tell the emotions apart.

    Arguments:
        flow: in eval mode.
        clips: of known emotions.
        frames: kept per emotion at most, drawn with a fixed seed.

    Returns:
        (N, D), their labels (N,), and the scores.
    """
    corpus = Corpus(clips)
    data = SequenceDataset(corpus, SequenceConfig(), flow.audio.config, flow.config.history, plain=True)
    with evaluating(flow):
        found = [
            _encode_batch(flow, corpus, data, list(range(start, min(start + _BATCH, len(clips)))))
            for start in range(0, len(clips), _BATCH)
        ]
    emotions = np.array([clip.emotion for clip in clips])
    per_clip = [z for batch, _ in found for z in batch]
    latents = np.concatenate(per_clip)
    labels = np.repeat(emotions, [len(z) for z in per_clip])
    right = np.concatenate([guesses for _, guesses in found]) == emotions
    random = np.random.default_rng
    kept = [random(0).permutation(np.flatnonzero(labels == label))[:frames] for label in np.unique(labels)]
    rows = np.sort(np.concatenate(kept))
    scores = {
        "nearest mean": nearest_mean(latents, labels, flow.latent.mean.detach().numpy()),
        "by likelihood": _mean_by_class(right.astype(float), emotions),
        "silhouette": silhouette(latents[rows], labels[rows]),
    }
    return latents[rows], labels[rows], scores


def _encode_batch(flow: ExpFlow, corpus: Any, data: Any, numbers: list[int]) -> tuple[list[Array], Labels]:
    """Latents (t, D) of each clip under its own emotion, and the emotion under which each clip is most likely."""
    clips = [corpus.clips[n] for n in numbers]
    speech_batch = whole_clips(corpus, numbers, data, max(len(clip.frames) for clip in clips))
    speech = flow.encode_speech(speech_batch.windows)
    batch = residual(flow, speech_batch, speech)
    targets = batch.frames[:, flow.config.history :][batch.mask]
    clip_of_row = batch.mask.nonzero()[:, 0]
    latents: dict[int, Array] = {}
    likelihoods = []
    for label in range(flow.config.classes):
        context = contexts(flow, replace(batch, emotion=torch.full((len(clips),), label)), speech)
        z, logdet = flow.forward_and_logdet(targets, context)
        density = flow.latent.log_prob(z, context.emotion) + logdet
        likelihoods.append(torch.zeros(len(clips)).index_add(0, clip_of_row, density))
        latents.update((i, z[clip_of_row == i].numpy()) for i, clip in enumerate(clips) if clip.emotion == label)
    return [latents[i] for i in range(len(clips))], torch.stack(likelihoods).argmax(0).numpy()


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Figure 6: latents of real frames by emotion, of one or several expression flows; PNG and PDF."""

    shard: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARD")]
    """Folder of `flowvqtalker prepare`."""
    weights: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FOLDER")] = ()
    """Label and weights of a flow; repeat it for every column. Default: those of the package."""
    split: Literal["train", "val"] = "train"
    """People the flows were trained on (as in the paper), or held-out ones."""
    clips: int = 24
    """Clips per emotion, at most."""
    frames: int = 150
    """Frames shown per emotion, at most."""
    maps: tuple[Method, ...] = ("tsne", "pca")
    """Kinds of map, one row each."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("latent.png")
    """Figure to write (.png or .pdf; both are written)."""

    def run(self) -> None:
        """Encode the clips with every flow and write the figure."""
        panels = self.panels()
        print(", ".join(str(path) for path in style.save(make(panels, self.maps), self.output)))
        for one in panels:
            scores = ", ".join(f"{name} {value:.3f}" for name, value in one.scores.items())
            print(f"{one.name}: {len(one.latents)} frames of {len(np.unique(one.labels))} emotions; {scores}")

    def panels(self) -> list[Panel]:
        """The latents of every flow."""
        style.check_figure(self.output)
        if self.clips < 1 or self.frames < 1:
            raise UserError(f"--clips and --frames must be positive, got {self.clips} and {self.frames}")
        folders: dict[str, Path | None] = {**named_paths(self.weights, "--weights")} or {"": None}
        flows = {name: load_flow(ExpFlow, "expflow", folder)[0] for name, folder in folders.items()}
        shard = Shard(self.shard)
        panels = []
        for name, flow in flows.items():
            clips = pick_clips(shard, self.split, self.clips, flow.audio.config.frontend)
            panels.append(Panel(name or _KINDS[flow.config.latent], *encode(flow, clips, self.frames)))
        return panels
