"""What a portrait's smile needs so that another emotion shows."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.motion.smile import smile_correction

from .test_sampler import flows, run, windows  # noqa: F401  # fixtures


def shape(face, name):
    """The smallest change of β that raises a blendshape by one on both sides."""
    rows = face.arkit[[arkit_index(f"{name}Left"), arkit_index(f"{name}Right")], :-1]
    return torch.linalg.pinv(rows) @ torch.ones(2)


def test_smile_moves_corners_in_and_down_and_keeps_the_eyes(face):
    change = smile_correction(face, shape(face, "mouthSmile"))
    moved = torch.einsum("d,dvc->vc", change, face.expression)
    assert (moved[[61, 291], 1] > 0.03).all()
    assert moved[61, 0] > 0.01 > -0.01 > moved[291, 0]
    assert abs(moved[14, 1] - moved[13, 1]) < 0.008  # the speech opens the lips
    assert moved[[159, 145, 386, 374, 105, 334]].abs().max() < 0.006


def test_correction_grows_with_the_smile_and_needs_one(face):
    smile = shape(face, "mouthSmile")
    assert not smile_correction(face, 0 * smile).any()
    assert not smile_correction(face, -smile).any()
    sizes = [smile_correction(face, part * smile).norm() for part in (0.4, 0.7, 1.0, 2.0)]
    assert sizes[0] < sizes[1] < sizes[2] <= sizes[3]


def test_every_emotion_but_happy_is_corrected(flows, windows):  # noqa: F811
    correction = torch.linspace(0.1, 0.8, 8)

    def added(**settings):
        return run(flows, windows, correction=correction, **settings)[0] - run(flows, windows, **settings)[0]

    for settings, share in (
        ({"emotion": "sad"}, 1.0),
        ({"emotion": "neutral"}, 1.0),
        ({"emotion": "happy"}, 0.0),
        ({"emotion": "happy:1,sad:3"}, 0.75),
        ({"emotion": "happy", "intensity": 0.5}, 0.5),
        ({"emotion": None, "reference": torch.randn(9, 8)}, None),
    ):
        found = added(**settings) / correction
        assert torch.allclose(found, found[:1, :1].expand_as(found), atol=1e-4)
        assert share is None or float(found.mean()) == pytest.approx(share, abs=1e-5)
