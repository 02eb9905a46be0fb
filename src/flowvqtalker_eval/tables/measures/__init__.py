"""The columns of Table 1: each measure says what it needs of a video and what it makes of a pair."""

from __future__ import annotations

from typing import Any

from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.measures.base import Both, Measure, Options, Whole, pair_frames

__all__ = ["Both", "Measure", "Options", "Whole", "all_measures", "pair_frames"]


def all_measures(options: Options) -> list[Measure]:
    """Every measure in the order of the table's columns, or those that were asked for.

    Raises:
        UserError: if a name is unknown.
    """
    from flowvqtalker_eval.tables.measures import emotion, motion, picture, sync

    kinds: tuple[Any, ...] = (*picture.MEASURES, *sync.MEASURES, *emotion.MEASURES, *motion.MEASURES)
    names = [kind.name for kind in kinds]
    unknown = [name for name in (*options.only, *options.require) if name not in names]
    if unknown:
        raise UserError(f"unknown metric {', '.join(unknown)}; choose from {', '.join(names)}")
    wanted = set(options.only) | set(options.require)
    return [kind(options) for kind in kinds if not options.only or kind.name in wanted]
