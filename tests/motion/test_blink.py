"""The typical blink, and when blinks come."""

from __future__ import annotations

import numpy as np
import torch

from flowvqtalker.motion.blink import BLINK_FRAMES, Blinks, measure_blinks


def clip_with_blinks(places: list[int], length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, 3) expression whose first coefficient is the lids, on a slow drift of the second; and the blink itself."""
    rng = np.random.default_rng(seed)
    shape = np.exp(-0.5 * ((np.arange(BLINK_FRAMES) - 5) / 1.2) ** 2)
    beta = 0.01 * rng.standard_normal((length, 3))
    beta[:, 1] += np.linspace(0, 2, length)
    for place in places:
        beta[place : place + BLINK_FRAMES, 0] += shape
    return beta.astype(np.float32), shape


def test_the_typical_blink_is_recovered_and_counted() -> None:
    lids = np.array([0.9, 0, 0, 0.05], np.float32)
    clips = [clip_with_blinks([20, 80, 130], 200, seed)[0] for seed in range(5)]
    template, rate = measure_blinks(clips, lids)
    shape = clip_with_blinks([], 1, 0)[1]
    assert np.allclose(template[:, 0].numpy(), shape - np.linspace(shape[0], shape[-1], BLINK_FRAMES), atol=0.03)
    assert template[:, 1:].abs().max() < 0.03  # the drift is no part of it
    assert rate == 15 / (1000 / 25 / 60)


def test_no_blink_gives_zeros() -> None:
    template, rate = measure_blinks([clip_with_blinks([], 100, 0)[0]], np.array([0.9, 0, 0, 0.05], np.float32))
    assert rate == 0
    assert template.shape == (BLINK_FRAMES, 3)
    assert template.abs().sum() == 0


def starts(rate: float, seed: int, frames: int) -> list[int]:
    """Frames at which a blink begins."""
    blinks = Blinks(torch.ones(BLINK_FRAMES, 2), rate, seed)
    on = torch.cat([blinks.next() for _ in range(frames)])[:, 0] > 0
    return [t for t in range(1, frames) if on[t] and not on[t - 1]]


def test_blinks_come_at_the_rate_and_not_in_step() -> None:
    minutes = 40
    found = starts(18, 0, minutes * 60 * 25)
    assert abs(len(found) / minutes - 18) < 2.5  # Poisson: one standard deviation is 0.7
    pauses = np.diff(found)
    assert pauses.min() >= BLINK_FRAMES
    assert pauses.std() > 0.5 * pauses.mean()
    assert starts(18, 0, 3000) == starts(18, 0, 3000) != starts(18, 1, 3000)
    assert starts(0, 0, 3000) == []


def test_strength_varies_by_a_tenth_around_the_template() -> None:
    blinks = Blinks(torch.ones(BLINK_FRAMES, 2), 60, 3)
    values = torch.cat([blinks.next() for _ in range(3000)])[:, 0]
    shown = values[values > 0]
    assert 0.9 <= shown.min() < 0.95
    assert 1.05 < shown.max() <= 1.1
