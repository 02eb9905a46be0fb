"""Eyes that an emotion would shut, and brows that it would press into them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from flowvqtalker.face.arkit import ARKIT_NAMES, arkit_index
from flowvqtalker.motion.eyes import _BROW_GAPS, _LID_GAPS, EyeLimiter
from flowvqtalker.motion.gaps import Gaps

from .test_smile import shape


def make(face):
    return EyeLimiter(face, torch.zeros(80), torch.zeros(64))


def measure(face, gaps, expression):
    """Gaps as shares of those at rest, read off the vertices."""
    points = face.mean + torch.einsum("td,dvc->tvc", expression, face.expression)
    sizes = [points[:, low, 1].mean(1) - points[:, up, 1].mean(1) for up, low in (map(list, pair) for pair in gaps)]
    rest = [face.mean[list(low), 1].mean() - face.mean[list(up), 1].mean() for up, low in gaps]
    return torch.stack(sizes, 1) / torch.stack(rest)


def test_gaps_are_distances_between_vertices(face):
    motion = 0.1 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    gaps = Gaps(face, torch.zeros(80), _BROW_GAPS, (1, 4), 1e-5)
    shares = gaps.measure(motion) / gaps.measure(torch.zeros(64))
    assert torch.allclose(shares.float(), measure(face, _BROW_GAPS, motion), atol=1e-4)
    by = torch.tensor([[0.02, 0.02, 0.01, 0.01]]).double().expand(5, -1)
    assert torch.allclose(gaps.measure(gaps.widen(motion, by)), gaps.measure(motion) + by, atol=2e-3)


def closing(face):
    """The β that shuts the eyes exactly."""
    blink = shape(face, "eyeBlink")
    return blink / (1 - float(measure(face, _LID_GAPS, blink[None]).mean()))


def test_narrow_eyes_are_held_open_and_blinks_still_shut_them(face):
    shut = closing(face)
    narrow = (0.9 * shut).expand(50, -1).clone()
    narrow[30:34] += 0.8 * shut
    opening = measure(face, _LID_GAPS, make(face)(narrow)).mean(1)
    assert opening[:30] == pytest.approx(0.45 * torch.ones(30), abs=0.03)
    assert opening[30:34].max() < 0
    assert opening[34:].max() < 0.8


def test_open_eyes_and_single_blinks_are_left_alone(face):
    motion = 0.1 * torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    motion[20:24] += closing(face)
    limiter = make(face)
    cut = torch.cat([limiter(part) for part in motion.split([1, 0, 22, 37])])
    assert torch.equal(cut, motion)


@pytest.mark.parametrize(("name", "free", "end"), [("browDown", 0.65, 0.3), ("browInnerUp", 1.4, 1.65)])
def test_brows_move_ever_less_and_only_so_far(face, name, free, end):
    rows = face.arkit[[arkit_index(n) for n in ARKIT_NAMES if n.startswith(name)], :-1]
    shape = torch.linalg.pinv(rows) @ torch.ones(len(rows))
    sign = 1 if end > 1 else -1
    found = []
    for strength in (0.2, 0.5, 1.0, 2.0, 4.0):
        motion = (strength * shape).expand(12, -1)
        held = make(face)(motion)
        before, after = (measure(face, _BROW_GAPS, x[-1:])[0] for x in (motion, held))
        found.append(sign * after)
        assert torch.equal(held, motion) == bool((sign * before <= sign * free).all())
        if strength <= 2:
            points = torch.einsum("d,dvc->vc", held[-1] - motion[-1], face.expression)
            assert points[[61, 291, 13, 14, 159, 386]].abs().max() < 0.02
    assert all((low < high).all() for low, high in pairwise(gaps[:2] for gaps in found))  # of the inner brows
    assert (sign * before).max() > sign * end + 0.4
    assert (found[-1] < sign * end + 0.1).all()
