"""The solver of all allocations: which blocks of units go under a budget of parameters; for blocks see `choose`."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saap_jax.types import Keep, Scores

SLACK = 1e-12
"""Relative rounding of a share, so that the ratio k / n of n parameters asks for k."""


class Blocks(NamedTuple):
    """All removable blocks, one row each, in ascending order within their group of units that go alike."""

    group: np.ndarray
    structure: np.ndarray
    layer: np.ndarray
    """The first of the layers (or copies) that lose as many units."""
    stop: np.ndarray
    """Units of each of them that are gone after this block."""
    cost: np.ndarray
    """Parameters in the block."""
    score: np.ndarray
    """Mean priority of the block's units, non-decreasing within its group."""
    share: np.ndarray
    """Share of the units that are gone after this block."""

    def rows(self, chosen: np.ndarray) -> "Blocks":
        """Return the chosen blocks, by mask or index."""
        return Blocks(*(column[chosen] for column in self))


Groups = list[tuple[str, np.ndarray]]
"""Structure, and the layers (or copies) of it that lose as many units each."""

Budgets = list[tuple[np.ndarray, float]]
"""Rows of the blocks that share a budget, and its part of the whole."""


def blocks_of(
    ranked: Scores,
    costs: Mapping[str, np.ndarray],
    existing: Keep,
    groups: Groups,
    stops: Sequence[np.ndarray],
) -> Blocks:
    """Return the blocks of groups.

    Args:
        ranked: the priorities of the units, ascending, `[layers, units]` a structure.
        stops: after how many units a block may end, of each group.
    """
    none = np.zeros(0, np.int64)
    nothing = np.zeros(0)
    parts = [Blocks(none, none, none, none, none, nothing, nothing)]
    names = [*existing]
    for number, ((name, rows), ends) in enumerate(zip(groups, stops, strict=True)):
        if not len(ends):
            continue
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        means = ranked[name][rows][:, : ends[-1]].mean(axis=0)
        # a block of one unit keeps its exact score, for equal scores must stay equal; rounding of the means must not
        # put a block before its predecessor
        score = np.maximum.accumulate(np.add.reduceat(means, starts) / (ends - starts))
        share = ends / max(int(existing[name][rows[0]].sum()), 1)
        group, structure, layer = (np.full(len(ends), each, np.int64) for each in (number, names.index(name), rows[0]))
        cost = (ends - starts) * int(costs[name][rows].sum())
        parts.append(Blocks(group, structure, layer, ends, cost, score, share))
    return Blocks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def taken(blocks: Blocks, key: np.ndarray, budgets: Budgets, target: int, alike: bool) -> np.ndarray:
    """Take the rows of the blocks of the lowest key of each budget; `alike`: each budget's, whatever is too much."""
    parts = []
    levels = []
    for rows, share in budgets:
        due = math.ceil(target * share * (1 - SLACK))
        parts.append(rows[greedy(blocks.rows(rows), key[rows], due)])
        levels.append(np.cumsum(blocks.cost[parts[-1]]) / max(due, 1))
    # who is furthest above its budget gives back first, of equals the last: equal layers keep at most two widths
    found = np.concatenate(parts)[np.argsort(np.concatenate(levels), kind="stable")]
    if alike:
        return found
    return found[needed(blocks.rows(found), target)]


def greedy(blocks: Blocks, key: np.ndarray, target: int) -> np.ndarray:
    """Take the blocks of lowest key that together cost at least `target`, and no needless one.

    Equal keys of a group stay in order: its first block is the cheapest.
    """
    if target <= 0:
        return np.zeros(0, np.int64)
    order = np.lexsort((blocks.stop, blocks.layer, blocks.structure, blocks.cost, key))
    found = order[: int(np.searchsorted(np.cumsum(blocks.cost[order]), target)) + 1]
    return found[needed(blocks.rows(found), target)]


def needed(found: Blocks, target: int) -> np.ndarray:
    """Give back, last first, what the surplus covers and no later block needs gone; return which blocks remain."""
    surplus = int(found.cost.sum()) - target
    needed = np.ones(len(found.cost), bool)
    cheapest = found.cost.min(initial=0)
    held: set[int] = set()
    for row in range(len(found.cost) - 1, -1, -1):
        if surplus < max(cheapest, 1):
            break
        group = int(found.group[row])
        cost = int(found.cost[row])
        if group not in held and cost <= surplus:
            surplus -= cost
            needed[row] = False
        else:
            held.add(group)
    return needed


def most_of(blocks: Blocks, budgets: Budgets) -> int:
    """Add up the parameters that budgets can remove."""
    return min(math.floor(int(blocks.cost[rows].sum()) / share * (1 + SLACK)) for rows, share in budgets)
