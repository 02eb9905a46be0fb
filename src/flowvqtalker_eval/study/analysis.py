"""From answers to the paper's Table 2: means with intervals, emotion accuracy, agreement, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study.agreement import (
    Array,
    bootstrap_kappa,
    bootstrap_means,
    fleiss_kappa,
    interval,
    quadratic_weights,
)
from flowvqtalker_eval.study.answers import Answer
from flowvqtalker_eval.study.key import CHOICES, SCALE, Key

__all__ = ["MEASURES", "Estimate", "Kappa", "Method", "Result", "analyse"]

#: Rows of the table: name -> heading, as in the paper.
MEASURES = {"lip_sync": "Lip-sync", "quality": "Image quality", "emotion": "Acc_emo"}


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means with its 95 % interval; NaN where nothing was answered."""

    value: float
    low: float
    high: float
    answers: int


@dataclass(frozen=True)
class Kappa:
    """Fleiss' kappa with its 95 % interval over clips; NaN where it is undefined.

    Attributes:
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
    """The results of one method.

    Attributes:
        raters: participants who rated a clip of it.
        clips: its clips that were rated.
        estimates: by measure.
        differences: to the reference method, by measure; empty for that method itself.
        kappas: agreement on its clips.
        confusion: (8, 8) answers by intended (rows) and chosen emotion.
    """

    name: str
    raters: int
    clips: int
    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]
    kappas: dict[str, Kappa]
    confusion: list[list[int]]


@dataclass(frozen=True)
class Result:
    """Table 2 and everything that it rests on.

    Attributes:
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

    study: str
    title: str
    methods: list[Method]
    kappas: dict[str, Kappa]
    raters: list[str]
    excluded: dict[str, int]
    unchecked: list[str]
    unplayable: int
    against: str
    settings: dict[str, str | int | float]
    problems: list[str]


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
        answers: from :func:`flowvqtalker_eval.study.answers.collect`.
        key: of the study.
        problems: input that could not be read, passed on.
        allowed_failures: attention checks that a participant may fail and still count.
        over: what the bootstrap draws anew: ``both`` raters and items, ``raters`` or ``items``.
        draws, seed: of the bootstrap.
        against: method that the others are compared with; None is the first.

    Raises:
        UserError: if no answer is left, or the method does not exist.
    """
    against = key.methods[0] if against is None else against
    if against not in key.methods:
        raise UserError(f"no method is called {against!r}; choose one of {', '.join(key.methods)}")
    if draws < 100:
        raise UserError(f"{draws} draws are too few for a 95 % interval; give 100 or more, 10000 is usual")
    failed = {one.rater: 0 for one in sorted(answers, key=lambda one: one.rater)}
    for one in answers:
        if one.clip in key.checks and not one.problem:
            right = key.checks[one.clip]
            failed[one.rater] += (one.lip_sync, one.quality, one.emotion) != (
                right.lip_sync,
                right.quality,
                right.emotion,
            )
    excluded = {rater: count for rater, count in failed.items() if count > allowed_failures}
    kept = [one for one in answers if one.rater not in excluded]
    rated = [one for one in kept if one.clip not in key.checks and not one.problem]
    if not rated:
        lost = f"; {len(excluded)} participants failed the attention checks" if excluded else ""
        raise UserError(f"no answer can be used{lost}{': ' + problems[0] if problems else ''}")
    raters = [rater for rater in failed if rater not in excluded]
    checked = {rater: {one.clip for one in kept if one.rater == rater} & set(key.checks) for rater in raters}
    table = _table(rated, key)
    return Result(
        study=key.study,
        title=key.title,
        methods=_methods(table, key, raters, against, (over, draws, seed)),
        kappas=_kappas(table, key.speech, draws, seed),
        raters=raters,
        excluded=excluded,
        unchecked=[rater for rater in raters if checked[rater] != set(key.checks)],
        unplayable=sum(one.problem for one in kept),
        against=against,
        settings={"over": over, "draws": draws, "seed": seed, "level": 0.95, "allowed_failures": allowed_failures},
        problems=list(problems),
    )


def _table(rated: Sequence[Answer], key: Key) -> pd.DataFrame:
    """One row for each answer, with what the key says of its clip and whether the emotion is right."""
    clips = pd.DataFrame([clip.model_dump(include={"id", "method", "item", "emotion"}) for clip in key.clips])
    table = pd.DataFrame([one.model_dump() for one in rated]).rename(columns={"emotion": "chosen"})
    table = table.merge(clips.rename(columns={"emotion": "intended"}), left_on="clip", right_on="id")
    right = (table.chosen == table.intended).astype(float)
    # `natural` is none of the eight: nobody could be right.
    return table.assign(emotion=right.where(table.intended.isin(CHOICES)))


def _methods(
    table: pd.DataFrame, key: Key, raters: list[str], against: str, bootstrap: tuple[str, int, int]
) -> list[Method]:
    over, draws, seed = bootstrap
    values, drawn = {}, {}
    for measure in _measures(key.speech):
        array = np.full((len(raters), len(key.items), len(key.methods)), np.nan)
        axes = {"rater": raters, "item": key.items, "method": key.methods}
        place = tuple(pd.Categorical(table[name], categories=list(names)).codes for name, names in axes.items())
        array[place] = table[measure].astype(float)
        values[measure], drawn[measure] = array, bootstrap_means(array, draws, seed, over)
    reference = key.methods.index(against)
    methods = []
    for column, name in enumerate(key.methods):
        own = table[table["method"] == name]
        estimates, differences = {}, {}
        for measure, array in values.items():
            draw = drawn[measure]
            estimates[measure] = _estimate(array[:, :, column], draw[:, column])
            if column != reference:
                gap = estimates[measure].value - _estimate(array[:, :, reference], draw[:, reference]).value
                low, high = interval(draw[:, column] - draw[:, reference])
                differences[measure] = Estimate(gap, low, high, estimates[measure].answers)
        confusion = pd.crosstab(own.intended, own.chosen).reindex(index=CHOICES, columns=CHOICES, fill_value=0)
        kappas = _kappas(own, key.speech, draws, seed)
        raters_of, clips = own["rater"].nunique(), own["clip"].nunique()
        methods.append(Method(name, raters_of, clips, estimates, differences, kappas, confusion.to_numpy().tolist()))
    return methods


def _measures(speech: bool) -> list[str]:
    return [name for name in MEASURES if speech or name != "lip_sync"]


def _estimate(values: Array, draws: Array) -> Estimate:
    answered = values[np.isfinite(values)]
    low, high = interval(draws)
    return Estimate(float(answered.mean()) if len(answered) else float("nan"), low, high, len(answered))


def _kappas(table: pd.DataFrame, speech: bool, draws: int, seed: int) -> dict[str, Kappa]:
    """Agreement on the emotion, and on the ratings as unordered and as ordered categories."""
    result = {}
    for measure in ("emotion", *(name for name in _measures(speech) if name != "emotion")):
        column, categories = ("chosen", CHOICES) if measure == "emotion" else (measure, SCALE)
        crossed = pd.crosstab(table["clip"], table[column]).reindex(columns=list(categories), fill_value=0)
        counts = crossed.to_numpy(float)
        several = counts.sum(1)[counts.sum(1) > 1]
        for suffix, weights in (("", None), ("_quadratic", quadratic_weights(len(categories)))):
            if suffix and measure == "emotion":
                continue
            low, high = interval(bootstrap_kappa(counts, draws, seed, weights))
            mean = float(several.mean()) if len(several) else 0.0
            result[measure + suffix] = Kappa(fleiss_kappa(counts, weights), low, high, len(several), mean)
    return result
