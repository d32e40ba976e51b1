"""Stage 2c, few shapes: layers that share their widths, so that a pruned model compiles fast and runs in few pieces.

A *segment* is a stretch of neighbouring layers of equal widths, a *shape* one pair of widths. Which layers share, and
what widths, follows from the Lagrangian of the search,

    minimise over widths k_l:   Σ_l loss_l(k_l) - λ · Σ_l removed_l(k_l),        λ such that the budget is met,

where loss_l(k) is cost · key summed over the blocks that layer l loses down to k kept units. For a given λ the best
division into at most `max_segments` stretches is found exactly, by dynamic programming over where a stretch ends; the
stretches (or, without `max_segments`, the layers) are then merged, the pair that costs least first, until `max_shapes`
are left. λ and the division are found in turns. What the last step removed too much is given back where that helps
most. With a share for attention each structure has a budget and a λ of its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saap_jax.steps.allocation.budget import SLACK, Blocks
from saap_jax.steps.limits import Within
from saap_jax.types import STRUCTURES

TURNS = 8
"""How often λ and the division into segments and shapes are found in turns at most."""

Clusters = list[np.ndarray]
"""Layers that share their widths; each layer in one of them."""


class Table(NamedTuple):
    """What a structure of each layer loses when it keeps k units, `[layers, 1 + units]`."""

    loss: np.ndarray
    """Infinite where a layer must not have that width."""
    removed: np.ndarray
    """Parameters."""

    def of(self, layers: np.ndarray) -> "Table":
        """Return the sums over layers that share their width, `[1 + units]`."""
        return Table(self.loss[layers].sum(axis=0), self.removed[layers].sum(axis=0))


Tables = dict[str, Table]


def take_shaped(
    blocks: Blocks,
    key: np.ndarray,
    units: Mapping[str, np.ndarray],
    left: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
    target: int,
    prunable: int,
    within: Within,
) -> np.ndarray:
    """Return the rows of the blocks that are removed, such that there are few segments or shapes.

    Args:
        key: what blocks are ranked by; the loss of a block is its cost times that.
        units: units of each layer, `[layers]` a structure.
        left: units of each layer that earlier steps have left.
        costs: parameters a unit, `[layers]` a structure.
        target: parameters to remove at least; `prunable`: all that there are.

    Raises:
        ValueError: a budget that cannot be met with so few.
    """
    tables = tables_of(blocks, key, units, left, costs)
    budgets = budgets_of(target, within)
    most = most_of(tables, within)
    if target > most:
        raise ValueError(
            f"ratio: {target / max(prunable, 1):.4g} of the prunable parameters cannot be removed with max_segments "
            f"{within.max_segments} and max_shapes {within.max_shapes}; the largest possible ratio is "
            f"{most * 10_000 // max(prunable, 1) / 10_000:.4f} (layers left alone are shapes and segments of their "
            "own): relax one of them, or min_keep, max_ratio, protect, multiple_of or attention"
        )
    layers = len(next(iter(units.values())))
    clusters: Clusters = [np.array([layer]) for layer in range(layers)]
    widths: dict[str, list[int]] = {}
    for turn in range(TURNS):
        weights = {name: weight for names, budget in budgets for name, weight in _meet(tables, clusters, names, budget)}
        found = divided(tables, weights, within)
        if turn and len(found) == len(clusters) and all(map(np.array_equal, found, clusters)):
            break
        clusters = found if _can(tables, found, budgets) else divided(tables, _steepest(tables), within)
    for names, budget in budgets:
        weights = dict(_meet(tables, clusters, names, budget))
        own = {name: [best_width(tables[name].of(c), weights[name]) for c in clusters] for name in names}
        widths |= _given_back(tables, clusters, own, budget)
    gone = {name: np.zeros(layers, np.int64) for name in STRUCTURES}
    for name, each in widths.items():
        for cluster, width in zip(clusters, each, strict=True):
            gone[name][cluster] = units[name][cluster] - width
    limit = np.stack([gone[name] for name in STRUCTURES])[blocks.structure, blocks.layer]
    return np.flatnonzero(blocks.stop <= limit)


def most_shaped(
    blocks: Blocks,
    units: Mapping[str, np.ndarray],
    left: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
    within: Within,
) -> int:
    """Return the parameters that can go with so few segments and shapes, whatever the scores."""
    return most_of(tables_of(blocks, np.zeros(len(blocks.cost)), units, left, costs), within)


def most_of(tables: Tables, within: Within) -> int:
    """Return the parameters that all budgets can remove together."""
    clusters = divided(tables, _steepest(tables), within)
    parts = []
    for names, share in budgets_of(1, within, exact=True):
        removed = sum(tables[n].of(c).removed[best_width(tables[n].of(c), np.inf)] for n in names for c in clusters)
        parts.append(removed / share)
    return int(min(parts) * (1 + SLACK))


def tables_of(
    blocks: Blocks,
    key: np.ndarray,
    units: Mapping[str, np.ndarray],
    left: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
) -> Tables:
    """Return what each width costs. A layer keeps all, or what a block's end leaves; no more than is left of it."""
    worth = blocks.cost * (key - min(0.0, key.min(initial=0.0)))
    tables = {}
    for index, name in enumerate(STRUCTURES):
        layers, widest = len(units[name]), int(units[name].max(initial=0))
        loss = np.full((layers, widest + 1), np.inf)
        for layer, count in enumerate(units[name]):
            own = np.flatnonzero((blocks.structure == index) & (blocks.layer == layer))
            loss[layer, count - np.concatenate([[0], blocks.stop[own]]).astype(np.int64)] = np.concatenate(
                [[0.0], np.cumsum(worth[own])]
            )
            loss[layer, left[name][layer] + 1 :] = np.inf
        width = np.arange(widest + 1)
        removed = (units[name][:, None] - width) * costs[name][:, None]
        tables[name] = Table(loss, removed.astype(np.float64))
    return tables


def budgets_of(target: int, within: Within, *, exact: bool = False) -> list[tuple[tuple[str, ...], float]]:
    """Return the structures that share a budget, and each budget."""
    share = within.attention
    if share is None:
        return [(STRUCTURES, float(target))]
    parts = [(("attention",), target * share), (("mlp",), target * (1 - share))]
    return [(names, budget if exact else float(np.ceil(budget * (1 - SLACK)))) for names, budget in parts if budget > 0]


# --- widths, for a given λ -----------------------------------------------------------------------


def best_width(table: Table, weight: float) -> int:
    """Return the width of lowest loss - λ · removed; of equals the largest. With λ infinite, the smallest allowed."""
    allowed = np.flatnonzero(np.isfinite(table.loss))
    if not len(allowed):
        return -1
    if np.isinf(weight):
        return int(allowed[0])
    value = table.loss[allowed] - weight * table.removed[allowed]
    return int(allowed[len(value) - 1 - np.argmin(value[::-1])])


def lagrangian(tables: Tables, layers: np.ndarray, weights: Mapping[str, float]) -> float:
    """Return what layers that share their widths contribute at best; infinite where no width suits them all."""
    total = 0.0
    for name, table in tables.items():
        own = table.of(layers)
        total += float(np.min(own.loss - weights.get(name, 0.0) * own.removed))
    return total


def _meet(tables: Tables, clusters: Clusters, names: Sequence[str], budget: float) -> list[tuple[str, float]]:
    """Return the smallest λ, found by bisection, at which a budget is met, for each structure that shares it."""
    own = [tables[name].of(cluster) for name in names for cluster in clusters]

    def removed(weight: float) -> float:
        return sum(float(each.removed[best_width(each, weight)]) for each in own)

    if removed(0.0) >= budget:
        return [(name, 0.0) for name in names]
    low, high = 0.0, _scale(own)
    while removed(high) < budget and high < 1e300:
        low, high = high, 4 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(middle) >= budget else (middle, high)
    return [(name, high) for name in names]


def _scale(own: Sequence[Table]) -> float:
    """Return a λ of the size of the losses, above 0."""
    finite = [
        each.loss[np.isfinite(each.loss)].max(initial=0.0) / max(each.removed.max(initial=1.0), 1.0) for each in own
    ]
    return max(max(finite, default=0.0), 1e-30) / 1024


def _steepest(tables: Tables) -> dict[str, float]:
    """Return a λ beside which no loss counts."""
    return {name: 1e6 * max(_scale([Table(table.loss[layer], table.removed[layer]) for layer in range(len(table.loss))])
                            * 1024, 1e-6) for name, table in tables.items()}  # fmt: skip


def _can(tables: Tables, clusters: Clusters, budgets: Sequence[tuple[tuple[str, ...], float]]) -> bool:
    """Return whether some widths of these clusters meet all budgets."""
    for names, budget in budgets:
        own = [tables[name].of(cluster) for name in names for cluster in clusters]
        if sum(float(each.removed[best_width(each, np.inf)]) for each in own) < budget:
            return False
    return True


def _given_back(
    tables: Tables, clusters: Clusters, widths: dict[str, list[int]], budget: float
) -> dict[str, list[int]]:
    """Widen what can be widened without missing the budget, the largest saving of loss first."""
    own = {(name, place): tables[name].of(cluster) for name in widths for place, cluster in enumerate(clusters)}
    widths = {name: list(each) for name, each in widths.items()}
    surplus = sum(float(table.removed[widths[name][place]]) for (name, place), table in own.items()) - budget
    while True:
        options = []
        for (name, place), table in own.items():
            now = widths[name][place]
            for width in np.flatnonzero(np.isfinite(table.loss[now + 1 :])) + now + 1:
                if table.removed[now] - table.removed[width] <= surplus:
                    options.append((table.loss[now] - table.loss[width], -width, name, place, width))
        if not options or max(options)[0] <= 0:
            return widths
        _, _, name, place, width = max(options)
        surplus -= float(own[name, place].removed[widths[name][place]] - own[name, place].removed[width])
        widths[name][place] = int(width)


# --- which layers share --------------------------------------------------------------------------


def divided(tables: Tables, weights: Mapping[str, float], within: Within) -> Clusters:
    """Return which layers share their widths, for a given λ of each structure."""
    layers = len(next(iter(tables.values())).loss)
    clusters = [np.array([layer]) for layer in range(layers)]
    if within.max_segments is not None:
        clusters = stretches(tables, weights, within.max_segments)
    if within.max_shapes is not None:
        clusters = merged(tables, weights, clusters, within.max_shapes)
    return clusters


def stretches(tables: Tables, weights: Mapping[str, float], most: int) -> Clusters:
    """Return the best division into at most `most` stretches: best_r(j) = min_i best_{r-1}(i) + lagrangian(i … j-1)."""
    layers = len(next(iter(tables.values())).loss)
    worth = np.full((layers + 1, layers + 1), np.inf)
    for first in range(layers):
        for last in range(first + 1, layers + 1):
            worth[first, last] = lagrangian(tables, np.arange(first, last), weights)
    best = np.full((most + 1, layers + 1), np.inf)
    best[0, 0] = 0.0
    start = np.zeros((most + 1, layers + 1), np.int64)
    for run, end in itertools.product(range(1, most + 1), range(1, layers + 1)):
        options = best[run - 1, :end] + worth[:end, end]
        start[run, end] = int(np.argmin(options))
        best[run, end] = options[start[run, end]]
    run, end = int(np.argmin(best[:, layers])), layers
    clusters: Clusters = []
    while end > 0:
        first = int(start[run, end])
        clusters.insert(0, np.arange(first, end))
        run, end = run - 1, first
    return clusters


def merged(tables: Tables, weights: Mapping[str, float], clusters: Clusters, most: int) -> Clusters:
    """Merge clusters, the pair that costs least first, until at most `most` are left."""
    clusters = list(clusters)
    worth = [lagrangian(tables, cluster, weights) for cluster in clusters]
    pairs = {
        (a, b): lagrangian(tables, np.concatenate([clusters[a], clusters[b]]), weights)
        for a, b in itertools.combinations(range(len(clusters)), 2)
    }
    alive = set(range(len(clusters)))
    while len(alive) > most:
        a, b = min(
            ((a, b) for a, b in pairs if a in alive and b in alive), key=lambda pair: _rise(pairs[pair], worth, pair)
        )
        clusters[a], worth[a] = np.sort(np.concatenate([clusters[a], clusters[b]])), pairs[a, b]
        alive.remove(b)
        for other in alive - {a}:
            pairs[min(a, other), max(a, other)] = lagrangian(
                tables, np.concatenate([clusters[a], clusters[other]]), weights
            )
    return sorted((clusters[index] for index in alive), key=lambda cluster: int(cluster[0]))


def _rise(together: float, worth: Sequence[float], pair: tuple[int, int]) -> float:
    """Return what sharing costs two clusters; infinite where no width suits both."""
    return together - worth[pair[0]] - worth[pair[1]] if np.isfinite(together) else np.inf
