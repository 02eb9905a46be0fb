"""Which clips a participant sees, and in which order: balanced like a Latin square.

With I items (contents), M methods and n clips a participant, participant r takes the slots r·n, ..., r·n + n - 1 of one
endless list, in which slot s is item s mod I shown by method (s mod I + s div I) mod M. So

- nobody sees a clip twice, and an item comes back only when all have been seen,
- the methods of one participant differ in number by four at most, by two where I is a multiple of M,
- after I·M / gcd(n, I·M) participants every clip has been seen equally often.

The clips are shown in blocks that hold each method once; the order in the blocks follows a Williams square, in which
every method stands equally often in each place and (M even; M odd: over two squares) after each other method. Which of
a method's clips comes next is random, away from the last showing of the same item.
"""

from __future__ import annotations

import random

__all__ = ["assign", "insert_checks", "make_plan", "order", "williams"]

#: (item, method), both counted from 0.
Pair = tuple[int, int]


def williams(methods: int) -> list[list[int]]:
    """Rows of a Williams square: M rows for an even number of methods, 2M (the second half mirrored) for an odd one.

    References:
        E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949.
    """
    first = [0]
    low, high = 1, methods - 1
    while len(first) < methods:
        first.append(low if len(first) % 2 else high)
        if len(first) % 2 == 0:
            low += 1
        else:
            high -= 1
    rows = [[(entry + shift) % methods for entry in first] for shift in range(methods)]
    return rows + [row[::-1] for row in rows] if methods % 2 and methods > 1 else rows


def assign(rater: int, items: int, methods: int, count: int) -> list[Pair]:
    """The clips of a participant; see the module.

    Arguments:
        rater: number of the participant from 0.
        items: number of contents.
        methods: number of methods.
        count: clips a participant, at most items * methods.
    """
    slots = range(rater * count, (rater + 1) * count)
    return [(slot % items, (slot % items + slot // items) % methods) for slot in slots]


def order(pairs: list[Pair], methods: int, rater: int, rng: random.Random) -> list[Pair]:
    """Put a participant's clips in order: in blocks of all methods, an item's clips far from each other."""
    waiting: list[list[Pair]] = [[pair for pair in pairs if pair[1] == method] for method in range(methods)]
    for group in waiting:
        rng.shuffle(group)
    square = williams(methods)
    shown: dict[int, int] = {}  # item -> place of its last showing
    result: list[Pair] = []
    block = rater
    while len(result) < len(pairs):
        for method in square[block % len(square)]:
            if waiting[method]:
                pair = min(waiting[method], key=lambda pair: shown.get(pair[0], -1))
                waiting[method].remove(pair)
                shown[pair[0]] = len(result)
                result.append(pair)
        block += 1
    return result


def insert_checks(row: list[str], checks: list[str], rng: random.Random) -> list[str]:
    """Spread attention checks over an order: one somewhere in the middle half of each of as many equal parts."""
    result = list(row)
    part = len(row) / max(len(checks), 1)
    shuffled = rng.sample(checks, len(checks))
    places = [round(part * (index + 0.25 + 0.5 * rng.random())) for index in range(len(checks))]
    for place, check in sorted(zip(places, shuffled, strict=True), reverse=True):
        result.insert(place, check)
    return result


def make_plan(
    ids: list[list[str]], checks: list[str], raters: int, count: int, rng: random.Random
) -> tuple[tuple[str, ...], ...]:
    """Orders for all participants.

    Arguments:
        ids: clip of each item and method, ``ids[item][method]``; the items are shuffled here.
        checks: attention checks, shown to everybody.
        raters: number of orders.
        count: rated clips a participant.
        rng: where the chance comes from.

    Returns:
        ``raters`` rows of ``count + len(checks)`` identifiers.
    """
    items, methods = rng.sample(ids, len(ids)), len(ids[0])
    rows = []
    for rater in range(raters):
        pairs = order(assign(rater, len(items), methods, count), methods, rater, rng)
        rows.append(tuple(insert_checks([items[item][method] for item, method in pairs], checks, rng)))
    return tuple(rows)
