"""Model questions of the expression flow: variants that differ in one setting, trained and measured alike.

    python benchmarks/flow_questions.py SHARD --speech-encoder runs/speech -o runs/questions [--steps 1000] [--only K=8]

Every variant differs from the first, the default, in one setting. It is trained for the same number of steps on the
shard's training people and measured on its held-out people: negative log-likelihood in nats per frame, the measures of
``motion_quality.py`` on fewer clips and seeds, and the evaluator's accuracy on every emotion. A finished variant is not
trained again. The table is printed and written to OUT/questions.md and .json after each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from motion_quality import Bench, mean, plain, score_emotions
from motion_scores import motion_scores
from safetensors.torch import load_file

from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.sampler import ARTICULATION, MANIFOLD, TEMPERATURE
from flowvqtalker.train import expflow, flow_stage
from flowvqtalker.train.config import from_dict, load_yaml, to_dict
from flowvqtalker.train.corpus import Corpus, encode_corpus
from flowvqtalker.train.flow_stage import load_speech_encoder
from flowvqtalker.train.loop import fit
from flowvqtalker.train.sequences import load_corpus

#: Name -> changed settings by their path, and options of the sampling.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "K = 8": {"flow.steps": 8},
    "tau = 5": {"flow.history": 5},
    "nu = 5": {"flow.nu": 5.0},
    "Gaussian mixture": {"flow.latent": "gaussian-mixture"},
    "one Gaussian": {"flow.latent": "gaussian"},
    "learnt means": {"flow.learn_means": True},
    "full 1x1": {"flow.linear": "full"},
    "no data dropout": {"flow.dropout": 0.0},
    "data dropout 0.8": {"flow.dropout": 0.8},
    "no L_con": {"losses.consistency": 0.0},
    "no lip prior": {"flow.has_lip_prior": False, "losses.lips": 0.0},
    "no autoregressive prior": {"flow.ar_prior": False},
    "no retargeting": {"sequences.retarget_expression": 0.0},
    "no manifold": {"sampling.manifold": 0.0},
    "manifold 0.5": {"sampling.manifold": 0.5},
    "manifold 1": {"sampling.manifold": 1.0},
    "default, second seed": {"loop.seed": 1},
    "L_con x 10": {"losses.consistency": 0.3},
    "one bank for all emotions": {"sampling.bank": "shared"},
    "nu = 500": {"flow.nu": 500.0},
    "tau = 20": {"flow.history": 20},
    "estimated neutral faces": {"sequences.estimate": True},
}
#: How emotional clips were sampled when the questions were asked; the defaults have changed since.
_ASKED = {
    "sequences.estimate": False,
    "sequences.known_neutral": 0.7,
    "sequences.retarget_lips": 0.5,
    "sequences.retarget_expression": 0.6,
    "sequences.degraded": 0.0,
}
_COLUMNS = {
    "nll": "NLL (nats)",
    "M-LMD": "M-LMD",
    "F-LMD": "F-LMD",
    "opening generated-real": "lips r",
    "opening range generated/real": "lips range",
    "speed generated/real": "speed",
    "emotion accuracy": "emotion acc.",
    "diversity ratio": "diversity",
}


def changed(config: expflow.Config, settings: dict[str, Any]) -> expflow.Config:
    """The configuration with settings replaced by path."""
    values = to_dict(config)
    for path, value in settings.items():
        *parents, name = path.split(".")
        if parents[0] == "sampling":
            continue
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return from_dict(expflow.Config, values)


def bank_of(state: dict[str, torch.Tensor], shared: bool) -> LatentBank | None:
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
    face = flow_stage.face_model(None)
    lids = face.arkit[[arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]].mean(0)
    basis = torch.linalg.qr(flow_stage.lip_directions(face.expression))[0]
    lips, gap = (basis @ basis.mT).numpy(), flow_stage.lip_gap(face.expression).numpy()
    encoder, lip_prior = load_speech_encoder(options.speech_encoder)
    given = {"lips": lips, "gap": gap, "frontend": encoder.config.frontend}
    train, val = (load_corpus(base.shards, split, base.sequences, **given) for split in ("train", "val"))
    bench = Bench(options)
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
            if train.clips[0].features is None:
                encode_corpus(train, encoder, config.features.copies, base.loop.seed)
            drawn = config.sequences
            corpus = Corpus(train.clips, lips, gap, drawn.known_neutral, drawn.estimate)  # the same clips
            stage = expflow.ExpFlowStage(config, corpus, val, face.expression, lids, (encoder, lip_prior))
            fit(stage, config.loop, run, resume=(run / "checkpoint.pt").is_file())
        about = json.loads((run / "config.json").read_text())
        stored = load_file(str(run / "weights.safetensors"))
        state = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
        bench.expflow = ExpFlow.load(state, about["config"], encoder)
        bench.expflow.emotion_bias.zero_()  # measure the flow itself
        bench.bank = bank_of(state, shared=sampling.get("sampling.bank") == "shared")
        bench.sampling = {"manifold": sampling.get("sampling.manifold", MANIFOLD)}
        results[name] = {"nll": float(about["scores"]["nll"]), **measure(bench, chosen, options)}
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
    return changed(replace(config, shards=(options.shard,), loop=loop, features=features, flow=flow), _ASKED)


if __name__ == "__main__":
    main()
