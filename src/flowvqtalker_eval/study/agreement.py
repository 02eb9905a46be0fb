"""Statistics of a user study: bootstrap intervals of means and Fleiss' kappa.

Nothing here knows of studies: arrays in, numbers out.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["bootstrap_kappa", "bootstrap_means", "fleiss_kappa", "interval", "means", "quadratic_weights"]

Array = npt.NDArray[np.float64]

_BLOCK = 2_000_000  # numbers at once


def means(values: Array) -> Array:
    """Mean over all answers that are there: (R, I, M) with NaN where there is none -> (M,), NaN without any answer."""
    there = np.isfinite(values)
    count = there.sum((0, 1))
    total = np.where(there, values, 0.0).sum((0, 1))
    result = np.full(values.shape[2], np.nan)
    np.divide(total, count, out=result, where=count > 0)
    return result


def bootstrap_means(values: Array, draws: int, seed: int, over: str = "both") -> Array:
    """Bootstrap distribution of :func:`means`.

    Raters and items are both samples of what might have been asked, and both are drawn anew, independently and with
    replacement: an answer counts as often as its rater was drawn times as often as its item was drawn (the pigeonhole
    bootstrap). An item is drawn for all methods together, so differences between methods can be taken draw by draw.

    Arguments:
        values: (R, I, M) answers of raters to items (contents) by method, NaN where there is none.
        draws: number of draws.
        seed: of the draws.
        over: ``both``, or ``raters`` or ``items`` alone, the other being taken as given.

    Returns:
        (draws, M); NaN where a draw holds no answer to a method.

    References:
        A. B. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007.
    """
    if over not in ("both", "raters", "items"):
        raise UserError(f"cannot draw over {over!r}; choose both, raters or items")
    raters, items, methods = values.shape
    rng = np.random.default_rng(seed)
    there = np.isfinite(values)
    known = np.where(there, values, 0.0).reshape(raters, -1)
    counted = there.astype(np.float64).reshape(raters, -1)
    result = np.full((draws, methods), np.nan)
    block = max(1, _BLOCK // max(1, items * methods))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        by_rater = _weights(rng, raters, size, over != "items")  # (size, R)
        by_item = _weights(rng, items, size, over != "raters")  # (size, I)
        total = ((by_rater @ known).reshape(size, items, methods) * by_item[..., None]).sum(1)
        count = ((by_rater @ counted).reshape(size, items, methods) * by_item[..., None]).sum(1)
        np.divide(total, count, out=result[start : start + size], where=count > 0)
    return result


def _weights(rng: np.random.Generator, count: int, draws: int, resampled: bool) -> Array:
    """How often each of ``count`` is drawn, (draws, count)."""
    if not resampled or count == 0:
        return np.ones((draws, count))
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def interval(draws: Array, level: float = 0.95) -> Array:
    """Percentile interval of a bootstrap distribution: (draws, ...) -> (2, ...); draws that are NaN do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN gives NaN
        result = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(result, np.float64)


def quadratic_weights(categories: int) -> Array:
    """Agreement between ordered categories k and l: 1 - (k - l)² / (q - 1)², (q, q)."""
    place = np.arange(categories)
    return np.asarray(1 - ((place[:, None] - place) / (categories - 1)) ** 2, np.float64)


def fleiss_kappa(counts: Array, weights: Array | None = None) -> float:
    """Fleiss' kappa: agreement beyond chance of raters who put subjects into categories.

    With r_ik raters who put subject i into category k and r_i = Σ_k r_ik:

        P_i = Σ_k r_ik (r_ik - 1) / (r_i (r_i - 1)),   p_k = mean of r_ik / r_i,
        κ = (mean P_i - Σ p_k²) / (1 - Σ p_k²)

    Subjects may have different numbers of raters (Gwet's generalisation; the same as Fleiss' where the number is one):
    those with two or more enter P, those with one or more enter p.

    Arguments:
        counts: (N, q) number of raters by subject and category.
        weights: (q, q) how far two categories agree, 1 on the diagonal; None treats them as unordered: the identity.

    Returns:
        kappa; NaN where it is not defined (no subject with two raters, or a single category in all answers).

    References:
        J. L. Fleiss, Measuring nominal scale agreement among many raters, Psychological Bulletin 76(5), 1971.
        K. L. Gwet, Handbook of Inter-Rater Reliability, 4th edition, 2014, chapter 3.
    """
    return float(_kappas(np.asarray(counts, np.float64), weights, np.ones((1, len(counts))))[0])


def bootstrap_kappa(counts: Array, draws: int, seed: int, weights: Array | None = None) -> Array:
    """Bootstrap distribution of :func:`fleiss_kappa` over subjects, (draws,).

    Subjects alone are drawn: a rater drawn twice would agree with himself.
    """
    drawn = _weights(np.random.default_rng(seed), len(counts), draws, True)
    return _kappas(np.asarray(counts, np.float64), weights, drawn)


def _kappas(counts: Array, weights: Array | None, drawn: Array) -> Array:
    """Kappa for each row of ``drawn`` (B, N), which says how often each subject counts."""
    if counts.size == 0:
        return np.full(len(drawn), np.nan)
    if weights is None:
        weights = np.eye(counts.shape[1])
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
