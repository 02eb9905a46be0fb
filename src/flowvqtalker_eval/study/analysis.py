"""From answers to the paper's Table 2: means with intervals, emotion accuracy, agreement, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study import agreement
from flowvqtalker_eval.study.answers import Answer
from flowvqtalker_eval.study.key import CHOICES, SCALE, Key

__all__ = ["MEASURES", "Estimate", "Kappa", "Method", "Result", "analyse", "failed_checks"]

#: Rows of the table: name -> heading, as in the paper.
MEASURES = {"lip_sync": "Lip-sync", "quality": "Image quality", "emotion": "Acc_emo"}

#: What agreement is measured on: name -> (measure, whether the categories are ordered).
_KAPPAS = {
    "emotion": ("emotion", False),
    "lip_sync": ("lip_sync", False),
    "lip_sync_quadratic": ("lip_sync", True),
    "quality": ("quality", False),
    "quality_quadratic": ("quality", True),
}

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean (or a difference of means) and its 95 % interval; NaN where nothing was answered."""

    value: float
    low: float
    high: float
    answers: int


@dataclass(frozen=True)
class Kappa:
    """Fleiss' kappa and its 95 % interval over clips.

    Attributes:
        value: NaN where it is not defined.
        low: lower end.
        high: upper end.
        clips: clips that two or more answered.
        raters: mean number of raters of these.
    """

    value: float
    low: float
    high: float
    clips: int
    raters: float


@dataclass(frozen=True)
class Method:
    """What was found for one method.

    Attributes:
        name: of the method.
        raters: participants who rated a clip of it.
        clips: its clips that were rated.
        estimates: by measure.
        differences: to the method compared with, by measure; empty for that method itself.
        kappas: agreement among raters on its clips.
        confusion: (8, 8) answers by intended (rows) and chosen emotion.
    """

    name: str
    raters: int
    clips: int
    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]
    kappas: dict[str, Kappa]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Result:
    """Table 2 and everything that it rests on.

    Attributes:
        key: of the study.
        methods: in the order of the key.
        kappas: agreement on all clips together.
        raters: participants whose answers count.
        excluded: participants left out, with the number of attention checks that they failed.
        unchecked: participants who count without having answered all attention checks.
        unplayable: answers that say that a clip does not play.
        against: method that the differences are to.
        settings: how intervals were made.
        problems: input that could not be used, one line each.
    """

    key: Key
    methods: tuple[Method, ...]
    kappas: dict[str, Kappa]
    raters: tuple[str, ...]
    excluded: dict[str, int]
    unchecked: tuple[str, ...]
    unplayable: int
    against: str
    settings: dict[str, str | int | float]
    problems: tuple[str, ...]


def failed_checks(answers: Sequence[Answer], key: Key) -> dict[str, int]:
    """Number of attention checks that each participant answered otherwise than they asked; 0 is in it as well."""
    failed = {answer.rater: 0 for answer in answers}
    for answer in answers:
        expected = key.by_id[answer.clip].expected
        if expected is not None:
            wanted = (expected.lip_sync, expected.quality, expected.emotion)
            failed[answer.rater] += not answer.problem and wanted != (answer.lip_sync, answer.quality, answer.emotion)
    return failed


def analyse(
    answers: Sequence[Answer],
    key: Key,
    *,
    problems: Sequence[str] = (),
    allowed_failures: int = 0,
    over: str = "both",
    draws: int = 10_000,
    seed: int = 0,
    against: str | None = None,
) -> Result:
    """Evaluate a study.

    Arguments:
        answers: of :func:`flowvqtalker_eval.study.answers.collect`.
        key: of the study.
        problems: what could not be read, passed on.
        allowed_failures: attention checks that a participant may fail and still count.
        over: what the bootstrap draws anew: ``both`` raters and items, ``raters`` or ``items``.
        draws: of the bootstrap.
        seed: of the bootstrap.
        against: method that the others are compared with; None is the first.

    Raises:
        UserError: if no answer is left, or the method does not exist.
    """
    against = key.methods[0] if against is None else against
    if against not in key.methods:
        raise UserError(f"no method is called {against!r}; choose one of {', '.join(key.methods)}")
    if draws < 100:
        raise UserError(f"{draws} draws are too few for a 95 % interval; give 100 or more, 10000 is usual")
    failed = failed_checks(answers, key)
    excluded = {rater: count for rater, count in sorted(failed.items()) if count > allowed_failures}
    checks = {clip.id for clip in key.clips if clip.kind == "check"}
    kept = [one for one in answers if one.rater not in excluded]
    rated = [one for one in kept if one.clip not in checks and not one.problem]
    if not rated:
        lost = f"; {len(excluded)} participants failed the attention checks" if excluded else ""
        raise UserError(f"no answer can be used{lost}{': ' + problems[0] if problems else ''}")
    raters = tuple(sorted({one.rater for one in kept}))
    answered_checks = {rater: {one.clip for one in kept if one.rater == rater} & checks for rater in raters}
    measures = [name for name in MEASURES if key.speech or name != "lip_sync"]
    tables = {name: _values(rated, key, raters, name) for name in measures}
    drawn = {name: agreement.bootstrap_means(table, draws, seed, over) for name, table in tables.items()}
    reference = key.methods.index(against)

    methods = []
    for column, name in enumerate(key.methods):
        own = [one for one in rated if key.by_id[one.clip].method == name]
        estimates, differences = {}, {}
        for measure in measures:
            value, draw = agreement.means(tables[measure]), drawn[measure]
            count = int(np.isfinite(tables[measure][:, :, column]).sum())
            estimates[measure] = _estimate(value[column], draw[:, column], count)
            if column != reference:
                gap = draw[:, column] - draw[:, reference]
                differences[measure] = _estimate(value[column] - value[reference], gap, count)
        methods.append(
            Method(
                name=name,
                raters=len({one.rater for one in own}),
                clips=len({one.clip for one in own}),
                estimates=estimates,
                differences=differences,
                kappas=_kappas(own, measures, draws, seed),
                confusion=_confusion(own, key),
            )
        )
    return Result(
        key=key,
        methods=tuple(methods),
        kappas=_kappas(rated, measures, draws, seed),
        raters=raters,
        excluded=excluded,
        unchecked=tuple(rater for rater in raters if answered_checks[rater] != checks),
        unplayable=sum(one.problem for one in kept),
        against=against,
        settings={"over": over, "draws": draws, "seed": seed, "level": 0.95, "allowed_failures": allowed_failures},
        problems=tuple(problems),
    )


def _values(rated: Sequence[Answer], key: Key, raters: Sequence[str], measure: str) -> Array:
    """Answers as numbers: (raters, items, methods), NaN where there is none."""
    rows = {name: row for row, name in enumerate(raters)}
    items = {name: place for place, name in enumerate(key.items)}
    columns = {name: column for column, name in enumerate(key.methods)}
    values = np.full((len(rows), len(items), len(columns)), np.nan)
    for one in rated:
        clip = key.by_id[one.clip]
        value: float | None
        if measure == "emotion":  # `natural` is none of the eight: nobody can be right
            value = float(one.emotion == clip.emotion) if clip.emotion in CHOICES else None
        else:
            value = getattr(one, measure)
        values[rows[one.rater], items[clip.item], columns[clip.method]] = np.nan if value is None else value
    return values


def _estimate(value: float, draws: Array, count: int) -> Estimate:
    low, high = agreement.interval(draws)
    return Estimate(float(value), float(low), float(high), count)


def _kappas(rated: Sequence[Answer], measures: Sequence[str], draws: int, seed: int) -> dict[str, Kappa]:
    clips = {name: row for row, name in enumerate(sorted({one.clip for one in rated}))}
    result = {}
    for name, (measure, ordered) in _KAPPAS.items():
        if measure not in measures:
            continue
        categories: Sequence[int | str] = CHOICES if measure == "emotion" else SCALE
        counts = np.zeros((len(clips), len(categories)))
        for one in rated:
            counts[clips[one.clip], categories.index(getattr(one, measure))] += 1
        weights = agreement.quadratic_weights(len(categories)) if ordered else None
        low, high = agreement.interval(agreement.bootstrap_kappa(counts, draws, seed, weights))
        several = counts.sum(1)[counts.sum(1) > 1]
        result[name] = Kappa(
            value=agreement.fleiss_kappa(counts, weights),
            low=float(low),
            high=float(high),
            clips=len(several),
            raters=float(several.mean()) if len(several) else 0.0,
        )
    return result


def _confusion(rated: Sequence[Answer], key: Key) -> tuple[tuple[int, ...], ...]:
    counts = np.zeros((len(CHOICES), len(CHOICES)), int)
    for one in rated:
        intended = key.by_id[one.clip].emotion
        if intended in CHOICES and one.emotion is not None:
            counts[CHOICES.index(intended), CHOICES.index(one.emotion)] += 1
    return tuple(tuple(int(count) for count in row) for row in counts)
