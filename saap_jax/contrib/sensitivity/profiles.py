"""What each layer's attention and MLP cost when they alone are pruned, and what that predicts of a whole keep-set.

A *place* is a structure of a layer. Its cost is the change of loss when some of its units go and nothing else does.
The cost of a keep-set that prunes many places is predicted as the sum of theirs, as if places did not interact. Losses
grow faster than that, so a prediction is good for one thing: which of several keep-sets is worth evaluating.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.differences import Difference, Losses, losses_of, paired_difference
from saap_jax.evaluation.scales import scale_of
from saap_jax.records import Row, RunRecord
from saap_jax.types import STRUCTURES

Place = tuple[str, int]
"""Structure and layer."""

Shares = dict[Place, float]
"""Share of the units that goes at each place."""


class Change(NamedTuple):
    """What the removal of some units at one place changes."""

    layer: int
    structure: str
    asked: float
    """Share of the place's units that was to go."""
    actual: float
    """Share that went, whole units."""
    removed: int
    """Parameters."""
    nats: float
    """Change of the mean loss, nats a token."""
    percent: float
    """Change of the figure, percent: of a perplexity 100 · (e^nats - 1)."""
    low: float
    """Ends of its 95 % interval by itself, see `evidence`; NaN of fewer than `FEWEST` windows."""
    high: float
    average: float
    """Nats a removed parameter, over all places that this one is compared with, at the same `asked`: all layers of its
    structure, or all structures of a traced model. NaN where these are not above 0."""
    relative: float
    """`nats` a removed parameter, over `average`."""


class Cost(NamedTuple):
    """What was measured at one place."""

    units: int
    fractions: Float[np.ndarray, "points"]
    """Shares of its units that went, ascending from 0."""
    nats: Float[np.ndarray, "points"]
    """Change of the mean loss at each share, nats a token."""

    def at(self, fraction: float) -> float:
        """Read the change at a share, by lines between what was measured, the last of which goes on.

        >>> Cost(2, np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, np.inf])).at(0.5)
        1.0
        """
        after = int(np.clip(np.searchsorted(self.fractions, fraction), 1, len(self.fractions) - 1))
        low, high = self.fractions[after - 1 : after + 1]
        share = (fraction - low) / (high - low)
        if share in (0, 1):  # beside a loss that is infinite too
            return float(self.nats[after - 1 + int(share)])
        return float((1 - share) * self.nats[after - 1] + share * self.nats[after])


def at_one_place(candidates: Sequence[Row]) -> list[Row]:
    """Take the candidates in which one place alone is pruned."""
    return [row for row in candidates if "layer" in row]


def judged_metric(run: RunRecord) -> str:
    """Name the metric that says what a removal costs."""
    return run["metrics"][:2][-1]["name"]


def changes_of(run: RunRecord, candidates: Sequence[Row]) -> list[Change]:
    """Measure what each removal at one place changed, by structure, layer and share."""
    metric = judged_metric(run)
    whole = np.array(run["dense"]["losses"][metric], np.float64)
    dense = float(np.mean(whole))
    order = structures_in(candidates)
    rows = sorted(at_one_place(candidates), key=lambda r: (order.index(r["structure"]), r["layer"], r["asked"]))
    losses = [losses_of(row, metric) for row in rows]
    nats = [_change(each, whole) for each in losses]
    differences: list[Difference] = []
    scale = scale_of(metric)
    articles = run.get("articles", {}).get(metric, ())
    for values, seen in losses:
        differences.append(paired_difference(values[None, seen], whole[None, seen], scale=scale, articles=articles))
    totals: dict[tuple[str, float], list[float]] = {}
    for row, change in zip(rows, nats, strict=True):
        total = totals.setdefault((row.get("among", row["structure"]), row["asked"]), [0.0, 0.0])
        total[0] += change
        total[1] += row["removed"]
    changes = []
    for number, (row, change) in enumerate(zip(rows, nats, strict=True)):
        difference = differences[number]
        total, removed = totals[row.get("among", row["structure"]), row["asked"]]
        average = total / removed if total > 0 else math.nan
        if row["removed"]:
            relative = change / row["removed"] / average
        else:
            relative = math.nan
        place = (row["layer"], row["structure"], row["asked"], row["actual"], row["removed"])
        value, low, high = (scale.percent(end, dense) for end in (change, difference.low, difference.high))
        changes.append(Change(*place, change, value, low, high, average, relative))
    return changes


def nearest_share(changes: Sequence[Change], ratio: float) -> list[Change]:
    """Take the changes at the asked share that is nearest to a ratio."""
    nearest = min({change.asked for change in changes}, key=lambda share: (abs(share - ratio), share))
    return [change for change in changes if change.asked == nearest]


def as_costly(run: RunRecord, candidates: Sequence[Row], first: Change, others: Sequence[Change]) -> list[Difference]:
    """Measure how far other places cost more a parameter than the first, each corrected for their number.

    What is compared is `relative`, or `nats` where that is not known.
    """
    metric = judged_metric(run)
    together = [first, *others]
    by_place = {(row["structure"], row["layer"], row["asked"]): row for row in at_one_place(candidates)}
    dense = np.array(run["dense"]["losses"][metric], np.float64)
    costs = []
    several = not any(math.isnan(change.relative) for change in together)
    for change in together:
        losses, seen = losses_of(by_place[change.structure, change.layer, change.asked], metric)
        scale = change.removed * change.average if several else 1.0
        costs.append(((losses - dense) / scale, seen))
    (base, own), *rest = costs
    pairs = ((each[None, own & seen], base[None, own & seen]) for each, seen in rest)
    articles = run.get("articles", {}).get(metric, ())
    return [paired_difference(*pair, others=len(rest), articles=articles) for pair in pairs]


def _change(losses: Losses, dense: Float[np.ndarray, "windows"]) -> float:
    """Tell how far a mean loss is above the unpruned model's on the same windows."""
    return float(np.mean(losses.values[losses.seen])) - float(np.mean(dense[losses.seen]))


def a_parameter(changes: Sequence[Change], structure: str) -> float:
    """Tell what a removed parameter of a structure costs, nats a token, over all its places; NaN without any."""
    own = [change for change in changes if change.structure == structure]
    removed = sum(change.removed for change in own)
    if removed:
        return sum(change.nats for change in own) / removed
    return math.nan


def costs_of(run: RunRecord, candidates: Sequence[Row]) -> dict[Place, Cost]:
    """Collect the measured curve of each place."""
    metric = judged_metric(run)
    dense = np.array(run["dense"]["losses"][metric], np.float64)
    units: dict[Place, int] = {}
    points: dict[Place, dict[float, float]] = {}
    for row in at_one_place(candidates):
        place = (row["structure"], row["layer"])
        units.setdefault(place, row["units"])
        points.setdefault(place, {0.0: 0.0})[row["actual"]] = _change(losses_of(row, metric), dense)
    return {
        place: Cost(units[place], *map(np.array, zip(*sorted(points[place].items()), strict=True)))
        for place in sorted(points)
    }


def structures_in(candidates: Sequence[Row]) -> list[str]:
    """List the structures that units were removed from, attention before MLP, others as they come."""
    found = dict.fromkeys(row["structure"] for row in at_one_place(candidates))
    return sorted(found, key=lambda name: STRUCTURES.index(name) if name in STRUCTURES else len(STRUCTURES))


def plan_of(costs: Mapping[Place, Cost], kept: Mapping[str, Sequence[int | float]]) -> Shares:
    """Tell the share that goes at each place, from the units kept of each layer, `{structure: [layers]}`."""
    return {place: 1 - int(kept[place[0]][place[1]]) / cost.units for place, cost in costs.items()}


def predicted(costs: Mapping[Place, Cost], plan: Shares) -> float:
    """Predict the change of the mean loss under a plan, nats a token: the sum over its places."""
    return sum(costs[place].at(fraction) for place, fraction in plan.items())
