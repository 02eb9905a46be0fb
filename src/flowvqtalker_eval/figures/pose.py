"""Head motion and its relation to speech: trace maps and audio-pose correlation maps, Fig. 5 of the paper.

No definition of either map is published, so these are ours:

* Trace map: the outline of the face and the ridge of the nose are projected with the clip's camera and drawn as points;
  each pixel of the canvas takes the brightest value of all frames. A head that moves leaves wide traces.
* Correlation map: Pearson's correlation between a speech feature (level in dB, or F0 in semitones in voiced frames) and
  the speed of the head about an axis, |ρ_t - ρ_{t-1}|, in two-second windows that overlap by half, averaged over the
  windows. Rows are the axes (pitch, yaw, roll), columns the lag: at +5 the head moves five frames after the sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import tyro
from matplotlib.figure import Figure

from flowvqtalker.constants import CROP, FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.audio import load as load_audio
from flowvqtalker.io.coefficients import Coefficients, Motion
from flowvqtalker.io.video import probe
from flowvqtalker.motion.emotion import parse_emotion
from flowvqtalker.pipeline import Talker
from flowvqtalker_eval.figures import style
from flowvqtalker_eval.metrics.beats import loudness, pitch
from flowvqtalker_eval.metrics.motion import head_deviation
from flowvqtalker_eval.tables.pairs import named_paths

__all__ = ["Panel", "Pose", "correlation_map", "make", "panel", "trace_map"]

Array = npt.NDArray[np.floating[Any]]

_AXES = ("pitch", "yaw", "roll")
_LAGS = 15  # largest lag of the correlation map in frames, either way
_WINDOW = 2 * FPS

#: Outline of the face, round from the top of the forehead, and the ridge of the nose (face mesh indices).
_OUTLINE = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152),
    *(148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
    *(168, 6, 197, 195, 5, 4, 1),
)
_CANVAS = 400
_SHIFT = 4  # OpenCV draws at sixteenths of a pixel


@dataclass(frozen=True)
class Panel:
    """One column of the figure.

    Attributes:
        name: of the method or the seed.
        trace: (S, S) in [0, 1].
        deviation: (3,) standard deviation of pitch, yaw and roll, degrees.
        correlations: maps (3, lags) by speech feature (``level``, ``F0``); none without sound.
    """

    name: str
    trace: Array
    deviation: Array
    correlations: Mapping[str, Array] = field(default_factory=dict)


def trace_map(points: Array, size: int = _CANVAS, extent: float = CROP) -> Array:
    """Maximum over time of the points of each frame, drawn on one canvas: (size, size) float32 in [0, 1].

    Arguments:
        points: (T, P, 2) in pixels; frames with NaN are skipped, points beyond the canvas are not visible.
        size: of the canvas in pixels.
        extent: width of the square that the canvas shows, in the points' pixels.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 3 or points.shape[2] != 2 or len(points) == 0:
        raise UserError(f"a trace map needs points (T, P, 2), got {points.shape}")
    canvas = np.zeros((size, size), np.uint8)
    radius = round(size / 400 * 2**_SHIFT)
    for frame in points[np.isfinite(points).all((1, 2))]:
        drawn = np.zeros_like(canvas)
        # Far coordinates would overflow OpenCV's; one canvas away they are as invisible.
        where = np.clip(frame / extent * size, -size, 2 * size) * 2**_SHIFT
        for x, y in np.round(where).astype(int).tolist():
            cv2.circle(drawn, (x, y), radius, 255, -1, cv2.LINE_AA, _SHIFT)
        np.maximum(canvas, drawn, out=canvas)
    return canvas.astype(np.float32) / 255


def correlation_map(feature: Array, rho: Array, lags: int = _LAGS, window: int = _WINDOW) -> Array:
    """Correlation of a speech feature with the head's speed about each axis, at each lag.

    Arguments:
        feature: (T,) value of each frame, NaN where it is undefined (F0 of an unvoiced frame).
        rho: (T, 6) poses, NaN where no face was found; only the first min(T) frames of both are used.
        lags: largest lag in frames.
        window: length in frames; a shorter clip is one window.

    Returns:
        (3, 2 lags + 1); NaN where nothing moves.
    """
    feature, rho = np.asarray(feature, np.float64), np.asarray(rho, np.float64)
    if feature.ndim != 1 or rho.ndim != 2 or rho.shape[1] < 3:
        raise UserError(f"a correlation map needs a feature (T,) and poses (T, 6), got {feature.shape} and {rho.shape}")
    count = min(len(feature), len(rho))
    if count < lags + 4:
        raise UserError(f"{count} frames are too few for lags up to {lags}; give a longer clip")
    speed = np.abs(np.diff(rho[:count, :3], axis=0))
    sound = feature[1:count]
    found = np.full((3, 2 * lags + 1), np.nan)
    for column, lag in enumerate(range(-lags, lags + 1)):
        x, y = sound[max(-lag, 0) : len(sound) - max(lag, 0)], speed[max(lag, 0) : len(speed) - max(-lag, 0)]
        span = min(window, len(x))
        starts = range(0, len(x) - span + 1, max(1, span // 2))
        windows = np.array([_correlate(x[s : s + span], y[s : s + span]) for s in starts])
        seen = np.isfinite(windows).any(0)
        found[seen, column] = np.nanmean(windows[:, seen], axis=0)
    return found


def _correlate(x: Array, y: Array) -> Array:
    """Pearson correlation (3,) of (n,) with the columns of (n, 3); NaN for a constant column, or if more than half of
    the frames are missing."""
    known = np.isfinite(x) & np.isfinite(y).all(1)
    result = np.full(y.shape[1], np.nan)
    if known.sum() < max(3, len(x) / 2):
        return result
    x, y = x[known] - x[known].mean(), y[known] - y[known].mean(0)
    norm = np.sqrt((x**2).sum() * (y**2).sum(0))
    moving = norm > 1e-12
    result[moving] = (x @ y[:, moving]) / norm[moving]
    return result


def panel(face: FaceModel, name: str, motion: Coefficients, wave: Array | None = None) -> Panel:
    """The maps of one clip.

    Arguments:
        face: the model of the coefficients.
        name: its heading.
        motion: at any frame rate.
        wave: its speech (S,) at 16 kHz; None draws no correlation maps.
    """
    motion = motion.at(FPS)
    with torch.inference_mode():
        beta, rho, alpha = (torch.as_tensor(x) for x in (motion.expression, motion.pose, motion.identity))
        points = face.project(alpha, beta, rho)[:, list(_OUTLINE), :2].numpy()
    features = {} if wave is None else {"level": loudness(wave), "F0": pitch(wave)}
    maps = {key: correlation_map(values, motion.pose) for key, values in features.items()}
    return Panel(name, trace_map(points), head_deviation(motion.pose), maps)


def make(panels: Sequence[Panel]) -> Figure:
    """A column for each panel: its trace map, and below it its correlation maps.

    Raises:
        UserError: if there is no panel.
    """
    if not panels:
        raise UserError("there is no motion to draw; give at least one")
    rows = max(len(one.correlations) for one in panels)
    heights = {"height_ratios": [1.5, *[0.8] * rows]}
    with style.look():
        figure, axes = style.subplots(1 + rows, len(panels), 1.9, 1.6, gridspec_kw=heights)
        image = None
        for column, one in enumerate(panels):
            top = axes[0, column]
            top.imshow(1 - one.trace, cmap="gray", vmin=0, vmax=1)
            style.hide_axes(top)
            angles = ", ".join(f"{value:.1f}°" for value in one.deviation)
            top.set_title(f"{one.name}\nstd {angles}", fontsize=7)
            for below, (feature, values) in zip(axes[1:, column], one.correlations.items(), strict=False):
                reach = values.shape[1] // 2
                extent = (-reach - 0.5, reach + 0.5, 2.5, -0.5)
                image = below.imshow(values, cmap="RdBu_r", vmin=-0.5, vmax=0.5, aspect="auto", extent=extent)
                below.set_yticks(range(3), _AXES if column == 0 else [""] * 3)
                below.set_xlabel(f"lag to {feature} (frames)", fontsize=7)
                below.axvline(0, color="black", linewidth=0.4)
            for below in axes[1 + len(one.correlations) :, column]:
                below.set_axis_off()
        if image is not None:
            figure.colorbar(image, ax=axes[1:].ravel().tolist(), shrink=0.8, label="correlation", pad=0.02)
    return figure


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Figure 5: where the head goes (trace maps) and whether it moves with the voice (correlation maps, ours);
    PNG and PDF."""

    motion: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FILE")] = ()
    """Label and motion (.npz of `motion` or `track`) or video of a method; repeat it for every column."""
    speech: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Speech for the seeds and for motion files. A video with sound keeps its own."""
    seeds: tuple[int, ...] = ()
    """Seeds to generate motion with. Default: 0 1 2 3 if no motion is given."""
    emotion: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Emotion of the generated motion. Default: neutral."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("pose.png")
    """Figure to write (.png or .pdf; both are written)."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""

    def run(self) -> None:
        """Read or generate the motions and write the figure."""
        print(", ".join(str(path) for path in style.save(self.figure(), self.output)))

    def figure(self) -> Figure:
        """The figure, before it is written."""
        style.check_figure(self.output)
        if self.emotion is not None:
            parse_emotion(self.emotion)
        files = named_paths(self.motion, "--motion")
        seeds = self.seeds if self.seeds or files else (0, 1, 2, 3)
        if seeds and self.speech is None:
            raise UserError("no speech to generate motion from; add --speech FILE, or give --motion NAME=FILE")
        for path in (*files.values(), self.speech):
            if path is not None and not path.is_file():
                raise UserError(f"{path} does not exist; check the name")
        talker = Talker.load(self.weights, "cpu", parts=("face", "motion") if seeds else ("face",))
        wave = None if self.speech is None else load_audio(self.speech)
        found = [panel(talker.face_model, name, *_read(talker, path, wave)) for name, path in files.items()]
        for seed in seeds:
            assert self.speech is not None  # checked above
            motion = _generate(talker, self.speech, self.emotion, seed)
            found.append(panel(talker.face_model, f"seed {seed}", motion, wave))
        return make(found)


def _read(talker: Talker, path: Path, wave: Array | None) -> tuple[Coefficients, Array | None]:
    """Motion of a file, and its speech: a video's own, else the given one, else none."""
    if path.suffix.lower() == ".npz":
        return Coefficients.load(path), wave
    return talker.track(path), load_audio(path) if probe(path).sound else wave


def _generate(talker: Talker, speech: Path, emotion: str | None, seed: int) -> Coefficients:
    """Motion for speech, on the mean face seen from the front."""
    return Coefficients.of(Motion.join(talker.motion(speech, emotion=emotion, seed=seed)))
