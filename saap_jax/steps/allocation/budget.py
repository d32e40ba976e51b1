"""Stage 2c, the solver: which blocks of units go, under a budget of parameters. See `search` for what a block is."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from saap_jax.steps.limits import Within
from saap_jax.types import STRUCTURES, Scores

SLACK = 1e-12
"""Relative rounding of a share, so that the ratio k / n of n parameters asks for k."""

EXACT_LIMIT = 20_000_000
"""Steps (blocks times budget, in units of the costs' common divisor) that the exact solver does at most."""


By = Literal["score", "score_per_parameter"]
Solver = Literal["greedy", "exact"]


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How a budget is shared between layers and structures: by `shares` of each, or in one ranking of all units."""

    name: ClassVar[str]
    ranks: ClassVar[bool] = False
    """Whether there is one ranking of all units, and one budget."""
    fills: ClassVar[bool] = False
    """Whether what a layer cannot lose any more is shared by the others, in proportion to their shares."""
    by: By = dataclasses.field(default="score", init=False, repr=False)
    """What ranks units: their scores, or the scores over their parameters."""
    solver: Solver = dataclasses.field(default="greedy", init=False, repr=False)

    @property
    def rounded_down(self) -> tuple[str, ...]:
        """Structures of few units, of which a layer loses no more than its share, rounded down to whole units; the
        rest of what it loses comes from the others, as far as they have it."""
        return ()

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return the share of what is removed that each layer loses, together 1.

        Args:
            size: prunable parameters of each layer, or of each structure of a traced model; 0 of what is left alone.
            scores: mean score of the units of each.
        """
        raise NotImplementedError

    def priority(self, scores: Scores) -> Scores:
        """Return what ranks units instead of their scores, `[layers, units]` a structure, NaN where no unit is."""
        return scores

    def check_limits(self, within: Within) -> None:
        """Raise ValueError for limits that this way of sharing cannot go with."""
        if within.depth and not self.ranks:
            raise ValueError(f"within.depth: expected a ranking of all units behind it, global, got {self.name}")
        if self.solver == "exact" and (within.max_segments or within.max_shapes):
            raise ValueError("within.max_segments and max_shapes: expected solver greedy behind them, got exact")
        if within.whole_layers and any(within.layer(n).min_keep or within.layer(n).max_ratio < 1 for n in STRUCTURES):
            raise ValueError("within.whole_layers: expected min_keep 0 and max_ratio 1 of attention and mlp")


class Blocks(NamedTuple):
    """All removable blocks, one row each, in ascending order within their (structure, layer)."""

    structure: np.ndarray
    layer: np.ndarray
    stop: np.ndarray
    """Units of the (structure, layer) that are gone after this block."""
    cost: np.ndarray
    """Parameters in the block."""
    score: np.ndarray
    """Mean priority of the block's units, non-decreasing within its (structure, layer)."""
    share: np.ndarray
    """Share of the units of the (structure, layer) that are gone after this block."""

    def key(self, allocation: Sharing) -> np.ndarray:
        """Return what the allocation takes blocks by, ascending: their scores, or how far widths have shrunk."""
        return self.score if allocation.ranks else self.share

    def rows(self, chosen: np.ndarray) -> "Blocks":
        """Return the chosen blocks, by mask or index."""
        return Blocks(*(column[chosen] for column in self))


def split_budget(
    blocks: Blocks,
    size: dict[str, np.ndarray],
    attention: float | None,
    allocation: Sharing,
    target: int,
    scores: np.ndarray,
) -> list[tuple[np.ndarray, float]]:
    """Split the blocks of layers into groups with a budget each: their rows, and their part of the whole budget.

    Args:
        size: prunable parameters of each layer, 0 where it is left alone, `[layers]` a structure.
        attention: share of what goes that is attention's; None: the allocation decides.
        target: parameters that are to go; 0: as many as can.
        scores: mean score of the units of each layer.
    """
    shares = [(STRUCTURES, 1.0)] if attention is None else [(("attention",), attention), (("mlp",), 1 - attention)]
    quotas = []
    for names, share in shares:
        inside = np.isin(blocks.structure, [STRUCTURES.index(name) for name in names])
        layer_size = np.sum([size[name] for name in names], axis=0)
        if not allocation.ranks and layer_size.any():
            most = np.bincount(blocks.layer[inside], blocks.cost[inside], len(layer_size))
            parts = shares_of(allocation, layer_size, scores, most, target * share)
            for layer in np.flatnonzero(layer_size):
                own = np.flatnonzero(inside & (blocks.layer == layer))
                quotas.append((own, share * float(parts[layer])))
        else:
            quotas.append((np.flatnonzero(inside), share))
    return [(rows, share) for rows, share in quotas if share > 0]


def split_structures(
    blocks: Blocks, size: dict[str, np.ndarray], allocation: Sharing, target: int, scores: np.ndarray
) -> list[tuple[np.ndarray, float]]:
    """Do what `split_budget` does for structures that share no layers, which have the budgets that layers have there.
    One that loses no unit in any case has no budget.

    Args:
        size: prunable parameters of each copy, `[copies]` a structure, in the order that the blocks number them.
        scores: mean score of the units of each structure.
    """
    if allocation.ranks or not len(blocks.cost):
        return [(np.arange(len(blocks.cost)), 1.0)]
    rows = [np.flatnonzero(blocks.structure == index) for index in range(len(size))]
    own = [float(parameters.sum()) * bool(len(each)) for each, parameters in zip(rows, size.values(), strict=True)]
    most = np.bincount(blocks.structure, blocks.cost, len(size))
    parts = shares_of(allocation, np.array(own), scores, most, target)
    return [(each, float(part)) for each, part in zip(rows, parts, strict=True) if part > 0]


def shares_of(
    allocation: Sharing, size: np.ndarray, scores: np.ndarray, most: np.ndarray, target: int | float
) -> np.ndarray:
    """Return the share of what is removed that each layer (or structure) of some parameters loses.

    Args:
        scores: mean score of the units of each.
        most: parameters that each can lose.
        target: parameters that are to go together; 0: as many as can.

    Raises:
        ValueError: an allocation whose shares of what can be pruned are not together 1.
    """
    lowest = np.nanmin(scores, initial=0.0 if np.isnan(scores).all() else np.inf)
    known = np.where(np.isnan(scores), lowest, scores)
    shares = np.asarray(allocation.shares(size, known), np.float64)
    if shares.shape != size.shape or not (shares >= 0).all() or not math.isclose(shares[size > 0].sum(), 1):
        raise ValueError(
            f"{allocation.name}: expected shares of at least 0 that make 1 for {np.count_nonzero(size)} budgets, got "
            f"{shares.tolist()}; give none to what is left alone, whose size is 0"
        )
    if not allocation.fills:
        return shares
    if not 0 < target < most.sum():
        return most / most.sum() if most.any() else shares
    return filled(shares, most / target)


def filled(shares: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return min(most, c · shares) with the c at which they make 1.

    >>> filled(np.array([0.6, 0.3, 0.1]), np.array([0.4, 1.0, 1.0])).round(3).tolist()
    [0.4, 0.45, 0.15]

    Shares that are too small to be told from 0 are those of what each can lose.

    >>> filled(np.array([1.0, 0.0, 0.0]), np.array([0.4, 1.0, 1.0])).round(3).tolist()
    [0.4, 0.3, 0.3]
    """
    full = np.zeros(len(shares), bool)
    while True:
        left, rest = 1 - most[full].sum(), np.where(full, 0.0, shares)
        if not rest.any():
            rest = np.where(full, 0.0, most)
        scaled = np.where(full, most, rest * left / max(rest.sum(), np.finfo(float).tiny))
        if not (over := ~full & (scaled > most)).any():
            return scaled
        full |= over


def take_blocks(
    blocks: Blocks, quotas: list[tuple[np.ndarray, float]], target: int, prunable: int, allocation: Sharing
) -> np.ndarray:
    """Return the rows of the blocks that are removed."""
    most = most_removable(blocks, quotas)
    if target > most:
        raise ValueError(
            f"ratio: {target / prunable:.4g} of the prunable parameters cannot be removed; the largest possible ratio "
            f"is {most * 10_000 // prunable / 10_000:.4f} under min_keep, max_ratio, protect, multiple_of and "
            "attention of `within`: relax one of them"
        )
    key = blocks.key(allocation)
    solve = exact if allocation.solver == "exact" else greedy
    parts, levels = [], []
    for rows, share in quotas:
        due = math.ceil(target * share * (1 - SLACK))
        parts.append(rows[solve(blocks.rows(rows), key[rows], due)])
        levels.append(np.cumsum(blocks.cost[parts[-1]]) / max(due, 1))
    # who is furthest above its budget gives back first, of equals the last: equal layers keep at most two widths
    taken = np.concatenate(parts)[np.argsort(np.concatenate(levels), kind="stable")]
    return taken[needed(blocks.rows(taken), target)]


def most_removable(blocks: Blocks, quotas: list[tuple[np.ndarray, float]]) -> int:
    """Return the parameters that all budgets can remove together."""
    return min(math.floor(int(blocks.cost[rows].sum()) / share * (1 + SLACK)) for rows, share in quotas)


def highest_ratio(holds: Callable[[float], bool]) -> float:
    """Return the largest ratio of four decimals that holds, where all below it do; below 1."""
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle / 10_000) else (low, middle)
    return low / 10_000


def ranking(blocks: Blocks, key: np.ndarray) -> np.ndarray:
    """Return the blocks' order of removal. Equal keys of a (structure, layer) stay in order: its first is cheapest."""
    return np.lexsort((blocks.stop, blocks.layer, blocks.structure, blocks.cost, key))


def greedy(blocks: Blocks, key: np.ndarray, target: int) -> np.ndarray:
    """Return the blocks of lowest key that together cost at least `target`, without those that it can do without."""
    if target <= 0:
        return np.zeros(0, np.int64)
    order = ranking(blocks, key)
    taken = order[: int(np.searchsorted(np.cumsum(blocks.cost[order]), target)) + 1]
    return taken[needed(blocks.rows(taken), target)]


def needed(taken: Blocks, target: int) -> np.ndarray:
    """Give back, last first, what the surplus covers and no later block needs gone; return which blocks remain."""
    surplus = int(taken.cost.sum()) - target
    needed = np.ones(len(taken.cost), bool)
    cheapest = taken.cost.min(initial=0)
    held: set[tuple[int, int]] = set()
    for row in range(len(taken.cost) - 1, -1, -1):
        if surplus < max(cheapest, 1):
            break
        group, cost = (int(taken.structure[row]), int(taken.layer[row])), int(taken.cost[row])
        if group not in held and cost <= surplus:
            surplus -= cost
            needed[row] = False
        else:
            held.add(group)
    return needed


def exact(blocks: Blocks, key: np.ndarray, target: int) -> np.ndarray:
    """Return the blocks that cost at least `target` at the lowest sum of cost · key.

    That sum is the score removed where the key is a score per parameter. Keys below 0 are shifted up to 0, for else
    removing more than asked would pay. Dynamic programme over the (structure, layer) groups g with j blocks gone:

        value_g(n) = min_j  Σ_{i <= j} cost_i · key_i + value_{g-1}(n - Σ_{i <= j} cost_i),   n = parameters to remove

    Raises:
        ValueError: more than EXACT_LIMIT steps.
    """
    if target <= 0:
        return np.zeros(0, np.int64)
    step = int(np.gcd.reduce(blocks.cost))
    need = np.arange(-(-target // step) + 1)
    steps = len(need) * len(blocks.cost)
    if steps > EXACT_LIMIT:
        raise ValueError(
            f"search: solver 'exact' expects at most {EXACT_LIMIT:,} steps, got {steps:,} ({len(blocks.cost):,} blocks "
            f"times {len(need):,} sizes of budget); use 'greedy' or a coarser multiple_of"
        )
    worth = blocks.cost * (key - min(0.0, key.min()))
    value = np.where(need > 0, np.inf, 0.0)
    groups, choices = [], []
    for structure, layer in sorted(set(zip(blocks.structure.tolist(), blocks.layer.tolist(), strict=True))):
        rows = np.flatnonzero((blocks.structure == structure) & (blocks.layer == layer))
        best, choice = value, np.zeros(len(need), np.int32)
        for gone in range(1, len(rows) + 1):
            cost, loss = int(blocks.cost[rows[:gone]].sum()) // step, worth[rows[:gone]].sum()
            candidate = loss + value[np.maximum(need - cost, 0)]
            better = candidate < best
            best, choice = np.where(better, candidate, best), np.where(better, np.int32(gone), choice)
        value = best
        groups.append(rows)
        choices.append(choice)
    taken, left = [], int(need[-1])
    for rows, choice in zip(reversed(groups), reversed(choices), strict=True):
        taken.append(rows[: choice[left]])
        left = max(left - int(blocks.cost[rows[: choice[left]]].sum()) // step, 0)
    return np.concatenate(taken)
