"""Statistics of a user study: bootstrap distributions of means, and Fleiss' kappa. Arrays in, numbers out."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["bootstrap_kappa", "bootstrap_means", "fleiss_kappa", "interval", "quadratic_weights"]

Array = npt.NDArray[np.float64]

_BLOCK = 2_000_000  # numbers of the bootstrap in memory at once


def bootstrap_means(values: Array, draws: int, seed: int, over: str = "both") -> Array:
    """Bootstrap distribution of the mean over all answers of each method.

    Raters and items are both samples of what might have been asked, so both are drawn anew, independently and with
    replacement: an answer counts as often as its rater was drawn times as often as its item was drawn (the pigeonhole
    bootstrap). An item is drawn for all methods together, so methods can be compared draw by draw.

    Arguments:
        values: (R, I, M) answers of raters to items (contents) by method, NaN where there is none.
        draws: number of draws.
        seed: of the draws.
        over: ``both``, or ``raters`` or ``items`` alone.

    Returns:
        (draws, M); NaN where a draw holds no answer to a method.

    References:
        A. B. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007.
    """
    if over not in ("both", "raters", "items"):
        raise UserError(f"cannot draw over {over!r}; choose both, raters or items")
    raters, items, methods = values.shape
    rng = np.random.default_rng(seed)
    answered = np.isfinite(values)
    known, counted = (part.reshape(raters, -1).astype(float) for part in (np.where(answered, values, 0), answered))
    result = np.full((draws, methods), np.nan)
    block = max(1, _BLOCK // max(1, items * methods))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        by_rater = _times_drawn(rng, raters, size) if over != "items" else np.ones((size, raters))
        by_item = _times_drawn(rng, items, size) if over != "raters" else np.ones((size, items))
        total, count = (
            ((by_rater @ part).reshape(size, items, methods) * by_item[..., None]).sum(1) for part in (known, counted)
        )
        np.divide(total, count, out=result[start : start + size], where=count > 0)
    return result


def _times_drawn(rng: np.random.Generator, count: int, draws: int) -> Array:
    """How often each of ``count`` is drawn in a resample of the same size, (draws, count)."""
    if count == 0:
        return np.ones((draws, 0))
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a bootstrap distribution (draws,); NaN does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN gives NaN
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def quadratic_weights(categories: int) -> Array:
    """Agreement between ordered categories k and l: 1 - (k - l)² / (q - 1)², (q, q)."""
    place = np.arange(categories)
    return np.asarray(1 - ((place[:, None] - place) / (categories - 1)) ** 2, np.float64)


def fleiss_kappa(counts: Array, weights: Array | None = None) -> float:
    """Fleiss' kappa: agreement beyond chance of raters who put subjects into categories.

    With r_ik raters who put subject i into category k and r_i = Σ_k r_ik:

        P_i = Σ_k r_ik (r_ik - 1) / (r_i (r_i - 1)),   p_k = mean of r_ik / r_i,
        κ = (mean P_i - Σ p_k²) / (1 - Σ p_k²)

    Subjects may have different numbers of raters (Gwet's generalisation, equal to Fleiss' where the number is
    constant): those with two or more enter P, those with one or more enter p.

    Arguments:
        counts: (N, q) number of raters by subject and category.
        weights: (q, q) agreement of two categories, 1 on the diagonal; None: the identity (unordered categories).

    Returns:
        kappa; NaN where it is undefined (no subject with two raters, or a single category in all answers).

    References:
        J. L. Fleiss, Measuring nominal scale agreement among many raters, Psychological Bulletin 76(5), 1971.
        K. L. Gwet, Handbook of Inter-Rater Reliability, 4th edition, 2014, chapter 3.
    """
    return float(_kappas(np.asarray(counts, np.float64), weights, np.ones((1, len(counts))))[0])


def bootstrap_kappa(counts: Array, draws: int, seed: int, weights: Array | None = None) -> Array:
    """Bootstrap distribution (draws,) of :func:`fleiss_kappa` over subjects.

    Raters are not drawn: one drawn twice would agree with himself.
    """
    drawn = _times_drawn(np.random.default_rng(seed), len(counts), draws)
    return _kappas(np.asarray(counts, np.float64), weights, drawn)


def _kappas(counts: Array, weights: Array | None, drawn: Array) -> Array:
    """Kappa for each row of ``drawn`` (B, N), which says how often each subject counts."""
    if counts.size == 0:
        return np.full(len(drawn), np.nan)
    weights = np.eye(counts.shape[1]) if weights is None else weights
    raters = counts.sum(1)
    pairs = raters * (raters - 1)
    agreeing = (counts * (counts @ weights.T - 1)).sum(1)
    agreement = np.divide(agreeing, pairs, out=np.zeros(len(counts)), where=pairs > 0)
    shares = np.divide(counts, raters[:, None], out=np.zeros_like(counts), where=raters[:, None] > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (drawn @ agreement) / (drawn @ (pairs > 0))
        prevalence = (drawn @ shares) / (drawn @ (raters > 0))[:, None]
        expected = np.einsum("bk,kl,bl->b", prevalence, weights, prevalence)
        kappa = (observed - expected) / (1 - expected)  # 0 / 0 of a single category: nothing could have disagreed
    return np.asarray(kappa, np.float64)
