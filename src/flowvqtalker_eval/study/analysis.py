"""From answers to the paper's Table 2: means with intervals, emotion accuracy, agreement, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

__all__ = ["ALL", "MEASURES", "Result", "analyse"]

#: Rows of the table: name -> heading, as in the paper.
MEASURES = {"lip_sync": "Lip-sync", "quality": "Image quality", "emotion": "Acc_emo"}
#: Agreement on the clips of all methods together.
ALL = "all"


@dataclass(frozen=True)
class Result:
    """Table 2 and everything that it rests on. Numbers are NaN where nothing was answered or kappa is undefined.

    Attributes:
        study, title: of the key.
        estimates: by (method, measure): mean ``value`` and 95 % interval ``low``, ``high``; ``difference``,
            ``difference_low``, ``difference_high`` to the method ``against``; number of ``answers``, and of ``raters``
            and ``clips`` of the method.
        kappas: by (method or ALL, measure): Fleiss' kappa ``value``, ``low``, ``high``; number of ``clips`` that two or
            more rated, and mean number of their ``raters``. Measures that end in ``_quadratic`` are of ordered
            categories.
        confusion: (8, 8) answers of each method by intended (rows) and chosen emotion.
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
    estimates: pd.DataFrame
    kappas: pd.DataFrame
    confusion: dict[str, list[list[int]]]
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
    failed = dict.fromkeys(sorted(one.rater for one in answers), 0)
    for one in answers:
        if one.clip in key.checks and not one.problem:
            failed[one.rater] += one.values[:3] != tuple(key.checks[one.clip].model_dump().values())
    excluded = {rater: count for rater, count in failed.items() if count > allowed_failures}
    kept = [one for one in answers if one.rater not in excluded]
    rated = [one for one in kept if one.clip not in key.checks and not one.problem]
    if not rated:
        lost = f"; {len(excluded)} participants failed the attention checks" if excluded else ""
        raise UserError(f"no answer can be used{lost}{': ' + problems[0] if problems else ''}")
    raters = [rater for rater in failed if rater not in excluded]
    table = _table(rated, key)
    measures = [name for name in MEASURES if key.speech or name != "lip_sync"]
    groups = {ALL: table, **{name: table[table["method"] == name] for name in key.methods}}
    kappas = [row for name, own in groups.items() for row in _kappas(name, own, measures, draws, seed)]
    return Result(
        study=key.study,
        title=key.title,
        estimates=_estimates(table, key, raters, measures, against, (draws, seed, over)),
        kappas=pd.DataFrame(kappas).set_index(["method", "measure"]),
        confusion={
            name: pd.crosstab(groups[name]["intended"], groups[name]["chosen"])
            .reindex(index=list(CHOICES), columns=list(CHOICES), fill_value=0)
            .to_numpy()
            .tolist()
            for name in key.methods
        },
        raters=raters,
        excluded=excluded,
        unchecked=[name for name in raters if not set(key.checks) <= {one.clip for one in kept if one.rater == name}],
        unplayable=sum(one.problem for one in kept),
        against=against,
        settings={"over": over, "draws": draws, "seed": seed, "level": 0.95, "allowed_failures": allowed_failures},
        problems=list(problems),
    )


def _table(rated: Sequence[Answer], key: Key) -> pd.DataFrame:
    """One row for each answer, with what the key says of its clip; ``emotion`` is whether it was recognised."""
    clips = pd.DataFrame([clip.model_dump(include={"id", "method", "item", "emotion"}) for clip in key.clips])
    table = pd.DataFrame([one.model_dump() for one in rated]).rename(columns={"emotion": "chosen"})
    table = table.merge(clips.rename(columns={"emotion": "intended"}), left_on="clip", right_on="id")
    right = (table["chosen"] == table["intended"]).astype(float)
    # `natural` is none of the eight: nobody could be right.
    return table.assign(emotion=right.where(table["intended"].isin(CHOICES)))


def _estimates(
    table: pd.DataFrame, key: Key, raters: list[str], measures: list[str], against: str, bootstrap: tuple[int, int, str]
) -> pd.DataFrame:
    axes = {"rater": raters, "item": key.items, "method": key.methods}
    place = tuple(pd.Categorical(table[name], categories=list(names)).codes for name, names in axes.items())
    reference = key.methods.index(against)
    rows: list[dict[str, Any]] = []
    for measure in measures:
        values = np.full([len(names) for names in axes.values()], np.nan)
        values[place] = table[measure].astype(float)
        draws = bootstrap_means(values, *bootstrap)
        means = table.groupby("method")[measure].mean().reindex(list(key.methods)).to_numpy(float)
        for column, name in enumerate(key.methods):
            own = table[table["method"] == name]
            row = {"method": name, "measure": measure, **_interval("", means[column], draws[:, column])}
            gaps = means[column] - means[reference], draws[:, column] - draws[:, reference]
            row |= _interval("difference", *gaps) if column != reference else {}
            row |= {name: own[column].nunique() for name, column in (("raters", "rater"), ("clips", "clip"))}
            rows.append({**row, "answers": int(own[measure].count())})
    return pd.DataFrame(rows).set_index(["method", "measure"]).loc[list(key.methods)]


def _interval(name: str, value: float, draws: Array) -> dict[str, float]:
    low, high = interval(draws)
    prefix = f"{name}_" if name else ""
    return {name or "value": float(value), f"{prefix}low": low, f"{prefix}high": high}


def _kappas(method: str, table: pd.DataFrame, measures: list[str], draws: int, seed: int) -> list[dict[str, Any]]:
    """Agreement on the emotion, and on the ratings as unordered and as ordered categories."""
    rows = []
    for measure in sorted(measures):
        column, categories = ("chosen", CHOICES) if measure == "emotion" else (measure, SCALE)
        crossed = pd.crosstab(table["clip"], table[column]).reindex(columns=list(categories), fill_value=0)
        counts = crossed.to_numpy(float)
        several = counts.sum(1)[counts.sum(1) > 1]
        for suffix, weights in (("", None), ("_quadratic", quadratic_weights(len(categories)))):
            if not suffix or measure != "emotion":
                kappa = fleiss_kappa(counts, weights), bootstrap_kappa(counts, draws, seed, weights)
                row = {"method": method, "measure": measure + suffix, **_interval("", *kappa)}
                rows.append({**row, "clips": len(several), "raters": float(several.mean()) if len(several) else 0.0})
    return rows
