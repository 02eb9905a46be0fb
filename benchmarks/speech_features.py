"""How well lips can be predicted from speech features, on held-out people: the same small regressor on each kind.

    python benchmarks/speech_features.py SHARD [--kinds mel encoder whisper] [--whisper FOLDER] [--speech-encoder RUN]

``mel`` trains the small audio encoder on log-mel windows, ``encoder`` reads the features of the frozen speech encoder,
and ``whisper`` those of the whole pretrained encoder (it sees the whole recording and cannot follow a stream). The
regressor learns from the shard's training clips with speech to predict the lips' shape around the clip's mean.
Prints: correlation of the lip opening with the real clip's, mean over each held-out person's clips and over people.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from motion_scores import correlation
from torch import Tensor, nn

from flowvqtalker.data.shards import Shard
from flowvqtalker.loading import load_face_model, load_speech_encoder
from flowvqtalker.speech.encoder import AudioConfig, AudioEncoder
from flowvqtalker.speech.features import log_mel
from flowvqtalker.train.corpus import MotionClip
from flowvqtalker.train.flow_stage import lip_directions, lip_gap
from flowvqtalker.train.flow_stage import load_speech_encoder as load_run

_FRAMES, _BATCH, _WORST = 32, 16, 0.1


@dataclass
class Example:
    """A clip: features (T, F) or windows (T, 80, 16), expression (T, 64), and who it is."""

    inputs: Tensor
    expression: Tensor
    identity: str


class Regressor(nn.Module):
    """Features or windows, with 5 frames before and 3 after, to β."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.encoder = AudioEncoder(AudioConfig())
        width = self.encoder.config.width
        if size is not None:
            self.encoder.window = nn.Sequential(
                nn.LayerNorm(size), nn.Dropout(0.1), nn.Linear(size, width), nn.LayerNorm(width)
            )
            self.encoder.embed = self.encoder.window.forward  # type: ignore[method-assign]
        self.out = nn.Linear(width, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        batch, count = inputs.shape[:2]
        features = self.encoder.embed(inputs.flatten(0, 1)).view(batch, count, -1)
        result: Tensor = self.out(self.encoder.mix(features))
        return result


def examples(shard: Shard, split: str, kind: str, options: argparse.Namespace) -> list[Example]:
    """The clips of a split with speech; of the training clips only those whose lips follow their sound."""
    speech_encoder = teacher = None
    if kind == "encoder":
        speech_encoder = (
            load_speech_encoder() if options.speech_encoder is None else load_run(options.speech_encoder)[0]
        )
    elif kind == "whisper":
        from flowvqtalker.data.teacher import Teacher

        teacher = Teacher(options.whisper)
    found = []
    for number in shard.select(split, speech=True, is_image=False, min_length=12):
        if split == "train" and shard.correlation[number] < _WORST:
            continue
        beta = torch.from_numpy(np.array(shard.expression[shard.rows(int(number))], np.float32))
        wave, who, index = shard.wave(int(number)), str(shard.identity[number]), np.arange(len(beta))
        if teacher is not None:
            inputs = torch.from_numpy(teacher(wave, len(beta))).half()
        else:
            frontend = "mel" if speech_encoder is None else speech_encoder.config.frontend
            clip = MotionClip(beta.numpy(), log_mel(wave, frontend).astype(np.float16), 0, True, who, frontend=frontend)
            inputs = torch.from_numpy(clip.windows(index)).half()
            if speech_encoder is not None:
                inputs = speech_encoder.encode_clip(inputs.float()).half()
        found.append(Example(inputs, beta, who))
    return found


def cut(example: Example, start: int, count: int) -> Tensor:
    """Inputs of some frames and their neighbourhood, the outermost repeated."""
    config = AudioConfig()
    index = torch.arange(start - config.lookback, start + count + config.lookahead)
    return example.inputs[index.clamp(0, len(example.inputs) - 1)].float()


def score(model: Regressor, held_out: list[Example], gap: Tensor) -> dict[str, float]:
    """Correlation of the lip opening, mean over each person's clips."""
    people: dict[str, list[float]] = {}
    model.eval()
    with torch.inference_mode():
        for one in held_out:
            opening = model(cut(one, 0, len(one.inputs))[None])[0] @ gap
            people.setdefault(one.identity, []).append(correlation(opening.numpy(), (one.expression @ gap).numpy()))
    model.train()
    return {who: float(np.mean(values)) for who, values in people.items()}


def main() -> None:
    """Train each regressor and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["mel", "encoder"], choices=["mel", "encoder", "whisper"])
    parser.add_argument("--whisper", type=Path, help="Whisper base for CTranslate2")
    parser.add_argument("--speech-encoder", type=Path, help="run of the stage speech; default: the package's weights")
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shard, face = Shard(options.shard), load_face_model()
    lips, gap = lip_directions(face.expression), lip_gap(face.expression)
    for kind in options.kinds:
        train, held_out = (examples(shard, split, kind, options) for split in ("train", "val"))
        torch.manual_seed(0)
        random = np.random.default_rng(0)
        model = Regressor(None if train[0].inputs.ndim == 3 else train[0].inputs.shape[1])
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, options.steps + 1, pct_start=0.1)
        total: dict[str, int] = {}
        for one in train:
            total[one.identity] = total.get(one.identity, 0) + len(one.inputs)
        weights = np.array([len(one.inputs) / total[one.identity] ** 0.5 for one in train])
        started = time.perf_counter()
        for _ in range(options.steps):
            chosen = [train[i] for i in random.choice(len(train), _BATCH, p=weights / weights.sum())]
            starts = [int(random.integers(max(1, len(one.inputs) - _FRAMES + 1))) for one in chosen]
            target, mask = torch.zeros(_BATCH, _FRAMES, lips.shape[1]), torch.zeros(_BATCH, _FRAMES, 1)
            for row, (one, start) in enumerate(zip(chosen, starts, strict=True)):
                part = ((one.expression - one.expression.mean(0)) @ lips)[start : start + _FRAMES]
                target[row, : len(part)], mask[row, : len(part)] = part, 1
            inputs = torch.stack([cut(one, start, _FRAMES) for one, start in zip(chosen, starts, strict=True)])
            error = ((model(inputs) @ lips - target) * mask).square().sum()
            optimizer.zero_grad()
            (error / target.square().sum()).backward()
            optimizer.step()
            schedule.step()
        scores = score(model, held_out, gap)
        people = ", ".join(f"{who} {value:.3f}" for who, value in sorted(scores.items()))
        seconds = time.perf_counter() - started
        print(f"{kind}: {np.mean(list(scores.values())):.3f} ({len(scores)} people: {people}; {seconds:.0f} s)")


if __name__ == "__main__":
    main()
