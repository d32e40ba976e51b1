"""Stage 2c: from scores to what is kept, under a parameter budget. Sees scores and costs, no model.

Units are removed in *blocks*. Within a layer and structure the units are sorted by score, least important first (equal
scores: the lower index first), and cut into blocks such that after each block the kept width is a multiple of
`multiple_of`. Blocks are then taken in ascending order of a key until the asked number of parameters is removed:

- `uniform`: each layer has its own budget, the same share of its prunable parameters; the key is the share of the
  layer's units of that structure that would be gone after the block. An attention unit so goes only when its whole
  share is due.
- `global`: one budget; the key is the block's mean score, by `rank_by` divided by the parameters of a unit.

Equal keys: the cheaper block first, then attention before MLP, then the lower layer. At last, blocks are given back,
most important first, while the removal still meets the budget.
"""

from typing import Any, NamedTuple

import numpy as np

from saap_jax.config import SearchConfig
from saap_jax.types import STRUCTURES, Keep, Scores


class Selection(NamedTuple):
    """What a search decided."""

    keep: Keep
    asked: float
    """Share of the prunable parameters that was to be removed."""
    actual: float
    """Share that is removed: at least `asked`, by less than one block more."""
    removed: int
    """Parameters removed."""


class Blocks(NamedTuple):
    """All removable blocks, one row each, in ascending order within their (structure, layer)."""

    structure: np.ndarray
    layer: np.ndarray
    stop: np.ndarray
    """Units of the (structure, layer) that are gone after this block."""
    cost: np.ndarray
    """Parameters in the block."""
    score: np.ndarray
    """Mean score of the block's units, made non-decreasing within its (structure, layer)."""
    unit_cost: np.ndarray
    share: np.ndarray
    """Share of the units of the (structure, layer) that are gone after this block."""

    def rows(self, chosen: np.ndarray) -> "Blocks":
        """Return the chosen blocks, by mask or index."""
        return Blocks(*(column[chosen] for column in self))


def search(
    scores: Scores, costs: dict[str, np.ndarray], existing: Keep, ratio: float, config: SearchConfig
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters is removed.

    Args:
        scores: importance, `[layers, units]` a structure.
        costs: parameters a unit, `[layers]` a structure.
        existing: which units there are, `[layers, units]` a structure.
        ratio: share of all prunable parameters (layers left alone included) to remove, in [0, 1).
        config: allocation, floors and alignment.

    Raises:
        ValueError: a ratio outside [0, 1), a score missing or not finite, or a budget that cannot be met.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    _check_scores(scores, existing)
    layers = len(existing[STRUCTURES[0]])
    order = {name: _ascending(scores[name], existing[name]) for name in STRUCTURES}
    blocks = _blocks(scores, order, costs, existing, config, _skipped(config.skip_layers, layers))
    size = {name: existing[name].sum(axis=1) * costs[name] for name in STRUCTURES}
    layer_size = np.sum(list(size.values()), axis=0)
    prunable = int(layer_size.sum())
    target = int(np.ceil(ratio * prunable - 1e-6))
    if config.allocation == "uniform":
        taken = _uniform(blocks, layer_size, target, prunable)
    else:
        key = blocks.score / blocks.unit_cost if config.rank_by == "score_per_parameter" else blocks.score
        taken = _take(blocks, key, target, prunable)
    keep = _keep(blocks.rows(taken), order, existing)
    removed = int(blocks.cost[taken].sum())
    return Selection(keep, ratio, removed / prunable, removed)


def _check_scores(scores: Scores, existing: Keep) -> None:
    for name in STRUCTURES:
        if name not in scores:
            raise ValueError(f"search: structure {name} has no scores (scored: {', '.join(scores) or 'none'})")
        if scores[name].shape != existing[name].shape:
            raise ValueError(f"search: expected {name} scores {existing[name].shape}, got {scores[name].shape}")
        bad = np.argwhere(existing[name] & ~np.isfinite(scores[name]))
        if len(bad):
            raise ValueError(f"search: the score of {name} unit {bad[0][1]} in layer {bad[0][0]} is not finite")


def _skipped(skip_layers: tuple[int, ...], layers: int) -> np.ndarray:
    """Return which layers are left alone; negative numbers count from the end."""
    skipped = np.zeros(layers, bool)
    for layer in skip_layers:
        if not -layers <= layer < layers:
            raise ValueError(f"skip_layers: expected layers in [-{layers}, {layers}), got {layer}")
        skipped[layer] = True
    return skipped


def _ascending(scores: Any, existing: np.ndarray) -> np.ndarray:
    """Return unit indices by ascending score, `[layers, units]`; units that do not exist come last."""
    return np.argsort(np.where(existing, scores, np.inf), axis=1, kind="stable")


def _blocks(
    scores: Scores,
    order: dict[str, np.ndarray],
    costs: dict[str, np.ndarray],
    existing: Keep,
    config: SearchConfig,
    skipped: np.ndarray,
) -> Blocks:
    parts = []
    for index, name in enumerate(STRUCTURES):
        multiple = getattr(config.multiple_of, name)
        for layer in np.flatnonzero(~skipped):
            units = int(existing[name][layer].sum())
            floor = max(getattr(config.min_keep, name), int(np.ceil(units * (1 - config.max_ratio) - 1e-9)))
            stops = np.arange(units % multiple or multiple, units - floor + 1, multiple)
            if not len(stops):
                continue
            ranked = np.asarray(scores[name][layer], np.float64)[order[name][layer]]
            starts = np.concatenate([[0], stops[:-1]])
            sums = np.concatenate([[0.0], np.cumsum(ranked[: stops[-1]])])
            # single units keep their exact score: equal scores must stay equal for the ties
            means = ranked[: stops[-1]] if multiple == 1 else (sums[stops] - sums[starts]) / (stops - starts)
            unit_cost = int(costs[name][layer])
            parts.append(
                Blocks(
                    structure=np.full(len(stops), index),
                    layer=np.full(len(stops), layer),
                    stop=stops,
                    cost=(stops - starts) * unit_cost,
                    score=np.maximum.accumulate(means),
                    unit_cost=np.full(len(stops), unit_cost),
                    share=stops / units,
                )
            )
    if not parts:
        empty = np.zeros(0, np.int64)
        return Blocks(empty, empty, empty, empty, np.zeros(0), empty, np.zeros(0))
    return Blocks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _take(blocks: Blocks, key: np.ndarray, target: int, prunable: int) -> np.ndarray:
    """Return the indices of the blocks that are removed: ascending keys until `target` parameters are gone."""
    ranking = np.lexsort((blocks.stop, blocks.layer, blocks.structure, blocks.cost, key))
    # blocks of one (structure, layer) must go in their own order, whatever their costs do to ties
    ranking = _in_own_order(blocks, ranking)
    gone = np.cumsum(blocks.cost[ranking])
    if target > (gone[-1] if len(gone) else 0):
        raise _impossible(target, int(gone[-1]) if len(gone) else 0, prunable)
    taken = ranking[: int(np.searchsorted(gone, target)) + 1] if target > 0 else ranking[:0]
    return _give_back(blocks, taken, int(blocks.cost[taken].sum()) - target)


def _in_own_order(blocks: Blocks, ranking: np.ndarray) -> np.ndarray:
    """Keep the places that each (structure, layer) has in the ranking, filled in ascending order of its blocks."""
    group = (blocks.structure * (blocks.layer.max(initial=0) + 1) + blocks.layer)[ranking]
    ordered = ranking.copy()
    places = np.argsort(group, kind="stable")
    inside = np.lexsort((blocks.stop[ranking], group))
    ordered[places] = ranking[inside]
    return ordered


def _give_back(blocks: Blocks, taken: np.ndarray, surplus: int) -> np.ndarray:
    """Drop taken blocks, most important first, while the surplus covers them and none behind them stays removed."""
    held: set[tuple[int, int]] = set()
    returned = []
    cheapest = blocks.cost[taken].min(initial=0)
    for place in range(len(taken) - 1, -1, -1):
        if surplus < cheapest or surplus <= 0:
            break
        block = taken[place]
        group = (int(blocks.structure[block]), int(blocks.layer[block]))
        if group not in held and blocks.cost[block] <= surplus:
            surplus -= int(blocks.cost[block])
            returned.append(place)
        else:
            held.add(group)
    return np.delete(taken, returned)


def _uniform(blocks: Blocks, layer_size: np.ndarray, target: int, prunable: int) -> np.ndarray:
    """Take the same share of every layer that may be pruned."""
    open_layers = np.unique(blocks.layer)
    open_size = int(layer_size[open_layers].sum())
    most = min((blocks.cost[blocks.layer == layer].sum() / layer_size[layer] for layer in open_layers), default=0.0)
    if target > most * open_size + 1e-6:
        raise _impossible(target, int(most * open_size), prunable)
    taken = []
    for layer in open_layers:
        rows = np.flatnonzero(blocks.layer == layer)
        own = blocks.rows(rows)
        share = int(np.ceil(target * int(layer_size[layer]) / open_size - 1e-6))
        taken.append(rows[_take(own, own.share, min(share, int(own.cost.sum())), prunable)])
    return np.concatenate(taken) if taken else np.zeros(0, np.int64)


def _impossible(target: int, most: int, prunable: int) -> ValueError:
    largest = np.floor(most / prunable * 10_000) / 10_000
    return ValueError(
        f"ratio: {target / prunable:.4g} of the prunable parameters cannot be removed; the largest possible ratio is "
        f"{largest:.4f} under min_keep, max_ratio, skip_layers and multiple_of: relax one of them"
    )


def _keep(removed: Blocks, order: dict[str, np.ndarray], existing: Keep) -> Keep:
    keep = {name: existing[name].copy() for name in STRUCTURES}
    for index, name in enumerate(STRUCTURES):
        own = removed.rows(removed.structure == index)
        for layer in np.unique(own.layer):
            keep[name][layer, order[name][layer, : own.stop[own.layer == layer].max()]] = False
    return keep
