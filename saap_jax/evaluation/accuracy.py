"""A against B on the same items of several tasks: differences of accuracy, each and over all, and how sure they are."""

import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from saap_jax.evaluation.paired import AccuracyDifference, check_options, sureness

ALL = "all tasks"
"""Name of the mean over tasks, each of which counts the same."""

# `_` binds to nothing: each task has its own items
Outcomes = Mapping[str, Bool[np.ndarray, "_seeds _items"]]
"""{task: which items were answered right}, a row for each calibration seed, the same seeds in every task."""


def paired_tasks(
    a: Outcomes, b: Outcomes, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, AccuracyDifference]:
    """Return how much the accuracies of two models differ on each task and, of two tasks or more, over all of them.

    Items are drawn with replacement within each task, and seeds for all tasks together (a seed is one pruned model); A
    and B are looked at on the same draw. The tasks are not drawn: `ALL` speaks of these tasks and of no others.

    Items with the same outcomes on all seeds are exchangeable, so how often each such pattern is drawn is one
    multinomial draw, and many items cost no more than few.

    Raises:
        ValueError: not the same tasks, items and seeds of both models, or a task without items.
    """
    check_options("paired_tasks", resamples, level)
    if not a or a.keys() != b.keys():
        raise ValueError(f"paired_tasks: expected the same tasks of both models, got {[*a]} and {[*b]}")
    seeds = {outcomes.shape[:1] for each in (a, b) for outcomes in each.values()}
    if len(seeds) > 1 or any(a[task].shape != b[task].shape or not a[task].size for task in a):
        shapes = {task: (a[task].shape, b[task].shape) for task in a}
        raise ValueError(f"paired_tasks: expected [seeds, items] of one item or more, twice the same, got {shapes}")
    (count,) = seeds.pop()
    by_seed = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    found, points, wins, means, items = {}, [], [], [], []
    for task in a:
        difference = np.asarray(a[task], np.float64) - np.asarray(b[task], np.float64)
        points.append(100 * float(difference.mean()))
        wins.append(0.5 + float(difference.mean()) / 2)
        means.append(100 * _resampled(difference, by_seed, np.random.default_rng([seed, zlib.crc32(task.encode())])))
        items.append(difference.shape[1])
        low, high, p = sureness(means[-1], items[-1], level).tolist()
        found[task] = AccuracyDifference(points[-1], low, high, wins[-1], p, items[-1])
    if len(a) > 1:
        low, high, p = sureness(np.mean(means, axis=0), min(items), level).tolist()
        found[ALL] = AccuracyDifference(float(np.mean(points)), low, high, float(np.mean(wins)), p, min(items))
    return found


def _resampled(
    difference: Float[np.ndarray, "seeds items"],
    by_seed: Float[np.ndarray, "resamples seeds"],
    random: np.random.Generator,
) -> Float[np.ndarray, "resamples"]:
    """Return the mean difference of each resample."""
    sign = 1 if difference.sum() >= 0 else -1  # one order of draws, so that a swap mirrors exactly
    patterns, counts = np.unique(sign * difference, axis=1, return_counts=True)
    items = difference.shape[1]
    drawn = random.multinomial(items, counts / items, size=len(by_seed)) / items
    return sign * np.einsum("rs,sp,rp->r", by_seed, patterns, drawn, optimize=True)
