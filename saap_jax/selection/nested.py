"""Stage 2c, structures inside others: query heads of KV heads, channels of experts and of the residual stream.

Sees no model.

Such a structure has a share of the budget of its own and goes before attention and MLP, whose units are smaller
afterwards. So nothing is counted twice, and what is left of the budget is met exactly by the ordinary search:

    channels (a share)  ->  query heads, channels of experts (a share each)  ->  attention and MLP, at what these cost

*A slice of everything* (channels): the units of the lowest scores go, so many that what stays is the multiple of
`multiple_of` that is nearest to the share.

*Tied inside units* (query heads): a layer has one number of query heads for all its KV heads, so they go in *blocks*:
one of each KV head of a layer, the lowest score that is left in each. A block costs as much as its query heads, and its
key is the mean priority of these (score, or score · e^(λ · ASI) with `adaptive`). All blocks of all layers are one
ranking, for `uniform` too: a block is a large part of a layer, and the same share of every layer could not be met.
Channels of experts go alike: one of each expert of a layer, or `multiple_of` of each.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from saap_jax.config.search import SearchConfig
from saap_jax.selection.budget import SLACK
from saap_jax.selection.search import priorities, search, skipped_layers
from saap_jax.types import Keep, Nested, Scores

Costs = Callable[[Keep], dict[str, np.ndarray]]
"""Returns the parameters that a unit of each group takes along in a model that keeps only some units."""


def search_nested(
    scores: Scores,
    costs: Costs,
    existing: Keep,
    nested: Mapping[str, Nested],
    ratio: float,
    config: SearchConfig,
    stability: Scores | None = None,
    gone: Keep | None = None,
) -> Keep:
    """Choose the units to keep so that at least `ratio` of the prunable parameters goes, by less than a unit more.

    Args:
        scores: importance, `[groups, units]` a structure.
        costs: parameters of a unit, `[groups]` a structure, of any part of the model.
        existing: which units there are.
        nested: the structures that lie in others, in the order in which they go.
        config: allocation, floors and alignment of the others; `skip_layers` and `normalize` of all.
        stability: the indicator ASI; read by `adaptive`.
        gone: units that an earlier step toward this ratio removed; they are not kept, and count toward `ratio`.

    Raises:
        ValueError: a share that cannot be met, a score that is missing or not finite, or scores that do not tell the
            units inside of one apart.
    """
    keep, plain = dict(existing), {name: units for name, units in existing.items() if name not in nested}
    prunable = _sum(costs(keep), plain)
    target = math.ceil(ratio * prunable * (1 - SLACK))
    for name, how in nested.items():
        if not how.share:
            continue
        if name not in scores:
            raise ValueError(f"search: structure {name} has no scores (given: {', '.join(scores) or 'none'})")
        before = None if gone is None else gone[name]
        values = np.asarray(scores[name], np.float64)
        if how.inside is None:
            keep[name] = kept_slices(values[0], ratio, how, None if before is None else before[0])[None]
            continue
        holders = existing[how.inside]
        tied = Tied(
            existing[name], holders, holders if gone is None else holders & ~gone[how.inside], costs(keep)[name]
        )
        asi = None if stability is None else np.asarray(stability[name])
        keep[name] = kept_tied(values, tied, math.ceil(how.share * target * (1 - SLACK)), how, config, asi, before)
    left = costs(keep)
    remaining = _sum(left, plain)
    rest = max(target - (prunable - remaining), 0) / max(remaining, 1)
    indicator = None if stability is None else {name: stability[name] for name in plain}
    before = None if gone is None else {name: gone[name] for name in plain}
    own: Scores = {name: scores[name] for name in plain if name in scores}
    keep |= search(
        own, {name: left[name] for name in plain}, plain, rest, config.at_ratio(ratio), indicator, before
    ).keep
    if gone is not None:
        keep |= {name: keep[name] & ~gone[name] for name in nested}
    return consistent(keep, existing, nested)


def consistent(keep: Keep, existing: Keep, nested: Mapping[str, Nested]) -> Keep:
    """Return a keep-set without the units that lie inside of others that are gone."""
    within = {name: how.inside for name, how in nested.items() if how.inside is not None}
    return keep | {
        name: keep[name] & held(keep[inside], existing[name], existing[inside]) for name, inside in within.items()
    }


def _sum(costs: Mapping[str, np.ndarray], units: Keep) -> int:
    return sum(int((each.sum(axis=1) * costs[name]).sum()) for name, each in units.items())


# --- a slice of everything -----------------------------------------------------------------------


def slices_left(units: int, ratio: float, how: Nested) -> int:
    """Return how many units stay: a multiple of `multiple_of`, the nearest to what the share asks for.

    Raises:
        ValueError: none would stay.
    """
    asked, multiple = units * (1 - how.share * ratio), how.limits.multiple_of
    kept = min(round(asked / multiple) * multiple, units)
    if kept < 1:
        raise ValueError(
            f"{how.option}.share: {how.share:g} of ratio {ratio:g} asks to keep {asked:.0f} of {units} channels of the "
            f"residual stream, {kept} as a multiple of {multiple}; expected one or more: change the share or "
            f"{how.option}.multiple_of"
        )
    return kept if how.share * ratio else units


def kept_slices(
    scores: Float[np.ndarray, "units"], ratio: float, how: Nested, gone: Bool[np.ndarray, "units"] | None = None
) -> Bool[np.ndarray, "units"]:
    """Return which units stay: those of the highest scores; of equal ones the lower index goes first.

    Raises:
        ValueError: none would stay, or a score that is not finite.
    """
    count = slices_left(len(scores), ratio, how)
    ranked = scores if gone is None else np.where(gone, -np.inf, scores)
    if not np.isfinite(scores if gone is None else scores[~gone]).all():
        raise ValueError("search: scores of channels of the residual stream are not finite")
    keep = np.ones(len(scores), bool)
    keep[np.argsort(ranked, kind="stable")[: len(scores) - count]] = False
    return keep


# --- tied inside units ---------------------------------------------------------------------------


class Tied(NamedTuple):
    """Units that lie inside of others, as many in each of a layer, one holder's after the other's."""

    existing: Bool[np.ndarray, "layers units"]
    """Which units there are."""
    holders: Bool[np.ndarray, "layers holders"]
    """The units that hold them."""
    alive: Bool[np.ndarray, "layers holders"]
    """Those of the holders that are not gone."""
    costs: Int[np.ndarray, "layers"]
    """Parameters of one unit of each layer."""

    @property
    def per(self) -> Int[np.ndarray, "layers"]:
        """Units that each holder of a layer holds; 0 where it has none."""
        return self.existing.sum(axis=1) // np.maximum(self.holders.sum(axis=1), 1)

    def by_holder(self, values: Shaped[np.ndarray, "layers units"], layer: int) -> Shaped[np.ndarray, "holders per"]:
        """Return the values of a layer, those of each holder in a row."""
        count, per = int(self.holders[layer].sum()), int(self.per[layer])
        return values[layer, : count * per].reshape(count, per)


def kept_tied(
    scores: Float[np.ndarray, "layers units"],
    tied: Tied,
    target: int,
    how: Nested,
    config: SearchConfig,
    stability: Float[np.ndarray, "layers units"] | None = None,
    gone: Bool[np.ndarray, "layers units"] | None = None,
) -> Bool[np.ndarray, "layers units"]:
    """Return which units stay so that at least `target` parameters go, by less than one block more.

    Args:
        scores: importance of each unit; not read where a layer has no such unit.
        tied: which units there are, and what they are inside of.
        target: parameters to remove.
        how: the floor of each holder, and what refusals call the option.
        config: `skip_layers`, `normalize`, `solver`; `stability_weight` with `adaptive`.
        stability: the indicator ASI of each unit.
        gone: units that went before; of what is left as many go as can, since those of holders that went since count
            among these.

    Raises:
        ValueError: no holder can lose a unit, the target cannot be met, a score is not finite, or the scores do not
            tell the units of a holder apart.
    """
    per, skipped = tied.per, skipped_layers(config.skip_layers, len(tied.existing))
    costs = tied.alive.sum(axis=1) * tied.costs
    limits = how.limits
    floor = -(-limits.min_keep // limits.multiple_of) * limits.multiple_of
    most = int((np.maximum(per - floor, 0) * costs * ~skipped).sum())
    if gone is None:
        check_tied(per, most, target, how)
    target = min(target, most)
    ranked = _ranked(how.option.rpartition(".")[2], scores, tied, config, stability, gone)
    groups = [tied.by_holder(ranked, layer) for layer in range(len(per))]
    alive = [group[tied.alive[layer, : len(group)]] for layer, group in enumerate(groups)]
    if target and all((group == group[:, :1]).all() for group in alive):
        units, holder, _ = how.words
        raise ValueError(
            f"{how.option}.share: expected scores that tell the {units} of {holder} apart, got equal ones; "
            "use an estimator of units, such as gate_fisher"
        )
    free = [layer for layer, group in enumerate(alive) if group.size and not skipped[layer]]
    means: Scores = {str(layer): np.sort(alive[layer], axis=1).mean(axis=0)[None] for layer in free}
    blocks = {name: np.ones(values.shape, bool) for name, values in means.items()}
    cost = {str(layer): costs[layer : layer + 1] for layer in free}
    whole = sum(int(costs[layer] * per[layer]) for layer in free)
    ranking = SearchConfig(allocation="global", rank_by="score", solver=config.solver)
    each = dict.fromkeys(blocks, limits)
    left = search(means, cost, blocks, target / max(whole, 1), ranking, limits=each).keep if whole else {}
    keep = np.zeros(tied.existing.shape, bool)
    for layer, group in enumerate(groups):
        stays = int(left[str(layer)].sum()) if str(layer) in left else group.shape[1]
        keep[layer, : group.size] = _highest_kept(group, stays).ravel()
    return keep


def check_tied(per: Int[np.ndarray, "layers"], most: int, target: int, how: Nested) -> None:
    """Raise ValueError where units inside of others cannot make up `target` parameters, of which they have `most`."""
    units, _, holders = how.words
    if (per <= 1).all():
        raise ValueError(
            f"{how.option}.share: expected {holders} with two {units} or more, got a model with one each: there, "
            f"{how.inside} units are {units}; leave it 0"
        )
    if target > most:
        aligned = f", {how.option}.multiple_of" if how.limits.multiple_of > 1 else ""
        raise ValueError(
            f"{how.option}.share: expected at most {most:,} parameters from {units}, as {how.option}.min_keep{aligned} "
            f"and search.skip_layers allow, got {target:,}; lower it or the ratio, or relax those"
        )


def held(
    holders: Bool[np.ndarray, "layers holders"],
    existing: Bool[np.ndarray, "layers units"],
    all_holders: Bool[np.ndarray, "layers holders"],
) -> Bool[np.ndarray, "layers units"]:
    """Return which units lie inside of the given holders."""
    inside = np.zeros(existing.shape, bool)
    for row, kept, units, present in zip(inside, holders, existing, all_holders, strict=True):
        if count := int(present.sum()):
            each = int(units.sum()) // count
            row[: count * each] = np.repeat(kept[:count], each)
    return inside


def _ranked(
    name: str,
    scores: Float[np.ndarray, "layers units"],
    tied: Tied,
    config: SearchConfig,
    stability: Float[np.ndarray, "layers units"] | None,
    gone: Bool[np.ndarray, "layers units"] | None,
) -> Float[np.ndarray, "layers units"]:
    """Return what units are ranked by, NaN where there is none; what went before is lowest of all."""
    ranked = priorities(
        {name: scores},
        {name: tied.costs},
        {name: tied.existing},
        config,
        None if stability is None else {name: stability},
        None if gone is None else {name: gone},
    )
    return np.asarray(ranked[name])


def _highest_kept(group: Float[np.ndarray, "holders per"], left: int) -> Bool[np.ndarray, "holders per"]:
    """Keep the `left` highest units of each holder; of equals, the lower number goes first."""
    kept = np.ones(group.shape, bool)
    lowest = np.argsort(group, axis=1, kind="stable")[:, : group.shape[1] - left]
    np.put_along_axis(kept, lowest, False, axis=1)
    return kept
