"""How a budget of parameters is shared, and the choice of units that follows. Sees scores and costs, no model.

Units are removed in *blocks*. Within a layer and structure the units are sorted by their score (as the allocation ranks
it), least important first (equal: the lower index first), and cut into blocks such that after each block the kept width
is a multiple of `multiple_of`; with `depth` all units are one block. Every allocation is the same solver, with its own
key and its own split of the budget:

| allocation       | key of a block, ascending                                           | budgets                   |
|------------------|---------------------------------------------------------------------|---------------------------|
| `uniform`        | share of the units of its (layer, structure) that is gone after it  | each layer the same share |
| `uniform(floor)` | the same, but last where attention loses more than the layer does   | each layer the same share |
| `log`            | as with floor                                                       | r + c log(l+1) of layer l |
| `softmax`        | as with floor                                                       | ∝ e^(-mean score / ε)     |
| `global`         | mean score of its units, over the cost of a unit unless `by=score`  | one                       |

With a share for attention each structure has budgets of its own. The copies of a structure of a traced model lose as
many units each, so that a block is as many units of every copy, and each structure has the budgets that a layer has
elsewhere.
Equal keys: the cheaper block first, then attention before MLP (the structure that comes first), then the lower layer.
The solver takes blocks until its budget is met, then gives back, last taken first, what the surplus covers; when all
budgets are met, what they removed too much together is given back too, a block of the budget that is furthest exceeded
first (not by `uniform(alike=True)`).

How good is that? Scores of at least 0 a parameter, or equal costs: the score removed is at most that of the optimum
plus that of one block, the one that crosses the budget (the blocks before it are a fractional optimum of the knapsack);
with blocks of equal cost it is the optimum.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from saap_jax.steps.allocation.blocks import SLACK, Blocks, Budgets, Groups, blocks_of, most_of, taken
from saap_jax.steps.base import Context, State, Step, need
from saap_jax.steps.limits import Within, protected, stops_of
from saap_jax.subjects.base import Subject
from saap_jax.types import STRUCTURES, Keep, Limits, Scores

TOLERANCE = 0.001
"""How exactly the smallest ratio at which something holds is found."""

By = Literal["score", "score_per_parameter"]


class Selection(NamedTuple):
    """What is kept, and what that removes."""

    keep: Keep
    asked: float
    """Share of the prunable parameters that was to be removed."""
    actual: float
    """Share that is removed: at least `asked`, by less than one block more (of each layer, with `alike`)."""
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


@dataclasses.dataclass(frozen=True)
class Allocation(Step):
    """Keep what a way of sharing the budget leaves: a subclass says `shares`, or `ranks` all units in one list."""

    kind = "allocation"
    ranks: ClassVar[bool] = False
    """Whether there is one ranking of all units, and one budget."""
    by: By = dataclasses.field(default="score", init=False, repr=False)
    """What ranks units: their scores, or the scores over their parameters."""
    floor: bool = dataclasses.field(default=False, init=False, repr=False)
    """Whether a layer loses no more of attention, whose units are few, than its share, rounded down to whole units; the
    rest of what it loses comes from the MLP, as far as that has it."""
    alike: bool = dataclasses.field(default=False, init=False, repr=False)
    """Whether no budget gives back what all have removed too much together, so that equal layers stay equal."""

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Share the removal out over the layers, together 1.

        Args:
            size: prunable parameters of each layer, or of each structure of a traced model; 0 of what is left alone.
            scores: mean score of the units of each.

        Returns:
            Shares in proportion to the parameters, unless a subclass says otherwise.
        """
        return size / size.sum()

    def fitted(self, shares: np.ndarray, size: np.ndarray, most: np.ndarray, target: int | float) -> np.ndarray:
        """Change shares that ask for more of a layer than it can lose; together they make 1 again.

        Args:
            size: as `shares` got it.
            most: parameters that each can lose.
            target: parameters that are to go together; 0: as many as can.
        """
        return shares

    def priority(self, scores: Scores) -> Scores:
        """Rank units otherwise than by their scores, `[layers, units]` a structure, NaN where no unit is."""
        return scores

    def key(self, blocks: Blocks) -> np.ndarray:
        """Compute the key by which blocks are taken, ascending: their scores, or how far widths have shrunk."""
        if self.ranks:
            return blocks.score
        return blocks.share

    def __call__(self, state: State, on: Context) -> State:
        """Keep the units of the highest scores that the budget leaves."""
        within = state.limits.at(on.final)
        selection = choose(state.subject, need(state, self), on.ratio, self, within, state.removed)
        return state._replace(keep=selection.keep, limits=within)


def choose(
    subject: Subject, scores: Scores, ratio: float, allocation: Allocation, within: Within, gone: Keep | None = None
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters goes.

    Where two structures meet in one matrix, what both hold counts once: the solver, which adds up what single units
    cost, is then asked for whatever removes the share that is wanted.

    Args:
        scores: importance, `[layers, units]` a structure.
        ratio: share of all prunable parameters (layers left alone included) to remove, in [0, 1).
        gone: units that an earlier step toward this ratio removed, `[layers, units]` a structure. They are not kept,
            and count toward `ratio`; their scores are not read.

    Raises:
        ValueError: a ratio that cannot be met, a limit of a structure that does not exist, or a score that is missing
            or not finite.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    limits = subject.limits(within)

    def chosen(asked: float) -> Selection:
        return selection_of(subject, _kept(subject, scores, asked, allocation, limits, gone), ratio)

    if isinstance(limits, Within):
        return chosen(ratio)
    top = _largest_ratio(subject, allocation, limits)
    if not meets(subject, (most := chosen(top)).keep, ratio):
        raise impossible(ratio, int(most.actual * 10_000) / 10_000)
    if _parameters(subject) == subject.prunable:  # no matrix is of two structures
        return chosen(min(ratio, top))
    if meets(subject, (least := chosen(0.0)).keep, ratio):
        return least
    low = 0.0
    high = top
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(subject, chosen(middle).keep, ratio) else (middle, high)
    return chosen(high)


def selection_of(subject: Subject, keep: Keep, asked: float) -> Selection:
    """Measure a keep-set: how much it removes, and how much was asked for."""
    removed = subject.removed(keep)
    return Selection(keep, asked, removed / max(subject.prunable, 1), removed)


def meets(subject: Subject, keep: Keep, ratio: float) -> bool:
    """Say whether a keep-set removes a share of the prunable parameters."""
    return subject.removed(keep) >= ratio * subject.prunable * (1 - SLACK)


def most_removable(subject: Subject, allocation: Allocation, within: Within) -> float:
    """Find the largest ratio that `choose` can meet whatever the scores, rounded down to four decimals; below 1."""
    limits = subject.limits(within)
    top = _largest_ratio(subject, allocation, limits)
    if isinstance(limits, Within):
        return top
    removed = subject.removed(_kept(subject, _equal(subject), top, allocation, limits))
    return min(removed * 10_000 // max(subject.prunable, 1) / 10_000, 0.9999)


def checked(what: str, given: Scores, present: Keep) -> Scores:
    """Return one float64 array a structure, NaN where there is no unit.

    Raises:
        ValueError: something is missing, of another shape, or not finite where there is a unit.
    """
    found: Scores = {}
    for name, units in present.items():
        if name not in given:
            raise ValueError(f"allocation: structure {name} has no {what} (given: {', '.join(given) or 'none'})")
        if given[name].shape != units.shape:
            raise ValueError(f"allocation: expected {name} {what} of {units.shape}, got {given[name].shape}")
        found[name] = np.where(units, np.asarray(given[name], np.float64), np.nan)
        if len(bad := np.argwhere(units & ~np.isfinite(found[name]))):
            raise ValueError(f"allocation: {what} of {name} unit {bad[0][1]} in layer {bad[0][0]} are not finite")
    return found


# --- one choice ------------------------------------------------------------------------------------

AnyLimits = Within | dict[str, Limits]
"""Of layers; or of structures whose copies lose as many units each."""


def _kept(
    subject: Subject, scores: Scores, ratio: float, allocation: Allocation, limits: AnyLimits, gone: Keep | None = None
) -> Keep:
    """Return the units to keep, where parameters of all units add up; the arguments are those of `choose`."""
    existing = subject.existing
    costs = subject.costs
    asked = limits
    if isinstance(asked, Within):
        asked = asked.where_can_go(existing)
        limits = asked.at(ratio)
        if limits.depth and not allocation.ranks:
            raise ValueError(f"within.depth: expected a ranking of all units behind it, global, got {allocation.name}")
        if limits.whole_layers and any(limits.layer(n).min_keep or limits.layer(n).max_ratio < 1 for n in STRUCTURES):
            raise ValueError("within.whole_layers: expected min_keep 0 and max_ratio 1 of attention and mlp")
    if gone is None:
        present = existing
    else:
        present = {name: units & ~gone[name] for name, units in existing.items()}
    priority = allocation.priority(scores := checked("scores", scores, present))
    if allocation.by == "score_per_parameter":
        priority = {name: values / costs[name][:, None] for name, values in priority.items()}
    if gone is not None:  # what is gone goes first
        lowest = min(0.0, *(np.nanmin(np.asarray(values), initial=0.0) for values in priority.values()))
        first = np.nextafter(lowest, -np.inf)
        priority = {name: np.where(existing[name] & gone[name], first, each) for name, each in priority.items()}
    order = {name: np.argsort(values, axis=1, kind="stable") for name, values in priority.items()}
    ranked: Scores = {name: np.take_along_axis(np.asarray(each), order[name], 1) for name, each in priority.items()}
    total = _parameters(subject)
    target = math.ceil(ratio * total * (1 - SLACK))
    groups, blocks, budgets = _divided(subject, ranked, allocation, limits, scores, target)
    if target > most_of(blocks, budgets):
        raise impossible(ratio, _largest_ratio(subject, allocation, asked))
    removed = blocks.rows(taken(blocks, allocation.key(blocks), budgets, target, allocation.alike))
    keep = {name: units.copy() for name, units in existing.items()}
    for number in np.unique(removed.group):
        stop = removed.stop[removed.group == number].max()
        (name, rows) = groups[number]
        for row in rows:
            keep[name][row, order[name][row, :stop]] = False
    if isinstance(limits, Within) and limits.whole_layers:
        lost = np.asarray(existing[STRUCTURES[-1]].any(axis=1) & ~keep[STRUCTURES[-1]].any(axis=1))
        keep = {name: units & ~lost[:, None] for name, units in keep.items()}
    # a surplus may have given some of it back
    if gone is None:
        return keep
    return {name: kept & ~gone[name] for name, kept in keep.items()}


def impossible(ratio: float, top: float) -> ValueError:
    """Say that a ratio cannot be met, and which can."""
    return ValueError(
        f"ratio: {ratio:.4g} of the prunable parameters cannot be removed; the largest possible ratio is {top:.4f} "
        "under min_keep, max_ratio, protect, multiple_of and attention of `within`: relax one of them"
    )


def _parameters(subject: Subject) -> int:
    """Add up the parameters of all units, layers left alone included."""
    return sum(int((units.sum(axis=1) * subject.costs[name]).sum()) for name, units in subject.existing.items())


def _equal(subject: Subject) -> Scores:
    return {name: np.where(units, 1.0, np.nan) for name, units in subject.existing.items()}


def _largest_ratio(subject: Subject, allocation: Allocation, limits: AnyLimits) -> float:
    """Find the largest ratio that `_kept` can meet whatever the scores, rounded down to four decimals; below 1."""
    if isinstance(limits, Within):
        limits = limits.where_can_go(subject.existing)
        if limits.at(1.0) is not limits:  # the more goes, the more of it comes from attention
            low = 0
            high = 10_000
            while high - low > 1:
                ratio = (middle := (low + high) // 2) / 10_000
                holds = _largest_ratio(subject, allocation, limits.at(ratio)) >= ratio
                low, high = (middle, high) if holds else (low, middle)
            return low / 10_000
    equal = _equal(subject)
    ranked: Scores = {name: np.sort(each, axis=1) for name, each in equal.items()}
    _, blocks, budgets = _divided(subject, ranked, allocation, limits, equal, 0)
    return min(most_of(blocks, budgets) * 10_000 // max(_parameters(subject), 1) / 10_000, 0.9999)


# --- blocks and budgets ----------------------------------------------------------------------------


def _divided(
    subject: Subject,
    ranked: Scores,
    allocation: Allocation,
    limits: AnyLimits,
    scores: Scores,
    target: int,
) -> tuple[Groups, Blocks, Budgets]:
    """Divide the model into groups that go alike, removable blocks, and their budgets.

    Args:
        ranked: what units are ranked by, ascending in each layer.
        scores: as they were given, of which shares by scores read means.
        target: parameters that are to go; 0: as many as can.
    """
    existing, names = subject.existing, [*subject.existing]
    units = {name: each.sum(axis=1) for name, each in existing.items()}
    given = {name: np.asarray(scores[name], np.float64) for name in names}
    if not isinstance(limits, Within):
        groups = [(name, np.arange(len(each))) for name, each in units.items()]
        stops = [stops_of(int(units[name][0]), limits[name], False) for name in names]
        blocks = blocks_of(ranked, subject.costs, existing, groups, stops)
        size = np.diag([int((units[name] * subject.costs[name]).sum()) * bool(len(each))
                        for name, each in zip(names, stops, strict=True)])  # fmt: skip
        means = [_mean(given[name][existing[name]]) for name in names]
        return groups, blocks, _budgets(blocks, blocks.structure, size, np.array(means), allocation, target)
    pruned = ~protected(limits.protect, len(units[names[0]]))
    size = np.stack([units[name] * subject.costs[name] * pruned for name in names])
    means = np.array([_mean(np.concatenate([given[name][layer][existing[name][layer]] for name in names]))
                      for layer in range(len(pruned))])  # fmt: skip
    groups = [(name, np.array([layer])) for name in names for layer in range(len(pruned))]
    stops = [stops_of(int(units[name][rows[0]] * pruned[rows[0]]), limits.layer(name), limits.depth)
             for name, rows in groups]  # fmt: skip
    blocks = blocks_of(ranked, subject.costs, existing, groups, stops)
    blocks = _rounded_down(blocks, size, target, allocation, means)
    if limits.whole_layers:
        blocks = _joined_layers(blocks)
    return groups, blocks, _budgets(blocks, blocks.layer, size, means, allocation, target, limits.attention)


def _mean(values: np.ndarray) -> float:
    """Return the mean of scores; NaN where there is none."""
    values = values[~np.isnan(values)]
    if len(values):
        return float(values.mean())
    return math.nan


def _budgets(
    blocks: Blocks,
    owner: np.ndarray,
    size: np.ndarray,
    means: np.ndarray,
    allocation: Allocation,
    target: int,
    attention: float | None = None,
) -> Budgets:
    """Split the blocks into budgets.

    Args:
        owner: the layer of each block, or the structure of a traced model, that has a budget.
        size: prunable parameters, `[structures, owners]`, 0 where nothing goes.
        means: mean score of the units of each owner.
        target: parameters that are to go; 0: as many as can.
        attention: share of what goes that is attention's; None: the allocation decides.
    """
    numbers = np.arange(len(size))
    if attention is None:
        parts = [(numbers, 1.0)]
    else:
        parts = [(numbers[:1], attention), (numbers[1:], 1 - attention)]
    budgets = []
    for structures, share in parts:
        inside = np.isin(blocks.structure, structures)
        most = np.bincount(owner[inside], blocks.cost[inside], size.shape[1])
        own = np.where((attention is None) | (most > 0), size[structures].sum(axis=0), 0)
        if allocation.ranks or not own.any():
            budgets.append((np.flatnonzero(inside), share))
            continue
        shares = shares_of(allocation, own, means, most, target * share)
        budgets += [(np.flatnonzero(inside & (owner == at)), share * float(shares[at])) for at in np.flatnonzero(own)]
    return [(rows, share) for rows, share in budgets if share > 0]


def shares_of(
    allocation: Allocation, size: np.ndarray, scores: np.ndarray, most: np.ndarray, target: int | float
) -> np.ndarray:
    """Share the removal out over the layers (or structures) of some parameters.

    Args:
        scores: mean score of the units of each.
        most: parameters that each can lose.
        target: parameters that are to go together; 0: as many as can.

    Raises:
        ValueError: an allocation whose shares of what can be pruned are not together 1.
    """
    lowest = np.nanmin(scores, initial=0.0 if np.isnan(scores).all() else np.inf)
    shares = np.asarray(allocation.shares(size, np.where(np.isnan(scores), lowest, scores)), np.float64)
    if shares.shape != size.shape or not (shares >= 0).all() or not math.isclose(shares[size > 0].sum(), 1):
        raise ValueError(
            f"{allocation.name}: expected shares of at least 0 that make 1 for {np.count_nonzero(size)} budgets, got "
            f"{shares.tolist()}; give none to what is left alone, whose size is 0"
        )
    return allocation.fitted(shares, size, most, target)


def _rounded_down(blocks: Blocks, size: np.ndarray, target: int, allocation: Allocation, means: np.ndarray) -> Blocks:
    """Put those blocks of attention last that exceed the share of their layer, where it is rounded down."""
    layers = size.sum(axis=0)
    if not (allocation.floor and layers.any()):
        return blocks
    removable = np.bincount(blocks.layer, blocks.cost, len(layers))
    lost = target * shares_of(allocation, layers, means, removable, target) / np.maximum(layers, 1) * (1 + SLACK)
    beyond = (blocks.structure == STRUCTURES.index("attention")) & (blocks.share > lost[blocks.layer])
    return blocks._replace(share=blocks.share + beyond)


def _joined_layers(blocks: Blocks) -> Blocks:
    """Return blocks of whole layers, in the place of those of the last structure; alone where a layer has one."""
    last = blocks.structure == len(STRUCTURES) - 1
    other = {int(blocks.layer[row]): row for row in np.flatnonzero(~last)}
    cost = blocks.cost.copy()
    score = blocks.score.copy()
    for row in np.flatnonzero(last):
        if (first := other.pop(int(blocks.layer[row]), None)) is not None:
            cost[row] += blocks.cost[first]
            score[row] = (score[row] + blocks.score[first]) / 2
    last[[*other.values()]] = True
    return blocks._replace(cost=cost, score=score).rows(last)
