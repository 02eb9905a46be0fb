"""Model questions of the expression flow: variants that differ in one setting, trained and measured alike.

    python benchmarks/flow_questions.py SHARD --speech-encoder runs/speech --data DATA -o runs/questions [--only ...]

Every variant differs from the first, the default, in one setting. It is trained for the same number of steps on the
shard's training people and measured on its held-out people: negative log-likelihood in nats per frame, the measures of
``motion_quality.py`` on fewer clips and seeds, the evaluator's accuracy on every emotion, and with ``--data`` (see
``emotion.py``) the share of emotions that two published networks recognise on held-out portraits, with the flow's bias
correction and without. All else is measured without it. A finished variant is not trained again. The table is printed
and written to OUT/questions.md and .json after each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emotion import MOMENTS, judge, portraits
from motion_quality import Bench, mean, plain, score_emotions
from motion_scores import motion_scores
from safetensors.torch import load_file
from torch import Tensor

from flowvqtalker import EMOTIONS, Talker
from flowvqtalker.io.audio import load
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.likelihood import rollout
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.sampler import ARTICULATION, MANIFOLD, TEMPERATURE, WARM_UP
from flowvqtalker.speech.encoder import SpeechEncoder
from flowvqtalker.speech.features import windows
from flowvqtalker.train import expflow
from flowvqtalker.train.config import from_dict, load_yaml, to_dict
from flowvqtalker.train.corpus import Corpus
from flowvqtalker.train.flow_stage import load_speech_encoder
from flowvqtalker.train.loop import fit
from flowvqtalker_eval.metrics.expression_networks import CLASSES, NETWORKS, load_network

#: Name -> changed settings by their path, and options of the sampling.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "Gaussian mixture": {"flow.latent": "gaussian-mixture"},
    "no data dropout": {"flow.dropout": 0.0},
    "one Gaussian": {"flow.latent": "gaussian"},
    "no emotional versions": {"retarget.copies": 0, "performances": None},
    "no performances": {"performances": None},
    "no neutral source": {"flow.source": False},
    "the portrait as source": {"sampling.source": "portrait"},
    "default, second seed": {"loop.seed": 1},
    "K = 8": {"flow.steps": 8},
    "tau = 5": {"flow.history": 5},
    "tau = 20": {"flow.history": 20},
    "nu = 5": {"flow.nu": 5.0},
    "nu = 500": {"flow.nu": 500.0},
    "learnt means": {"flow.learn_means": True},
    "full 1x1": {"flow.linear": "full"},
    "data dropout 0.8": {"flow.dropout": 0.8},
    "no L_con": {"losses.consistency": 0.0},
    "L_con x 10": {"losses.consistency": 0.3},
    "no lip prior": {"flow.has_lip_prior": False, "losses.lips": 0.0},
    "no autoregressive prior": {"flow.ar_prior": False},
    "no retargeting between people": {"sequences.retarget_expression": 0.0},
    "no manifold": {"sampling.manifold": 0.0},
    "manifold 0.5": {"sampling.manifold": 0.5},
    "manifold 1": {"sampling.manifold": 1.0},
    "one bank for all emotions": {"sampling.bank": "shared"},
}
_COLUMNS = {
    "nll": "NLL (nats)",
    "M-LMD": "M-LMD",
    "F-LMD": "F-LMD",
    "opening generated-real": "lips r",
    "opening range generated/real": "lips range",
    "speed generated/real": "speed",
    "diversity ratio": "diversity",
    "emotion accuracy": "emotion acc.",
    "recognised": "recognised",
    "recognised with bias": "with bias",
}


def changed(config: expflow.Config, settings: dict[str, Any]) -> expflow.Config:
    """The configuration with settings replaced by path."""
    values = to_dict(config)
    for path, value in settings.items():
        *parents, name = path.split(".")
        if parents[:1] == ["sampling"]:
            continue
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return from_dict(expflow.Config, values)


def bank_of(state: dict[str, Tensor], shared: bool) -> LatentBank | None:
    """The bank of a run; if shared, every emotion uses the latents of all, relative to their own emotion's mean."""
    bank = LatentBank.load(state)
    return replace(bank, minimum=len(bank.latents) + 1) if bank is not None and shared else bank


def measure(bench: Bench, chosen: list[int], options: argparse.Namespace) -> dict[str, float]:
    """Measures of the variant whose flow and bank ``bench`` holds."""
    scores = []
    for number in chosen:
        samples = [bench.generate(number, bench.label(number), seed) for seed in range(options.seeds)]
        scores.append(motion_scores(bench.face, bench.clip(number), samples, None))
    longest = max(chosen, key=lambda n: len(bench.clip(n)))
    emotions = score_emotions(bench, longest)
    recognised = [row["recognised"] for row in emotions.values() if "recognised" in row]
    return {
        **mean(scores),
        "emotion accuracy": float(np.mean(recognised)) if recognised else float("nan"),
        "diversity ratio": float(np.mean([row["ratio"] for row in emotions.values()])),
    }


class Judges:
    """Two published networks that look at a flow's emotions on held-out portraits, at three moments of a sentence."""

    def __init__(self, data: Path, count: int, encoder: SpeechEncoder) -> None:
        self._talker = Talker.from_pretrained(components=("face", "render"))
        self._networks = [load_network(name) for name in NETWORKS]
        self._faces = [portrait for *_, portrait in portraits(self._talker, data, count)]
        with as_file(files("flowvqtalker") / "assets" / "sample_speech.ogg") as speech, torch.inference_mode():
            heard = encoder.encode_clip(windows(load(speech), encoder.config.frontend)[: MOMENTS[-1] + 1])
        self._audio = torch.cat([heard[:1].expand(WARM_UP, -1), heard])

    @torch.inference_mode()
    def __call__(self, flow: ExpFlow, bias: Tensor) -> float:
        """Mean share of the seven emotions that is recognised, with a bias (C, 64) added to the samples."""
        labels = torch.tensor([EMOTIONS.index(name) for name in CLASSES]).repeat(len(self._faces))
        sources = flow.neutral_face(torch.cat([face.expression.reshape(1, -1) for face in self._faces]))
        drawn = rollout(
            flow,
            self._audio.expand(len(labels), -1, -1),
            labels,
            torch.Generator().manual_seed(0),
            source=sources.repeat_interleave(len(CLASSES), 0),
            temperature=TEMPERATURE,
        )
        shown = drawn[:, [WARM_UP + moment for moment in MOMENTS]] + bias[labels][:, None]
        right = []
        for row, betas in enumerate(shown):
            face = self._faces[row // len(CLASSES)]
            motion = Motion(betas, face.pose.reshape(1, -1).expand(len(betas), -1))
            images = list(self._talker.render(face, [motion]))
            points = list(self._talker.face_model.project(face.identity, motion.expression, motion.pose).numpy())
            right.append(CLASSES[int(judge(self._networks, images, points).argmax())] == CLASSES[row % len(CLASSES)])
        return float(np.mean(right))  # every emotion is asked for equally often


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| variant | " + " | ".join(_COLUMNS.values()) + " |", "|---" * (1 + len(_COLUMNS)) + "|"]
    for name, row in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{row.get(key, float('nan')):.3f}" for key in _COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the missing variants, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--speech-encoder", type=Path, required=True, help="run of the stage speech")
    parser.add_argument("--data", type=Path, help="RAVDESS's action units and performances, and held-out portraits")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/questions"))
    parser.add_argument("--config", type=Path, default=Path("configs/expflow.yaml"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--weights", type=Path, help="of the face model and the pose flow")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--portraits", type=int, default=12)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--articulation", type=float, default=ARTICULATION)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)

    base = default(options)
    encoder, _ = load_speech_encoder(options.speech_encoder)
    corpora: tuple[Corpus, Corpus] | None = None
    bench = Bench(options)
    judges = None if options.data is None else Judges(options.data, options.portraits, encoder)
    chosen = bench.chosen()
    file = options.output / "questions.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in options.only or VARIANTS:
        if name in results:
            continue
        settings = VARIANTS[name]
        sampling = {path: value for path, value in settings.items() if path.startswith("sampling.")}
        run = options.output / ("default" if sampling else name.replace(" ", "_").replace("=", ""))
        config = changed(base, settings)
        if not (run / "weights.safetensors").is_file():
            corpora = corpora or expflow.read(base)
            fit(expflow.build(config, corpora), config.loop, run, resume=(run / "checkpoint.pt").is_file())
        about = json.loads((run / "config.json").read_text())
        stored = load_file(str(run / "weights.safetensors"))
        state = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
        flow = bench.expflow = ExpFlow.load(state, about["config"], encoder)
        bias = flow.emotion_bias.clone()
        flow.emotion_bias.zero_()  # measure the flow itself
        if sampling.get("sampling.source") == "portrait":
            flow.neutral_map.copy_(torch.eye(*flow.neutral_map.shape))
        bench.bank = bank_of(state, shared=sampling.get("sampling.bank") == "shared")
        bench.sampling = {"manifold": sampling.get("sampling.manifold", MANIFOLD)}
        results[name] = {"nll": float(about["scores"]["nll"]), **measure(bench, chosen, options)}
        if judges is not None:
            results[name] |= {"recognised": judges(flow, 0 * bias), "recognised with bias": judges(flow, bias)}
        file.write_text(json.dumps(plain(results), indent=1) + "\n", encoding="utf-8")
        (options.output / "questions.md").write_text(table(results), encoding="utf-8")
        print(table({name: results[name]}), flush=True)
    print(table(results))


def default(options: argparse.Namespace) -> expflow.Config:
    """The configuration that the variants change."""
    config = load_yaml(expflow.Config, options.config)
    loop = replace(config.loop, steps=options.steps, validate_every=0, save_every=10 * options.steps)
    features = replace(config.features, speech_encoder=options.speech_encoder)
    flow = replace(config.flow, speech_encoder=True)
    config = replace(config, shards=(options.shard,), loop=loop, features=features, flow=flow)
    if options.data is None:
        return config
    units = replace(config.retarget, action_units=options.data / "ravdess_au" / "clip_means.npz")
    return replace(config, retarget=units, performances=options.data)


if __name__ == "__main__":
    main()
