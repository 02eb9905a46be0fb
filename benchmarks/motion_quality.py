"""Generated motion on held-out people of a shard, beside the real clips and baselines.

    python benchmarks/motion_quality.py SHARD [--clips 24] [--seeds 10] [--json FILE] [--temperature X] [...]
    python benchmarks/motion_quality.py SHARD --intensity [0 0.25 ...]   the classifier's score over intensity

Prints means over held-out clips of motion_scores.py (landmark and lip distances with the true pose and identity, beats,
jitter, speed, head, correlation of mouth opening with loudness and with the real clip), generated with several seeds,
beside the real clips; the same distances for the mean face, the source's static expression and the training clips that
sound most alike; and whether one seed gives bit-identical motion. For every emotion: the distance between ten seeds
beside that between real clips, how often an evaluator that never saw generated motion recognises the emotion, and means
of the ARKit blendshapes that it should move, over held-out portraits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from motion_scores import NearestSpeech, eye_closure, motion_scores
from torch import Tensor

from flowvqtalker import EMOTIONS
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES as NAMES
from flowvqtalker.io.coefficients import Coefficients, Motion
from flowvqtalker.loading import load_face_model, load_flows
from flowvqtalker.motion.eyes import EyeLimiter
from flowvqtalker.motion.sampler import ARTICULATION, TEMPERATURE, MotionGenerator
from flowvqtalker.motion.smile import smile_correction
from flowvqtalker.speech.features import windows
from flowvqtalker_eval.metrics.motion import blink_rate, diversity, head_deviation

_DISTANCES = ("M-LMD", "F-LMD", "lip-vertex error (%)", "AED", "AED L2", "opening generated-real")
_SHAPES = ("jawOpen", "mouthSmile", "mouthFrown", "browDown", "browInnerUp")


class Bench:
    """Weights and data that every measurement needs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.face = load_face_model(options.weights)
        self.expflow, self.poseflow, self.bank = load_flows(options.weights)
        self.shard = Shard(options.shard)
        self.sampling: dict[str, Any] = {}

    def clip(self, number: int) -> Coefficients:
        """The first frames of a clip."""
        rows = self.shard.rows(number)
        rows = slice(rows.start, min(rows.stop, rows.start + self.options.frames))
        beta, rho = (np.array(x[rows], np.float32) for x in (self.shard.expression, self.shard.pose))
        return Coefficients(beta, rho, np.array(self.shard.identity_shape[number], np.float32))

    def wave(self, number: int) -> np.ndarray:
        """Speech of the first frames of a clip."""
        return self.shard.wave(number)[: self.options.frames * SAMPLES]

    def chosen(self) -> list[int]:
        """The longest clips with speech, the held-out people in turn."""
        places: dict[str, int] = {}
        order = []
        speech = self.shard.select("val", speech=True, is_image=False, min_length=25)
        for number in sorted(speech.tolist(), key=lambda n: -int(self.shard.length[n])):
            person = str(self.shard.identity[number])
            places[person] = places.get(person, 0) + 1
            order.append((places[person], number))
        return [number for _, number in sorted(order)][: self.options.clips]

    def generate(
        self,
        number: int,
        emotion: str,
        seed: int,
        beta0: np.ndarray | None = None,
        frames: int | None = None,
        intensity: float = 1.0,
    ) -> Coefficients:
        """Motion for a clip's speech, from the expression of its first frame or another."""
        real = self.clip(number)
        beta = torch.from_numpy(np.array(real.expression[0] if beta0 is None else beta0, np.float32))
        generator = MotionGenerator(
            self.expflow,
            self.poseflow,
            self.bank,
            beta0=beta,
            pose0=torch.from_numpy(real.pose.mean(0)),
            emotion=emotion,
            intensity=intensity,
            temperature=self.options.temperature,
            articulation=self.options.articulation,
            seed=seed,
            correction=smile_correction(self.face, beta),
            **self.sampling,
        )
        wave = self.wave(number)[: None if frames is None else frames * SAMPLES]
        identity = torch.from_numpy(np.array(real.identity, np.float32))
        motion = generator(windows(wave, generator.frontend), last=True)
        eyes = EyeLimiter(self.face, identity, generator.source[0].cpu())
        return Coefficients.of(Motion(eyes(motion.expression), motion.pose), real.identity)

    def portraits(self) -> list[np.ndarray]:
        """Expressions (64,) of held-out pictures."""
        pictures = self.shard.select("val", is_image=True)
        pictures = pictures[:: max(1, len(pictures) // self.options.portraits)][: self.options.portraits]
        return [np.array(self.shard.expression[self.shard.start[n]]) for n in pictures]

    def label(self, number: int) -> str:
        """Emotion to generate a clip with: its own."""
        label = int(self.shard.emotion[number])
        return EMOTIONS[label] if label >= 0 else "neutral"

    def speakers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Speech and expression of the training clips."""
        for number in self.shard.select("train", speech=True, is_image=False, min_length=NearestSpeech.LENGTH):
            yield self.shard.wave(int(number)), np.array(self.shard.expression[self.shard.rows(int(number))])


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over the clips that have it."""
    result = {}
    for name in found[0]:
        values = [scores[name] for scores in found if np.isfinite(scores.get(name, np.nan))]
        result[name] = float(np.mean(values)) if values else float("nan")
    return result


def score_clips(bench: Bench, chosen: list[int]) -> dict[str, Any]:
    """Generated motion of the held-out clips, and the baselines."""
    nearest = NearestSpeech(bench.speakers())
    found: list[dict[str, float]] = []
    baselines: dict[str, list[dict[str, float]]] = {}
    closures: dict[str, list[np.ndarray]] = {"generated": [], "real": []}
    heads: dict[str, list[float]] = {"generated": [], "real": []}
    for number in chosen:
        real, wave = bench.clip(number), bench.wave(number)
        takes = [bench.generate(number, bench.label(number), seed) for seed in range(bench.options.seeds)]
        found.append(motion_scores(bench.face, real, takes, wave))
        for name, clips in (("generated", takes), ("real", [real])):
            closures[name] += [eye_closure(bench.face, clip.expression) for clip in clips]
            heads[name] += [float(head_deviation(clip.pose).mean()) for clip in clips]
        others = {
            "mean face": np.zeros_like(real.expression),
            "source held still": np.repeat(real.expression[:1], len(real), axis=0),
            "nearest training speech": nearest(wave)[: len(real)],
        }
        for name, beta in others.items():
            still = Coefficients(beta, real.pose, real.identity)
            scores = motion_scores(bench.face, real, [still], None)
            baselines.setdefault(name, []).append({key: scores[key] for key in _DISTANCES})
    low, high = np.percentile(heads["real"], [5, 95])
    inside = np.mean([low <= value <= high for value in heads["generated"]])
    scores = mean(found)
    scores.update({f"blinks a minute {name}": blink_rate(clips) for name, clips in closures.items()})
    scores["head angle std within the real clips' 5th to 95th percentile"] = float(inside)
    scores["head angle std real, 5th percentile"], scores["head angle std real, 95th percentile"] = low, high
    median = {name: float(np.nanmedian([one[name] for one in found])) for name in found[0]}
    return {
        "scores": scores,
        "medians": median,
        "baselines": {name: mean(values) for name, values in baselines.items()},
        "clips": {str(bench.shard.name[n]): one for n, one in zip(chosen, found, strict=True)},
    }


def score_emotions(bench: Bench, number: int) -> dict[str, dict[str, float]]:
    """For each emotion, on one clip's speech: distances between seeds and between real clips, the classifier's
    verdict, blendshapes."""
    classify, classes = _classifier(bench.options.weights)
    shard, options, face = bench.shard, bench.options, bench.face
    portraits = bench.portraits()
    results: dict[str, dict[str, float]] = {}
    for label, emotion in enumerate(EMOTIONS):
        takes = [bench.generate(number, emotion, seed) for seed in range(options.seeds)]
        same = np.flatnonzero((shard.emotion == label) & ~shard.is_image & (shard.length >= 25))
        same = same[:: 1 if label < 8 else 30][:60]
        real = [bench.clip(int(n)).expression for n in same]
        drawn = [
            bench.generate(number, emotion, seed, beta0, frames=75).expression for seed, beta0 in enumerate(portraits)
        ]
        shapes = face.blendshapes(torch.from_numpy(np.concatenate(drawn))).mean(0)
        row: dict[str, float] = {
            "seeds": diversity([take.expression for take in takes]),
            "real": diversity(real),
            "real clips": len(real),
        }
        row["ratio"] = row["seeds"] / row["real"]
        if classify is not None and emotion in classes:
            row["recognised"] = float(np.mean([classes[int(classify(beta).argmax())] == emotion for beta in drawn]))
        for name in _SHAPES:
            row[name] = float(np.mean([shapes[i] for i, other in enumerate(NAMES) if other.startswith(name)]))
        results[emotion] = row
    return results


def score_intensity(bench: Bench, number: int, levels: list[float]) -> dict[str, list[float]]:
    """For each emotion, the classifier's mean probability of it at each intensity, over held-out portraits."""
    classify, classes = _classifier(bench.options.weights)
    if classify is None:
        raise SystemExit("the classifier's weights are missing")
    results: dict[str, list[float]] = {}
    neutral: list[Tensor] | None = None
    for emotion in (name for name in classes if name != "neutral"):
        row = []
        for level in levels:
            if level == 0 and neutral is not None:  # intensity 0 is neutral for every emotion
                found = neutral
            else:
                motion = (
                    bench.generate(number, emotion, seed, beta0, frames=75, intensity=level).expression
                    for seed, beta0 in enumerate(bench.portraits())
                )
                found = [classify(beta) for beta in motion]
                neutral = found if level == 0 else neutral
            row.append(float(np.stack(found)[:, classes.index(emotion)].mean()))
        results[emotion] = row
    return results


def report_intensity(levels: list[float], found: dict[str, list[float]]) -> None:
    """Print it, with Spearman's rank correlation of intensity and probability."""
    from scipy.stats import spearmanr

    print("| emotion | " + " | ".join(f"{level:g}" for level in levels) + " | Spearman |")
    print("|---" * (2 + len(levels)) + "|")
    for emotion, row in found.items():
        rank = float(spearmanr(levels, row).statistic)
        print(f"| {emotion} | " + " | ".join(f"{value:.3f}" for value in row) + f" | {rank:.2f} |")


def real_accuracy(bench: Bench) -> tuple[float, int]:
    """Share of the real clips of held-out people that the classifier recognises, and how many they are."""
    classify, classes = _classifier(bench.options.weights)
    if classify is None:
        return float("nan"), 0
    shard = bench.shard
    found = []
    for number in shard.select("val", is_image=False, min_length=25):
        if 0 <= shard.emotion[number] < len(classes):
            beta = bench.clip(int(number)).expression
            found.append(int(classify(beta).argmax()) == int(shard.emotion[number]))
    return (float(np.mean(found)) if found else float("nan")), len(found)


def _classifier(folder: Path | None) -> tuple[Any, tuple[str, ...]]:
    """The classifier of expression sequences, (T, 64) to (8,), and its classes; None where its weights are missing."""
    try:
        from flowvqtalker_eval.evaluators.motion_emotion import load_motion_emotion
        from flowvqtalker_eval.metrics.accuracy import CLASSES

        model = load_motion_emotion(folder)
    except (ImportError, UserError):
        return None, ()

    return model.classify, CLASSES


def plain(value: Any) -> Any:
    """The same with None for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def report(result: dict[str, Any]) -> None:
    """Print it."""
    scores, medians = result["scores"], result["medians"]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    print(f"{len(result['clips'])} held-out clips of {result['people']} people; {settings}")
    for name, value in scores.items():
        print(f"  {name}: {value:.3f}" + (f" (median {medians[name]:.3f})" if name in medians else ""))
    print("| on the true pose and identity | " + " | ".join(_DISTANCES) + " |")
    print("|---" * (1 + len(_DISTANCES)) + "|")
    for name, row in {"generated": scores, **result["baselines"]}.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in _DISTANCES) + " |")
    print(f"same seed, same motion to the last bit: {result['repeatable']}")
    columns = ("recognised", *_SHAPES)
    print("| emotion | seeds: distance | real clips | ratio | " + " | ".join(columns) + " |")
    print("|---" * (4 + len(columns)) + "|")
    for emotion, row in result["emotions"].items():
        cells = " | ".join(f"{row[name]:.3f}" if name in row else "-" for name in columns)
        apart = f"{row['seeds']:.2f} | {row['real']:.2f} ({row['real clips']}) | {row['ratio']:.2f}"
        print(f"| {emotion} | {apart} | {cells} |")
    summary = result["summary"]
    print(f"ratio of distances, mean over the emotions: {summary['diversity ratio']:.3f}")
    print(
        f"emotion accuracy: generated {summary['emotion accuracy generated']:.3f}, real held-out clips "
        f"{summary['emotion accuracy real']:.3f} ({summary['emotion clips real']})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--frames", type=int, default=150, help="of each clip at most")
    parser.add_argument("--portraits", type=int, default=20, help="held-out pictures of the emotions' sequences")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--articulation", type=float, default=ARTICULATION)
    parser.add_argument("--intensity", type=float, nargs="*", help="measure the classifier's score over intensity only")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    chosen = bench.chosen()
    if not chosen:
        raise SystemExit(f"{options.shard} has no held-out clip with speech of 25 frames")
    if options.intensity is not None:
        levels = options.intensity or [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
        report_intensity(levels, score_intensity(bench, chosen[0], levels))
        return
    emotions = score_emotions(bench, chosen[0])
    again = [bench.generate(chosen[0], "happy", 0).expression for _ in range(2)]
    accuracy, count = real_accuracy(bench)
    recognised = [row["recognised"] for row in emotions.values() if "recognised" in row]
    result = {
        "settings": {name: str(getattr(options, name)) for name in ("temperature", "articulation", "seeds", "frames")},
        "people": len({str(bench.shard.identity[n]) for n in chosen}),
        **score_clips(bench, chosen),
        "repeatable": bool(np.array_equal(*again)),
        "emotions": emotions,
        "summary": {
            "diversity ratio": float(np.mean([row["ratio"] for row in emotions.values()])),
            "emotion accuracy generated": float(np.mean(recognised)) if recognised else float("nan"),
            "emotion accuracy real": accuracy,
            "emotion clips real": count,
        },
    }
    report(result)
    if options.json is not None:
        options.json.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
