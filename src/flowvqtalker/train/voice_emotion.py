"""Stage ``voice-emotion``: the emotion of a voice, by logistic regression on the speech encoder's features.

Recordings come from ``speech.csv`` (columns file, source, speaker, emotion; files under ``speech/``) and from the clips
with speech of an acted emotion in ``clips.csv``. Each gives the statistics that a stream has after some seconds.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.audio import load
from flowvqtalker.loading import load_speech_encoder
from flowvqtalker.speech.features import windows
from flowvqtalker.speech.voice import VOICES, VoiceEmotion, VoiceState, spectrum

__all__ = ["Config", "Voice", "cross_validate", "fit_voice", "listen", "run"]

logger = logging.getLogger(__name__)

#: Labels of the sets that are one of ours. (EmoDB's boredom is none.)
_ALIASES = {"calm": "neutral"}
#: Seconds of loud speech after which a recording gives a sample; its end gives one more.
_MOMENTS = (1.0, 2.0)


@dataclass(frozen=True)
class Config:
    """Configuration of the stage."""

    recordings: Path = Path("data")
    """Folder with speech.csv and speech/, and optionally clips.csv and clips/."""
    clip_sources: tuple[str, ...] = ("CREMA-D", "MEAD")
    """Sources of clips.csv whose speakers act the emotion with their voice too."""
    ordinary: int = 40
    """Clips of each other source with speech, as neutral: ordinary talk is livelier than an actor's neutral."""
    weights: Path | None = None
    """Folder of weights with the speech encoder; None: the package's own."""
    l2: float = 0.02
    """Weight of half the squared coefficients beside the mean cross-entropy."""
    folds: int = 4
    """Folds by speaker of the cross-validation before the final fit; 0: none."""


@dataclass(frozen=True)
class Voice:
    """One recording.

    Attributes:
        source, speaker: text.
        label: number in :data:`~flowvqtalker.speech.voice.VOICES`.
        samples: (n, K) statistics after some seconds; the last ones at the end.
    """

    source: str
    speaker: str
    label: int
    samples: Tensor


def _recordings(config: Config) -> Iterator[tuple[Path, str, str, str]]:
    """File, source, speaker and emotion of every recording with an emotion that the stage knows."""
    root = config.recordings
    ordinary: dict[str, list[tuple[Path, str, str, str]]] = defaultdict(list)
    for table, folder, speaker in (("speech.csv", "speech", "speaker"), ("clips.csv", "clips", "identity")):
        if not (root / table).is_file():
            continue
        with open(root / table, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                emotion = _ALIASES.get(row["emotion"], row["emotion"])
                acted = table == "speech.csv" or row["source"] in config.clip_sources
                if table == "clips.csv" and row["speech"] != "yes":
                    continue
                if not acted and emotion in ("neutral", "natural"):
                    ordinary[row["source"]].append(
                        (root / folder / row["file"], row["source"], row[speaker], "neutral")
                    )
                elif acted and emotion in VOICES:
                    yield root / folder / row["file"], row["source"], row[speaker], emotion
    random = np.random.default_rng(0)
    for clips in ordinary.values():
        yield from (clips[i] for i in random.permutation(len(clips))[: config.ordinary])


def listen(features: Tensor, mels: Tensor) -> Tensor:
    """Statistics (n, K) after some seconds of a recording, from features (T, width) and spectra (T, 80)."""
    state, samples = VoiceState(), []
    for feature, mel in zip(features, mels, strict=True):
        if state.push(feature, mel) and state.heard in [round(moment * FPS) for moment in _MOMENTS]:
            samples.append(state.statistics())
    return torch.stack([*samples, state.statistics()])


def fit_voice(voices: Sequence[Voice], width: int, l2: float) -> VoiceEmotion:
    """A regression on all samples, the classes balanced, by L-BFGS from zero: the same data give the same weights."""
    x = torch.cat([voice.samples for voice in voices])
    y = torch.cat([torch.full((len(voice.samples),), voice.label) for voice in voices])
    model = VoiceEmotion(width, x.shape[1] // 2 - width)
    model.centre, model.scale = x.mean(0), x.std(0).clamp_min(1e-4)
    model.linear.requires_grad_(True)
    count = torch.bincount(y, minlength=len(VOICES)).float()
    balance = count.sum() / (count.clamp_min(1) * (count > 0).sum())
    nn.init.zeros_(model.linear.weight)
    nn.init.zeros_(model.linear.bias)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y, weight=balance) + l2 / 2 * model.linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return model.eval()


@torch.no_grad()
def cross_validate(voices: Sequence[Voice], width: int, config: Config) -> dict[str, float]:
    """Share of recordings of unheard speakers that are recognised, at their end and after two seconds, by source.

    Beside each source stands its chance: one over the number of its emotions.
    """
    speakers = sorted({voice.speaker for voice in voices})
    np.random.default_rng(0).shuffle(speakers)
    right: dict[str, list[tuple[bool, bool]]] = {}
    acted = {voice.source for voice in voices if voice.label != VOICES.index("neutral")}
    for fold in range(config.folds):
        held = set(speakers[fold :: config.folds])
        with torch.enable_grad():
            model = fit_voice([voice for voice in voices if voice.speaker not in held], width, config.l2)
        for voice in voices:
            if voice.speaker in held:
                seen = model(voice.samples[[-1, min(1, len(voice.samples) - 1)]]).argmax(-1) == voice.label
                group = voice.source if voice.source in acted else "ordinary talk"
                for source in (group, "all"):
                    right.setdefault(source, []).append((bool(seen[0]), bool(seen[1])))
    results: dict[str, float] = {}
    for source, found in sorted(right.items()):
        labels = {voice.label for voice in voices if voice.source == source} or VOICES
        end, early = np.mean(found, axis=0).tolist()
        results |= {source: end, f"{source}, 2 s": early, f"{source}, chance": 1 / len(labels)}
    return results


def run(config: Config, out: Path, resume: bool = False) -> dict[str, float]:
    """Cross-validate, then fit to all speakers; writes ``weights.safetensors`` and ``config.json`` with the scores.

    Raises:
        UserError: if there is no recording.
    """
    encoder = load_speech_encoder(config.weights, exact=True)
    voices = []
    for path, source, speaker, emotion in tqdm(list(_recordings(config)), desc="listen", disable=None):
        heard = windows(load(path), encoder.config.frontend)
        with torch.inference_mode():
            samples = listen(encoder.encode_clip(heard), spectrum(heard))
        voices.append(Voice(source, speaker, VOICES.index(emotion), samples.clone()))
    return store(voices, encoder.config.width, config, out)


def store(voices: Sequence[Voice], width: int, config: Config, out: Path) -> dict[str, float]:
    """Scores of a cross-validation, and the weights fitted to all voices, in a run's folder."""
    if len({voice.label for voice in voices}) < 2:
        raise UserError(f"{config.recordings} holds no speech of two emotions; check speech.csv and clips.csv")
    scores = cross_validate(voices, width, config) if config.folds else {}
    for name, value in scores.items():
        logger.info("%s: %.3f", name, value)
    model = fit_voice(voices, width, config.l2)
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    atomic_write(out / "weights.safetensors", lambda path: path.write_bytes(content))
    about = {"stage": "voice-emotion", "step": 0, "scores": scores, "config": {"width": width}}
    text = json.dumps(about, indent=1) + "\n"
    atomic_write(out / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    return scores
