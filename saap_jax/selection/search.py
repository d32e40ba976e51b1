"""Stage 2c: from scores to what is kept, under a parameter budget. Sees scores and costs, no model.

Units are removed in *blocks*. Within a layer and structure the units are sorted by priority (their score as the
allocation ranks it), least important first (equal: the lower index first), and cut into blocks such that after each
block the kept width is a multiple of `multiple_of`; with `depth` all units are one block. Every allocation is the same
solver, with its own key and its own split of the budget:

| allocation      | key of a block, ascending                                           | budgets                   |
|-----------------|---------------------------------------------------------------------|---------------------------|
| `uniform`       | share of the units of its (layer, structure) that is gone after it  | each layer the same share |
| `uniform_floor` | the same, but last where attention loses more than the layer does   | each layer the same share |
| `log`           | as `uniform_floor`                                                  | in proportion to log(l+1) |
| `softmax`       | as `uniform_floor`                                                  | ∝ e^(-mean score / ε)     |
| `global`        | mean score of its units, by `rank_by` over the cost of a unit       | one                       |
| `adaptive`      | the same of score · e^(λ · ASI), which ranks as log score + λ · ASI | one                       |

An `Allocation` of your own in `ALLOCATIONS` has its own split of the budget, or its own key.

With `attention_share` each structure has budgets of its own. Structures that are no layers', those of a traced model,
have `Limits` of their own: the copies of one lose as many units each, so that a block is as many units of every copy,
and `uniform` gives each structure a budget in proportion to its size. Equal keys: the cheaper block first, then
attention before MLP (the structure that comes first), then the lower layer. The solver takes blocks until its budget is
met, then gives back, last taken first, what the surplus covers; when all budgets are met, what they removed too much
together is given back too, a block of the budget that is furthest exceeded first.

How good is that? Scores of at least 0 and `score_per_parameter`, or equal costs: the score removed is at most that of
the optimum plus that of one block, the one that crosses the budget (the blocks before it are a fractional optimum of
the knapsack); with blocks of equal cost it is the optimum. `solver="exact"` is always the optimum. With `max_segments`
or `max_shapes`, layers share widths, which is another problem: see `shapes`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.search import PerStructure, SearchConfig
from saap_jax.runtime.frames import repr_html, to_dataframe
from saap_jax.selection.budget import (
    SLACK,
    Blocks,
    highest_ratio,
    most_removable,
    shares_of,
    split_budget,
    split_structures,
    take_blocks,
)
from saap_jax.selection.shapes import most_shaped, take_shaped
from saap_jax.selection.stability import stabilised, standardised
from saap_jax.types import STRUCTURES, Keep, Limits, Scores

DEVICE_WIDTHS = {"any": 1, "tpu": 128, "gpu": 64, "cpu": 16}
"""MLP channels that a device works off at once."""


class Selection(NamedTuple):
    """What a search decided."""

    keep: Keep
    asked: float
    """Share of the prunable parameters that was to be removed."""
    actual: float
    """Share that is removed: at least `asked`, by less than one block more."""
    removed: int
    """Parameters removed."""
    divergences: tuple[float, ...] = ()
    """On held-out text in nats a token, of `search.learn` or else `search.evolve`, if there was one: before, and after
    each round, or all generations."""
    price: tuple[float, ...] = ()
    """Of `search.shape = uniform`, on held-out text in nats a token: of free layers, and of these, which are alike."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield how many units each layer keeps of each structure."""
        for structure, kept in self.keep.items():
            for layer, units in enumerate(np.atleast_2d(kept)):
                yield {"structure": structure, "layer": layer, "kept": int(np.sum(units))}

    to_dataframe = to_dataframe
    _repr_html_ = repr_html

    def __repr__(self) -> str:
        kept = ", ".join(f"{name} {int(np.sum(units)):,}" for name, units in self.keep.items())
        return f"Selection({self.actual:.2%} removed, {self.asked:.2%} asked; keeps {kept})"


def search(
    scores: Scores,
    costs: dict[str, np.ndarray],
    existing: Keep,
    ratio: float,
    config: SearchConfig,
    stability: Scores | None = None,
    gone: Keep | None = None,
    limits: Mapping[str, Limits] | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters is removed.

    Args:
        scores: importance, `[layers, units]` a structure.
        costs: parameters a unit, `[layers]` a structure.
        existing: which units there are, `[layers, units]` a structure.
        ratio: share of all prunable parameters (layers left alone included) to remove, in [0, 1).
        config: allocation, floors and alignment.
        stability: the indicator ASI, `[layers, units]` a structure; read by `adaptive` with a `stability_weight`.
        gone: units that an earlier step toward this ratio removed, `[layers, units]` a structure. They are not kept,
            and count toward `ratio`; their scores are not read.
        limits: of structures that are no layers', `[copies, units]` each, with as many units in each copy; what
            `config` says of layers, attention and MLP is then not read. None: `attention` and `mlp` of the same layers.

    Raises:
        ValueError: a ratio outside [0, 1), a score missing or not finite, or a budget that cannot be met.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    asked = with_what_can_go(config, existing, limits)
    config = asked.at_ratio(ratio)
    priority = priorities(scores, costs, existing, config, stability, gone)
    order = {name: np.argsort(values, axis=1, kind="stable") for name, values in priority.items()}
    prunable = sum(int((units.sum(axis=1) * costs[name]).sum()) for name, units in existing.items())
    target = math.ceil(ratio * prunable * (1 - SLACK))
    blocks, quotas = _blocks_and_quotas(priority, order, costs, existing, config, limits, scores, target)
    if limits is None and (config.max_segments or config.max_shapes):
        left = {name: (units if gone is None else units & ~gone[name]).sum(axis=1) for name, units in existing.items()}
        key = blocks.key(config)
        units = {name: each.sum(axis=1) for name, each in existing.items()}
        taken = take_shaped(blocks, key, units, left, costs, target, prunable, config)
    else:
        try:
            taken = take_blocks(blocks, quotas, target, prunable, config)
        except ValueError:
            if asked is config or ratio <= (top := largest_ratio(costs, existing, asked, limits)):
                raise
            raise ValueError(
                f"ratio: {ratio:.4g} of the prunable parameters cannot be removed; the largest possible ratio is "
                f"{top:.4f} under min_keep, max_ratio, skip_layers, multiple_of, attention_share and attention_from: "
                "relax one of them"
            ) from None
    keep = _keep(blocks.rows(taken), order, existing, limits is not None)
    if config.whole_layers:
        last = STRUCTURES[-1]
        lost = np.asarray(existing[last].any(axis=1) & ~keep[last].any(axis=1))
        keep = {name: units & ~lost[:, None] for name, units in keep.items()}
    if gone is not None:  # a surplus may have given some of it back
        keep = {name: kept & ~gone[name] for name, kept in keep.items()}
    removed = prunable - sum(int((kept.sum(axis=1) * costs[name]).sum()) for name, kept in keep.items())
    return Selection(keep, ratio, removed / max(prunable, 1), removed)


def with_what_can_go(config: SearchConfig, existing: Keep, limits: Mapping[str, Limits] | None) -> SearchConfig:
    """Return options without a share for attention where no layer has more of its units than it keeps at least.

    So it is with a single KV head in each layer: all that goes is then of the MLP.
    """
    if (
        limits is None
        and config.attention_share
        and (existing["attention"].sum(axis=1) <= config.min_keep.attention).all()
    ):
        return dataclasses.replace(config, attention_share=0.0)
    return config


def largest_ratio(
    costs: dict[str, np.ndarray], existing: Keep, config: SearchConfig, limits: Mapping[str, Limits] | None = None
) -> float:
    """Return the largest ratio that `search` can meet whatever the scores, rounded down to four decimals; below 1."""
    config = with_what_can_go(config, existing, limits)
    if config.at_ratio(1.0) is not config:  # the more goes, the more of it comes from attention
        return highest_ratio(lambda ratio: largest_ratio(costs, existing, config.at_ratio(ratio), limits) >= ratio)
    equal: Scores = {name: np.where(units, 1.0, np.nan) for name, units in existing.items()}
    order = {name: np.argsort(values, axis=1, kind="stable") for name, values in equal.items()}
    blocks, quotas = _blocks_and_quotas(equal, order, costs, existing, config, limits, equal)
    prunable = sum(int((units.sum(axis=1) * costs[name]).sum()) for name, units in existing.items())
    if limits is None and (config.max_segments or config.max_shapes):
        units = {name: each.sum(axis=1) for name, each in existing.items()}
        most = most_shaped(blocks, units, units, costs, config)
    else:
        most = most_removable(blocks, quotas)
    return min(most * 10_000 // max(prunable, 1) / 10_000, 0.9999)


def aligned(config: SearchConfig) -> PerStructure:
    """Return what kept widths are multiples of: `multiple_of`, or the device's preset for a free MLP."""
    if config.multiple_of.mlp > 1:
        return config.multiple_of
    return dataclasses.replace(config.multiple_of, mlp=DEVICE_WIDTHS[config.device])


# --- what is ranked --------------------------------------------------------------------------------


def priorities(
    scores: Scores,
    costs: dict[str, np.ndarray],
    existing: Keep,
    config: SearchConfig,
    stability: Scores | None,
    gone: Keep | None,
) -> Scores:
    """Return what units are ranked by, float64, larger = kept longer, NaN where there is no unit."""
    present = existing if gone is None else {name: units & ~gone[name] for name, units in existing.items()}
    checked = _checked("scores", scores, present)
    priority: Scores = {name: _normalised(name, values, config) for name, values in checked.items()}
    allocation = ALLOCATIONS[config.allocation]
    if allocation.stability and config.stability_weight != 0:
        if stability is None:
            raise ValueError(
                f"search: allocation {config.allocation!r} with stability_weight {config.stability_weight:g} expects a "
                "stability indicator, got none; pass stability=stability_indicator(fluctuation_of(per-example scores))"
            )
        indicator = _checked("stability", stability, present)
        priority = stabilised(priority, indicator, config.stability_weight)
    priority = allocation.priority(priority, config)
    if config.rank_by == "score_per_parameter":
        priority = {name: values / costs[name][:, None] for name, values in priority.items()}
    if gone is None:
        return priority
    lowest = min(0.0, *(np.nanmin(np.asarray(values), initial=0.0) for values in priority.values()))
    first = np.nextafter(lowest, -np.inf)
    return {name: np.where(existing[name] & gone[name], first, values) for name, values in priority.items()}


def _checked(what: str, given: Scores, existing: Keep) -> Scores:
    """Return one float64 array a structure, NaN where there is no unit; raise where something is missing."""
    checked: Scores = {}
    for name in existing:
        if name not in given:
            raise ValueError(f"search: structure {name} has no {what} (given: {', '.join(given) or 'none'})")
        if given[name].shape != existing[name].shape:
            raise ValueError(f"search: expected {name} {what} of {existing[name].shape}, got {given[name].shape}")
        checked[name] = np.where(existing[name], np.asarray(given[name], np.float64), np.nan)
        bad = np.argwhere(existing[name] & ~np.isfinite(checked[name]))
        if len(bad):
            raise ValueError(f"search: {what} of {name} unit {bad[0][1]} in layer {bad[0][0]} are not finite")
    return checked


def _normalised(
    name: str, values: Float[Array | np.ndarray, "layers units"], config: SearchConfig
) -> Float[Array | np.ndarray, "layers units"]:
    """Return a structure's scores free of its unit, if `normalize` says so.

    `layer_zscore` is the idea of FLAP (arXiv:2312.11983) for any estimator, with its sample standard deviation (divisor
    n - 1). FLAP itself standardises the coordinates of a layer's heads before it averages those of each head: that is
    `fluctuation(standardize=True)`, without `normalize`.
    """
    if config.normalize == "layer_zscore":
        return standardised(values, ddof=1)
    if config.normalize == "structure_mean":
        mean = np.nanmean(values) if np.isfinite(values).any() else 1.0
        if not mean > 0:
            raise ValueError(
                f"search: normalize 'structure_mean' expects scores of {name} with a mean above 0, got {mean:.4g}; "
                "use another estimator or 'none'"
            )
        return values / mean
    return values


def levels_of(existing: Keep, config: SearchConfig) -> dict[str, list[np.ndarray]]:
    """Return how many of its units each layer may lose, ascending from 0, a list over the layers for each structure."""
    found = {}
    for name, exists in existing.items():
        limits, skipped = _layer_limits(name, config), skipped_layers(config.skip_layers, len(exists))
        stops = [_stops(0 if skip else int(units.sum()), limits, config.depth)
                 for units, skip in zip(exists, skipped, strict=True)]  # fmt: skip
        found[name] = [np.concatenate([np.zeros(1, np.int64), each]) for each in stops]
    return found


# --- blocks ----------------------------------------------------------------------------------------


def skipped_layers(skip_layers: Sequence[int | float], layers: int) -> np.ndarray:
    """Return which layers are left alone; negative numbers count from the end, shares are of the layers.

    >>> skipped_layers((0.13, -0.07), 32).nonzero()[0].tolist()
    [0, 1, 2, 3, 30, 31]
    """
    skipped = np.zeros(layers, bool)
    for layer in skip_layers:
        if not float(layer).is_integer():
            count = round(abs(layer) * layers)
            skipped[slice(count) if layer > 0 else slice(layers - count, None)] = True
            continue
        if not -layers <= layer < layers:
            raise ValueError(
                f"search.skip_layers: expected layers in [-{layers}, {layers}) of this model, got {layer}; "
                "say which of its layers are left alone, or () for none"
            )
        skipped[int(layer)] = True
    return skipped


def _blocks_and_quotas(
    priority: Scores,
    order: dict[str, np.ndarray],
    costs: dict[str, np.ndarray],
    existing: Keep,
    config: SearchConfig,
    limits: Mapping[str, Limits] | None,
    scores: Scores,
    target: int = 0,
) -> tuple[Blocks, list[tuple[np.ndarray, float]]]:
    """Return all removable blocks, and the budgets that they are split into.

    Args:
        scores: as they were given, of which `Allocation.budgets_by_scores` reads means.
        target: parameters that are to go, from which follows what `Allocation.rounded_down` rounds.
    """
    none, nothing = np.zeros(0, np.int64), np.zeros(0)
    parts, size = [Blocks(none, none, none, none, nothing, nothing)], {}
    for index, (name, exists) in enumerate(existing.items()):
        if limits is None:
            pruned = ~skipped_layers(config.skip_layers, len(exists))
            rows = list(np.flatnonzero(pruned)[:, None])
            own = _layer_limits(name, config)
        else:
            pruned, rows, own = np.ones(len(exists), bool), [np.arange(len(exists))], limits[name]
        for layers in rows:
            ranked = np.take_along_axis(np.asarray(priority[name])[layers], order[name][layers], axis=1)
            parts.append(_blocks_of(index, layers, ranked, costs[name], exists, own, config.depth))
        size[name] = exists.sum(axis=1) * costs[name] * pruned
    blocks = Blocks(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    means = _means(scores, existing, together=limits is not None)
    if limits is None:
        blocks = _rounded_down(blocks, size, target, config, means)
    if config.whole_layers:
        blocks = _joined_layers(blocks)
    split = split_budget if limits is None else split_structures
    return blocks, split(blocks, size, config, target, means)


def _layer_limits(name: str, config: SearchConfig) -> Limits:
    """Return what each layer may lose of attention or MLP."""
    return Limits(getattr(config.min_keep, name), getattr(config.max_ratio, name), getattr(aligned(config), name))


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
    blocks: Blocks, size: dict[str, np.ndarray], target: int, config: SearchConfig, scores: np.ndarray
) -> Blocks:
    """Return the blocks with those last that exceed the share of their layer, of structures that are rounded down."""
    allocation = ALLOCATIONS[config.allocation]
    if not allocation.rounded_down:
        return blocks
    layers = np.sum([*size.values()], axis=0)
    removable = np.bincount(blocks.layer, blocks.cost, len(layers))
    lost = target * shares_of(allocation, layers, scores, config, removable, target) if layers.any() else layers
    most = lost / np.maximum(layers, 1) * (1 + SLACK)
    names = [index for index, name in enumerate(size) if name in allocation.rounded_down]
    beyond = np.isin(blocks.structure, names) & (blocks.share > most[blocks.layer])
    return blocks._replace(share=blocks.share + beyond)


def _blocks_of(
    structure: int,
    layers: np.ndarray,
    ranked: np.ndarray,
    costs: np.ndarray,
    exists: np.ndarray,
    limits: Limits,
    depth: bool,
) -> Blocks:
    """Return the blocks of layers that lose as many units each: of one layer, or of all copies of a structure.

    Args:
        ranked: the priorities of the units, ascending, `[layers, units]`.
    """
    units = int(exists[layers[0]].sum())
    stops = _stops(units, limits, depth)
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


def _stops(units: int, limits: Limits, depth: bool) -> np.ndarray:
    """Return after how many of a layer's units a block may end, ascending."""
    most = min(units - limits.min_keep, math.floor(units * limits.max_ratio * (1 + SLACK)))
    if depth:
        return np.arange(units, most + 1) if units else np.zeros(0, np.int64)
    return np.arange(units % limits.multiple_of or limits.multiple_of, most + 1, limits.multiple_of)


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
