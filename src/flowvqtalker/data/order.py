"""Orders of data as pure functions of a seed and a number: a resumed run reads what the first would have read."""

from __future__ import annotations

import numpy as np

__all__ = ["item_generator", "shuffled"]

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """A 64-bit finaliser (splitmix64): every input bit changes every output bit half of the time."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def shuffled(i: int, n: int, seed: int) -> int:
    """Number in [0, n) of item ``i`` (any i >= 0) of an endless sequence of shuffled epochs of ``n`` items.

    Within each epoch (i // n) every number occurs once. A Feistel network over the next power of four, walked until
    the value is below n: no table, no state.
    """
    if n <= 0 or i < 0:
        raise ValueError(f"n must be positive and i not negative, got n = {n}, i = {i}")
    epoch, value = divmod(i, n)
    half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(_mix(seed & _MASK) ^ epoch)
    while True:
        left, right = value >> half, value & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ (right << 3 | turn)) & mask)
        value = left << half | right
        if value < n:
            return value


def item_generator(seed: int, i: int) -> np.random.Generator:
    """Random numbers of item ``i``."""
    return np.random.Generator(np.random.PCG64([seed, i]))
