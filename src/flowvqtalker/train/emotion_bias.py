"""Per-emotion bias correction of the expression flow, measured after training and stored with the flow (ours).

A flow shows what its training clips show on average: onsets, decays and weak clips included, and emotions of people
whose neutral face is unknown. The correction samples every emotion for neutral speakers of the training data and
compares the mean difference to neutral with what is wanted: the mean apex of the retargeted clips
(:mod:`flowvqtalker.data.retarget`) or, without those, the difference that the training people show, whose own faces are
removed first (:mod:`flowvqtalker.train.neutral_estimate`). What is missing is added at inference. Retargeted clips say
how far an emotion parts the lips; what people's clips say of that is left out, since a mouth that is always open never
closes on a b, m or p.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.likelihood import rollout
from flowvqtalker.motion.sampler import TEMPERATURE
from flowvqtalker.train.corpus import NEUTRAL, Corpus
from flowvqtalker.train.flow_stage import whole_clips
from flowvqtalker.train.sequences import SequenceDataset

__all__ = ["STRENGTH", "fit_emotion_bias"]

logger = logging.getLogger(__name__)

#: Factor on the mean difference to neutral: half a second at the height of a training clip shows that much more than
#: its mean (median over emotions; 1.20 contempt, 1.94 angry).
STRENGTH = 1.45
#: Neutral speakers that are sampled, their frames, and the first frame that counts: flows start from rest.
_SPEAKERS, _FRAMES, _FROM = 24, 60, 15


@torch.no_grad()
def fit_emotion_bias(
    flow: ExpFlow,
    corpus: Corpus,
    data: SequenceDataset,
    strength: float = STRENGTH,
    wanted: Mapping[int, Tensor] | None = None,
) -> None:
    """Set the buffer ``emotion_bias`` of a flow in eval mode.

    Arguments:
        flow: a flow trained on ``corpus``.
        corpus: clips of the training people.
        data: items of the corpus.
        strength: factor on the differences to neutral.
        wanted: differences (64,) by class that count instead of those of the training people, also in how far the lips
            part; of neutral, what is added to it.
    """
    flow.emotion_bias.zero_()
    clips = corpus.clips
    spoken = [
        n for n, clip in enumerate(clips) if clip.speech and corpus.labels[n] == NEUTRAL and len(clip.frames) > _FROM
    ]
    speakers = corpus.longest(spoken, _SPEAKERS)
    if not speakers:
        logger.warning("the data holds no neutral speaker: emotions are not corrected")
        return
    found = corpus.neutral_estimate().emotions
    device = flow.emotion_bias.device
    batch = whole_clips(corpus, speakers, data, _FRAMES)
    audio = flow.encode_speech(batch.windows.to(device))
    keep = batch.mask.to(device).clone()
    keep[:, :_FROM] = False
    faces = torch.stack([torch.from_numpy(corpus.neutral(n)) for n in speakers]).to(flow.emotion_bias)
    source = faces if flow.config.source else None

    def mean_of(label: int) -> torch.Tensor:
        emotion = torch.full((len(speakers),), label, device=device)
        generator = torch.Generator().manual_seed(0)  # the same noise for every emotion
        return rollout(flow, audio, emotion, generator, source=source, temperature=TEMPERATURE)[keep].mean(0)

    neutral = mean_of(NEUTRAL)
    opening = flow.opening / flow.opening.norm().clamp_min(1e-9)
    for label in found.keys() - {NEUTRAL} | (wanted or {}).keys():
        own = mean_of(label) - neutral
        if wanted is not None and label in wanted:
            flow.emotion_bias[label] = wanted[label].to(own) - own
        else:
            missing = strength * torch.from_numpy(found[label] - found[NEUTRAL]).to(own) - own
            flow.emotion_bias[label] = missing - (missing @ opening) * opening
