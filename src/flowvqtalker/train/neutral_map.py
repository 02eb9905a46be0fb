"""Neutral face of a person from one expression, a linear regression learned across people.

A portrait's expression is the person's neutral face and the expression of the moment. Frames of people whose neutral
face is known, neutral, emotional and retargeted, and people photographed neutral and smiling tell the two apart: what
differs between people stays, what differs within a person goes. The map is a ridge regression, in which every person
counts the same; each is also shown with other people's smiles, up to nearly twice as broad. What it leaves of a broad
smile is taken off: neutral faces hardly differ in the blendshape of a smile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowvqtalker.face.fit import fit
from flowvqtalker.face.model import FaceModel
from flowvqtalker.train.corpus import NEUTRAL, Corpus
from flowvqtalker.train.identity_split import SMILE, Pair

__all__ = ["learn_neutral_map"]

#: Frames per person, and the weight of a person's samples together (of a pair of pictures: two each).
_FRAMES, _WEIGHT = 90, 2.0
#: Smiles of others that each person is shown with, their weight together, and the largest, in smiles.
_SMILES, _SMILE_WEIGHT, _BROADEST = 20, 6.0, 1.8


def learn_neutral_map(model: FaceModel, corpus: Corpus, pairs: Sequence[Pair], ridge: float = 1.0) -> Tensor:
    """Map (64, 65) from [β, 1] of any expression to the person's neutral face.

    Arguments:
        model: fits the pairs' landmarks.
        corpus: clips of training people.
        pairs: training people seen neutral and smiling.
        ridge: penalty on the squared map.
    """
    random = np.random.default_rng(0)
    inputs, targets, weights = [], [], []
    known = {corpus.clips[number].identity for number, label in enumerate(corpus.labels) if label == NEUTRAL}
    for identity, numbers in corpus.people.items():
        if identity not in known:
            continue
        drawn = random.choice(numbers, _FRAMES)
        frames = np.stack([corpus.clips[n].frames[random.integers(len(corpus.clips[n].frames))] for n in drawn])
        inputs.append(frames)
        targets.append(np.repeat(corpus.neutral(int(numbers[0]))[None], len(frames), axis=0))
        weights.append(np.full(len(frames), _WEIGHT / len(frames)))
    people = [target[0] for target in targets]
    smiles = []
    for pair in pairs:
        neutral, smiling = (fit(model, landmarks).expression[0] for landmarks in (pair.neutral, pair.smiling))
        inputs.append(np.stack([neutral, smiling]))
        targets.append(np.stack([neutral, neutral]))
        weights.append(np.full(2, _WEIGHT))
        people.append(neutral)
        smiles.append(smiling - neutral)
    for neutral in people if smiles else []:
        breadth = random.uniform(0, _BROADEST, (_SMILES, 1))
        inputs.append(neutral + breadth * np.stack(smiles)[random.integers(len(smiles), size=_SMILES)])
        targets.append(np.repeat(neutral[None], _SMILES, axis=0))
        weights.append(np.full(_SMILES, _SMILE_WEIGHT / _SMILES))
    x, y, weight = (np.concatenate(part).astype(np.float64) for part in (inputs, targets, weights))
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = ridge * np.eye(design.shape[1])
    penalty[-1, -1] = 1e-6  # the mean face is free
    weighted = design * weight[:, None]
    found = np.linalg.solve(weighted.T @ design + penalty, weighted.T @ y).T
    if smiles:
        shown = model.arkit[list(SMILE)].mean(0).cpu().numpy()  # of [β, 1]
        direction = np.mean(smiles, axis=0)
        rest = shown[:-1] @ found + np.eye(len(shown))[-1] * shown[-1]
        found -= np.outer(direction / (direction @ shown[:-1]), rest)
    return torch.from_numpy(found.astype(np.float32))
