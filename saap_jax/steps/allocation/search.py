"""Stage 2c: from scores to what is kept, under a parameter budget. Sees scores and costs, no model.

Units are removed in *blocks*. Within a layer and structure the units are sorted by their score (as the allocation ranks
it), least important first (equal: the lower index first), and cut into blocks such that after each block the kept width
is a multiple of `multiple_of`; with `depth` all units are one block. Every allocation is the same solver, with its own
key and its own split of the budget:

| allocation       | key of a block, ascending                                           | budgets                   |
|------------------|---------------------------------------------------------------------|---------------------------|
| `uniform`        | share of the units of its (layer, structure) that is gone after it  | each layer the same share |
| `uniform(floor)` | the same, but last where attention loses more than the layer does   | each layer the same share |
| `log`            | as with floor                                                       | in proportion to log(l+1) |
| `softmax`        | as with floor                                                       | ∝ e^(-mean score / ε)     |
| `global`         | mean score of its units, over the cost of a unit unless `by=score`  | one                       |

With a share for attention each structure has budgets of its own. Structures that are no layers', those of a traced
model, have `Limits` of their own: the copies of one lose as many units each, so that a block is as many units of every
copy, and `uniform` gives each structure a budget in proportion to its size. Equal keys: the cheaper block first, then
attention before MLP (the structure that comes first), then the lower layer. The solver takes blocks until its budget is
met, then gives back, last taken first, what the surplus covers; when all budgets are met, what they removed too much
together is given back too, a block of the budget that is furthest exceeded first.

How good is that? Scores of at least 0 a parameter, or equal costs: the score removed is at most that of the optimum
plus that of one block, the one that crosses the budget (the blocks before it are a fractional optimum of the knapsack);
with blocks of equal cost it is the optimum. `solver=exact` is always the optimum. With `max_segments` or `max_shapes`,
layers share widths, which is another problem: see `shapes`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from saap_jax.steps.allocation.budget import (
    SLACK,
    Blocks,
    Sharing,
    highest_ratio,
    most_removable,
    shares_of,
    split_budget,
    split_structures,
    take_blocks,
)
from saap_jax.steps.allocation.shapes import most_shaped, take_shaped
from saap_jax.steps.limits import Within, protected, stops_of
from saap_jax.types import STRUCTURES, Keep, Limits, Scores


class Selection(NamedTuple):
    """What is kept, and what that removes."""

    keep: Keep
    asked: float
    """Share of the prunable parameters that was to be removed."""
    actual: float
    """Share that is removed: at least `asked`, by less than one block more."""
    removed: int
    """Parameters removed."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield how many units each layer keeps of each structure."""
        for structure, kept in self.keep.items():
            for layer, units in enumerate(np.atleast_2d(kept)):
                yield {"structure": structure, "layer": layer, "kept": int(np.sum(units))}

    def __repr__(self) -> str:
        kept = ", ".join(f"{name} {int(np.sum(units)):,}" for name, units in self.keep.items())
        return f"Selection({self.actual:.2%} removed, {self.asked:.2%} asked; keeps {kept})"


class Prunable(NamedTuple):
    """What there is to prune."""

    costs: Mapping[str, np.ndarray]
    """Parameters a unit, `[layers]` a structure."""
    existing: Keep
    """Which units there are, `[layers, units]` a structure."""
    limits: Mapping[str, Limits] | None = None
    """Of structures that are no layers', `[copies, units]` each, with as many units in each copy; what `Within` says of
    layers, attention and MLP is then not read. None: `attention` and `mlp` of the same layers."""

    @property
    def parameters(self) -> int:
        """All prunable parameters, layers left alone included."""
        return sum(int((units.sum(axis=1) * self.costs[name]).sum()) for name, units in self.existing.items())


def search(
    scores: Scores,
    prunable: Prunable,
    ratio: float,
    allocation: Sharing,
    within: Within,
    gone: Keep | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters is removed.

    Args:
        scores: importance, `[layers, units]` a structure.
        ratio: share of all prunable parameters (layers left alone included) to remove, in [0, 1).
        gone: units that an earlier step toward this ratio removed, `[layers, units]` a structure. They are not kept,
            and count toward `ratio`; their scores are not read.

    Raises:
        ValueError: a ratio outside [0, 1), a score missing or not finite, or a budget that cannot be met.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    costs, existing, limits = prunable
    asked = within if limits is not None else within.where_can_go(existing)
    within = asked.at(ratio)
    allocation.check_limits(within)
    priority = priorities(scores, prunable, allocation, gone)
    order = {name: np.argsort(values, axis=1, kind="stable") for name, values in priority.items()}
    total = prunable.parameters
    target = math.ceil(ratio * total * (1 - SLACK))
    blocks, quotas = _blocks_and_quotas(priority, order, prunable, allocation, within, scores, target)
    if limits is None and (within.max_segments or within.max_shapes):
        left = {name: (units if gone is None else units & ~gone[name]).sum(axis=1) for name, units in existing.items()}
        units = {name: each.sum(axis=1) for name, each in existing.items()}
        taken = take_shaped(blocks, blocks.key(allocation), units, left, costs, target, total, within)
    else:
        try:
            taken = take_blocks(blocks, quotas, target, total, allocation)
        except ValueError:
            if asked is within or ratio <= (top := largest_ratio(prunable, allocation, asked)):
                raise
            raise ValueError(
                f"ratio: {ratio:.4g} of the prunable parameters cannot be removed; the largest possible ratio is "
                f"{top:.4f} under min_keep, max_ratio, protect, multiple_of, attention and attention_from of `within`: "
                "relax one of them"
            ) from None
    keep = _keep(blocks.rows(taken), order, existing, limits is not None)
    if within.whole_layers:
        last = STRUCTURES[-1]
        lost = np.asarray(existing[last].any(axis=1) & ~keep[last].any(axis=1))
        keep = {name: units & ~lost[:, None] for name, units in keep.items()}
    if gone is not None:  # a surplus may have given some of it back
        keep = {name: kept & ~gone[name] for name, kept in keep.items()}
    removed = total - sum(int((kept.sum(axis=1) * costs[name]).sum()) for name, kept in keep.items())
    return Selection(keep, ratio, removed / max(total, 1), removed)


def largest_ratio(prunable: Prunable, allocation: Sharing, within: Within) -> float:
    """Return the largest ratio that `search` can meet whatever the scores, rounded down to four decimals; below 1."""
    existing, limits = prunable.existing, prunable.limits
    if limits is None:
        within = within.where_can_go(existing)
    if within.at(1.0) is not within:  # the more goes, the more of it comes from attention
        return highest_ratio(lambda ratio: largest_ratio(prunable, allocation, within.at(ratio)) >= ratio)
    equal: Scores = {name: np.where(units, 1.0, np.nan) for name, units in existing.items()}
    order = {name: np.argsort(values, axis=1, kind="stable") for name, values in equal.items()}
    blocks, quotas = _blocks_and_quotas(equal, order, prunable, allocation, within, equal)
    if limits is None and (within.max_segments or within.max_shapes):
        units = {name: each.sum(axis=1) for name, each in existing.items()}
        most = most_shaped(blocks, units, units, prunable.costs, within)
    else:
        most = most_removable(blocks, quotas)
    return min(most * 10_000 // max(prunable.parameters, 1) / 10_000, 0.9999)


# --- what is ranked --------------------------------------------------------------------------------


def priorities(scores: Scores, prunable: Prunable, allocation: Sharing, gone: Keep | None = None) -> Scores:
    """Return what units are ranked by, float64, larger = kept longer, NaN where there is no unit."""
    existing = prunable.existing
    present = existing if gone is None else {name: units & ~gone[name] for name, units in existing.items()}
    priority = allocation.priority(checked("scores", scores, present))
    if allocation.by == "score_per_parameter":
        priority = {name: values / prunable.costs[name][:, None] for name, values in priority.items()}
    if gone is None:
        return priority
    lowest = min(0.0, *(np.nanmin(np.asarray(values), initial=0.0) for values in priority.values()))
    first = np.nextafter(lowest, -np.inf)
    return {name: np.where(existing[name] & gone[name], first, values) for name, values in priority.items()}


def checked(what: str, given: Scores, present: Keep) -> Scores:
    """Return one float64 array a structure, NaN where there is no unit.

    Raises:
        ValueError: something is missing, of another shape, or not finite where there is a unit.
    """
    found: Scores = {}
    for name in present:
        if name not in given:
            raise ValueError(f"search: structure {name} has no {what} (given: {', '.join(given) or 'none'})")
        if given[name].shape != present[name].shape:
            raise ValueError(f"search: expected {name} {what} of {present[name].shape}, got {given[name].shape}")
        found[name] = np.where(present[name], np.asarray(given[name], np.float64), np.nan)
        bad = np.argwhere(present[name] & ~np.isfinite(found[name]))
        if len(bad):
            raise ValueError(f"search: {what} of {name} unit {bad[0][1]} in layer {bad[0][0]} are not finite")
    return found


def levels_of(existing: Keep, within: Within) -> dict[str, list[np.ndarray]]:
    """Return how many of its units each layer may lose, ascending from 0, a list over the layers for each structure."""
    found = {}
    for name, exists in existing.items():
        limits, skipped = within.layer(name), protected(within.protect, len(exists))
        stops = [stops_of(0 if skip else int(units.sum()), limits, within.depth)
                 for units, skip in zip(exists, skipped, strict=True)]  # fmt: skip
        found[name] = [np.concatenate([np.zeros(1, np.int64), each]) for each in stops]
    return found


# --- blocks ----------------------------------------------------------------------------------------


def _blocks_and_quotas(
    priority: Scores,
    order: dict[str, np.ndarray],
    prunable: Prunable,
    allocation: Sharing,
    within: Within,
    scores: Scores,
    target: int = 0,
) -> tuple[Blocks, list[tuple[np.ndarray, float]]]:
    """Return all removable blocks, and the budgets that they are split into.

    Args:
        scores: as they were given, of which shares by scores read means.
        target: parameters that are to go, from which follows what `rounded_down` rounds.
    """
    costs, existing, limits = prunable
    none, nothing = np.zeros(0, np.int64), np.zeros(0)
    parts, size = [Blocks(none, none, none, none, nothing, nothing)], {}
    for index, (name, exists) in enumerate(existing.items()):
        if limits is None:
            pruned = ~protected(within.protect, len(exists))
            rows, own = list(np.flatnonzero(pruned)[:, None]), within.layer(name)
        else:
            pruned, rows, own = np.ones(len(exists), bool), [np.arange(len(exists))], limits[name]
        for layers in rows:
            ranked = np.take_along_axis(np.asarray(priority[name])[layers], order[name][layers], axis=1)
            stops = stops_of(int(exists[layers[0]].sum()), own, within.depth)
            parts.append(_blocks_of(index, layers, ranked, costs[name], exists, stops))
        size[name] = exists.sum(axis=1) * costs[name] * pruned
    blocks = Blocks(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    means = _means(scores, existing, together=limits is not None)
    if limits is None:
        blocks = _rounded_down(blocks, size, target, allocation, means)
    if within.whole_layers:
        blocks = _joined_layers(blocks)
    if limits is None:
        return blocks, split_budget(blocks, size, within.attention, allocation, target, means)
    return blocks, split_structures(blocks, size, allocation, target, means)


def _means(scores: Scores, existing: Keep, together: bool) -> np.ndarray:
    """Return the mean score of the units of each layer, or with `together` of each structure; NaN where is none."""
    given = [np.where(units, np.asarray(scores[name], np.float64), np.nan) for name, units in existing.items()]
    rows = [values.ravel() for values in given] if together else [*np.concatenate(given, axis=1)]
    return np.array([values[~np.isnan(values)].mean() if (~np.isnan(values)).any() else np.nan for values in rows])


def _joined_layers(blocks: Blocks) -> Blocks:
    """Return blocks of whole layers, in the place of those of the last structure; alone where a layer has one."""
    last = blocks.structure == len(STRUCTURES) - 1
    both = np.isin(blocks.layer, blocks.layer[~last]) & last
    first = {int(layer): row for row, layer in enumerate(blocks.layer) if not last[row]}
    cost, score = blocks.cost.copy(), blocks.score.copy()
    for row in np.flatnonzero(both):
        other = first[int(blocks.layer[row])]
        cost[row] += blocks.cost[other]
        score[row] = (score[row] + blocks.score[other]) / 2
    alone = ~last & ~np.isin(blocks.layer, blocks.layer[last])
    return blocks._replace(cost=cost, score=score).rows(last | alone)


def _rounded_down(
    blocks: Blocks, size: dict[str, np.ndarray], target: int, allocation: Sharing, scores: np.ndarray
) -> Blocks:
    """Return the blocks with those last that exceed the share of their layer, of structures that are rounded down."""
    if not allocation.rounded_down:
        return blocks
    layers = np.sum([*size.values()], axis=0)
    removable = np.bincount(blocks.layer, blocks.cost, len(layers))
    lost = target * shares_of(allocation, layers, scores, removable, target) if layers.any() else layers
    most = lost / np.maximum(layers, 1) * (1 + SLACK)
    names = [index for index, name in enumerate(size) if name in allocation.rounded_down]
    beyond = np.isin(blocks.structure, names) & (blocks.share > most[blocks.layer])
    return blocks._replace(share=blocks.share + beyond)


def _blocks_of(
    structure: int, layers: np.ndarray, ranked: np.ndarray, costs: np.ndarray, exists: np.ndarray, stops: np.ndarray
) -> Blocks:
    """Return the blocks of layers that lose as many units each: of one layer, or of all copies of a structure.

    Args:
        ranked: the priorities of the units, ascending, `[layers, units]`.
        stops: after how many units a block may end.
    """
    units = int(exists[layers[0]].sum())
    starts = np.concatenate([np.zeros(1, np.int64), stops])[: len(stops)]
    means = ranked[:, : stops[-1] if len(stops) else 0].mean(axis=0)
    if len(stops):
        # a block of one unit keeps its exact score, for equal scores must stay equal; rounding of the means must not
        # put a block before its predecessor
        means = np.maximum.accumulate(np.add.reduceat(means, starts) / (stops - starts))
    return Blocks(
        structure=np.full(len(stops), structure, np.int64),
        layer=np.full(len(stops), layers[0], np.int64),
        stop=stops,
        cost=(stops - starts) * int(costs[layers].sum()),
        score=means,
        share=stops / max(units, 1),
    )


def _keep(removed: Blocks, order: dict[str, np.ndarray], existing: Keep, together: bool) -> Keep:
    """Return the units that stay; with `together` each layer (or copy) loses what the first one does."""
    keep = {name: units.copy() for name, units in existing.items()}
    for index, name in enumerate(existing):
        own = removed.rows(removed.structure == index)
        for layer in np.unique(own.layer):
            stop = own.stop[own.layer == layer].max()
            for each in range(len(keep[name])) if together else (layer,):
                keep[name][each, order[name][each, :stop]] = False
    return keep
