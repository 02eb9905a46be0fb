"""The columns of Table 1: each measure says what it needs of a video and computes values of clip pairs or sets."""

from __future__ import annotations

from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, Options, SetScore, pair_frames

__all__ = ["ClipPair", "Measure", "Options", "SetScore", "all_measures", "pair_frames"]


def all_measures(options: Options) -> list[Measure]:
    """The measures that the options ask for, in the order of the table's columns.

    Raises:
        UserError: if a name is unknown.
    """
    from flowvqtalker_eval.tables.measures import emotion, image, motion, sync

    kinds = {kind.name: kind for module in (image, sync, emotion, motion) for kind in module.MEASURES}
    unknown = [name for name in (*options.metrics, *options.require) if name not in kinds]
    if unknown:
        raise UserError(f"unknown metric {', '.join(unknown)}; choose from {', '.join(kinds)}")
    wanted = {*options.metrics, *options.require}
    return [kind(options) for name, kind in kinds.items() if not options.metrics or name in wanted]
