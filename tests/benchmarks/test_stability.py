"""Temporal stability: closed forms and brute force."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

SIDE = 32


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    """The figures of frames and of the flows between them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "stability", raising=False)
    import stability

    def run(frames, flows, codes=None, valid=None):
        everywhere = np.ones(frames[0].shape[:2], bool)
        found = stability.Stability(0.4, everywhere if valid is None else valid)
        for t, frame in enumerate(frames):
            found.add(frame, flows[t - 1] if t else None, codes[t] if codes else None)
        return found.result()

    return run


def flat(*levels: int) -> list[np.ndarray]:
    return [np.full((SIDE, SIDE, 3), level, np.uint8) for level in levels]


def test_a_flickering_still_video_has_a_closed_form(measure) -> None:
    rest = np.zeros((2, SIDE, SIDE), np.float32)
    values = measure(flat(100, 103, 100, 103), [rest] * 3)
    assert values == {"codes": None, "flicker": 6, "change": 3, "warping": None, "still": 100}
    fade = measure(flat(10, 12, 14, 16), [rest] * 3)  # changes, but does not flicker
    assert fade["flicker"] == 0 and fade["change"] == 2


def test_the_warping_error_of_a_moved_image_is_zero(measure) -> None:
    wide = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE + 8, 3), dtype=np.uint8)
    frames = [np.ascontiguousarray(wide[:, t : t + SIDE]) for t in (0, 2, 4)]  # the scene goes left by 2 a frame
    flow = np.stack([np.full((SIDE, SIDE), 2.0, np.float32), np.zeros((SIDE, SIDE), np.float32)])
    inside = np.zeros((SIDE, SIDE), bool)
    inside[:, : SIDE - 2] = True
    values = measure(frames, [flow, flow], valid=inside)
    assert values["warping"] == pytest.approx(0, abs=1e-4) and values["change"] is None and values["still"] == 0
    assert measure(frames, [-flow, -flow], valid=inside)["warping"] > 50


def test_figures_by_brute_force(measure) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(4)]
    flows = [rng.normal(0, 0.2, (2, SIDE, SIDE)).astype(np.float32) for _ in range(3)]
    codes = [rng.integers(0, 3, (16, 16)) for _ in range(4)]
    valid = rng.random((SIDE, SIDE)) < 0.7
    change, flicker, changed = [], [], []
    for t in range(1, 4):
        still = np.hypot(*flows[t - 1]) < 0.4
        for y, x in np.argwhere(still & valid):
            change.append(np.abs(frames[t][y, x].astype(float) - frames[t - 1][y, x]).mean())
            if t >= 2 and np.hypot(*flows[t - 2][:, y, x]) < 0.4:
                a, b, c = (frames[t - k][y, x].astype(float) for k in (2, 1, 0))
                flicker.append(np.abs(a - 2 * b + c).mean())
        for i, j in np.ndindex(16, 16):
            if still[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].all():
                changed.append(codes[t][i, j] != codes[t - 1][i, j])
    values = measure(frames, flows, codes, valid)
    assert values["change"] == pytest.approx(np.mean(change), rel=1e-5)
    assert values["flicker"] == pytest.approx(np.mean(flicker), rel=1e-5)
    assert values["codes"] == pytest.approx(100 * np.mean(changed))
