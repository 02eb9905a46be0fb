"""What the drawn frames of an emotion lack of it: measured after training, and kept with the flow.

Most people of whom there is an emotional clip are not seen neutral, so that a source tells a flow who it is and at the
same time how it looks in that emotion. The flow learns to keep what the source shows, and drawn for a calm portrait an
emotion comes out weak, or as the faces of the few people who showed it. So calm speakers of the training data are drawn
in every emotion, and the mean difference to neutral that comes out is compared with the one that the training people
show, with the people themselves taken out (:mod:`flowvqtalker.train.neutral_estimate`). The rest is added in use, but
for what of it parts the lips: a mouth that hangs open throughout would never close on a b, m or p, and bared teeth are
taken for a laugh (by viewers; the classifier of motion takes them for anger).

    python -m flowvqtalker.train.emotion_bias RUN SHARD [--speech-encoder RUN]   (a run exported without)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.sampler import SOURCE, TEMPERATURE
from flowvqtalker.train.flow_stage import load_speech_encoder, whole_clips
from flowvqtalker.train.neutral_estimate import estimate_neutral
from flowvqtalker.train.sequences import CALM, NEUTRAL, Corpus, SequenceConfig, SequenceDataset, load_corpus

__all__ = ["STRENGTH", "fit_emotion_bias"]

logger = logging.getLogger(__name__)

#: Of the mean difference to neutral: what training clips show for half a second at their height, as a share of their
#: mean (1.45 is the median of the emotions; 1.20 contempt, 1.94 angry).
STRENGTH = 1.45
#: Calm speakers that are drawn, their frames, and the first of them that counts: flows start from rest.
_SPEAKERS, _FRAMES, _FROM = 24, 60, 15


@torch.no_grad()
def fit_emotion_bias(flow: ExpFlow, corpus: Corpus, data: SequenceDataset, strength: float = STRENGTH) -> None:
    """Set the buffer ``emotion_bias`` of a flow in eval mode.

    Arguments:
        flow: trained on ``corpus``.
        corpus: clips of training people.
        data: items of the corpus.
        strength: factor on the differences to neutral.
    """
    flow.emotion_bias.zero_()
    alike = [NEUTRAL if clip.emotion in CALM else clip.emotion for clip in corpus.clips]
    longest: dict[str, int] = {}
    for number, clip in enumerate(corpus.clips):
        if clip.speech and alike[number] == NEUTRAL and len(clip.frames) > _FROM:
            other = longest.get(clip.identity)
            if other is None or len(clip.frames) > len(corpus.clips[other].frames):
                longest[clip.identity] = number
    speakers = sorted(longest.values(), key=lambda n: (-len(corpus.clips[n].frames), n))[:_SPEAKERS]
    if not speakers or NEUTRAL not in alike:
        logger.warning("no calm speaker in the data: emotions are left as they are drawn")
        return
    found = estimate_neutral(corpus.means, alike, [clip.identity for clip in corpus.clips]).emotions
    device = flow.emotion_bias.device
    batch = whole_clips(corpus, speakers, data, _FRAMES)
    audio = flow.encode_speech(batch.windows.to(device))
    keep = batch.mask.to(device).clone()
    keep[:, :_FROM] = False
    faces = SOURCE * torch.stack([torch.from_numpy(corpus.neutral(n)) for n in speakers]).to(flow.emotion_bias)
    source = faces if flow.config.source else None

    def drawn(label: int) -> torch.Tensor:
        emotion = torch.full((len(speakers),), label, device=device)
        generator = torch.Generator().manual_seed(0)  # the same noise for every emotion
        return flow.rollout(audio, emotion, generator, source=source, temperature=TEMPERATURE)[keep].mean(0)

    calm = drawn(NEUTRAL)
    for label in found.keys() - {NEUTRAL}:
        wanted = strength * torch.from_numpy(found[label] - found[NEUTRAL]).to(flow.emotion_bias)
        flow.emotion_bias[label] = wanted - (drawn(label) - calm)
    if flow.opening.any():
        opening = flow.opening / flow.opening.norm()
        flow.emotion_bias.sub_((flow.emotion_bias @ opening)[:, None] * opening)


def main() -> None:
    """Fit the bias of a run in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--speech-encoder", type=Path)
    parser.add_argument("--strength", type=float, default=STRENGTH)
    options = parser.parse_args()
    file = options.run / "weights.safetensors"
    state, about = load_file(str(file)), json.loads((options.run / "config.json").read_text(encoding="utf-8"))
    speech_encoder = None if options.speech_encoder is None else load_speech_encoder(options.speech_encoder)[0]
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    flow = ExpFlow.load(floats, about["config"], speech_encoder)
    config = dataclasses.replace(SequenceConfig(), degraded=0.0)
    corpus = load_corpus([options.shard], "train", config, frontend=flow.audio.config.frontend)
    fit_emotion_bias(
        flow, corpus, SequenceDataset(corpus, config, flow.audio.config, flow.config.history), options.strength
    )
    state.update({key: value.half() for key, value in flow.own_state().items() if key in flow.optional})
    temporary = file.with_suffix(".part")
    save_file(state, str(temporary))
    os.replace(temporary, file)


if __name__ == "__main__":
    main()
