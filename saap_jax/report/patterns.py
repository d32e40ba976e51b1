"""How far estimators and scenarios agree: rank correlations, usage, and units that are unimportant in every scenario.

Within a scenario the unimportant units of a structure are those of the lowest scores, the same share of all its units
whatever the layer. Ranks are given as percentile ranks, (mid-rank − ½) / units: 0 lowest, 1 highest, free of the
estimator's unit.
"""

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from saap_jax.types import Keep, Scores


class StructurePatterns(NamedTuple):
    """What scenarios say of one structure. Numbers that do not exist are NaN."""

    units: int
    lowest: int
    """Units that count as unimportant in one scenario."""
    usage: dict[str, float]
    """Mean usage frequency of each scenario; empty without an estimator of it."""
    agreement: dict[str, float]
    """Mean Spearman correlation of a scenario's importance with that of each other scenario."""
    usage_importance: dict[str, float]
    """Spearman correlation of usage and importance within a scenario; empty without an estimator of usage."""
    consistent: Bool[np.ndarray, "_layers _units"]
    """True for units that are unimportant in all scenarios."""
    task_specific: int
    """Units that are unimportant in a scenario, and in another neither that nor in the lower half."""

    @property
    def agreed(self) -> int:
        """Units that are unimportant in all scenarios."""
        return int(self.consistent.sum())

    @property
    def share(self) -> float:
        """Share of the units that is unimportant in all scenarios."""
        return self.agreed / self.units if self.units else math.nan

    @property
    def chance(self) -> float:
        """Share of the units that is unimportant in all scenarios if their orders are independent."""
        return (self.lowest / self.units) ** len(self.agreement) if self.units else math.nan


class Patterns(NamedTuple):
    """Activation patterns of every structure."""

    importance: str
    """The estimator that says what is important."""
    usage: str | None
    """The estimator that says how often a unit is used."""
    share: float
    """Units that count as unimportant in one scenario, as a share of the structure's units."""
    scenarios: tuple[str, ...]
    structures: dict[str, StructurePatterns]


def rank_agreement(scores: dict[str, Scores], structure: str) -> Float[np.ndarray, "estimators estimators"]:
    """Compute Spearman's rank correlation between every two estimators over all units.

    Units count that all estimators score with a finite number. NaN where there is no correlation: fewer than two units,
    or all scores of an estimator equal.
    """
    columns = [np.asarray(by_structure[structure], np.float64).ravel() for by_structure in scores.values()]
    exists = np.all(np.isfinite(columns), axis=0)
    ranks = [rankdata(column[exists]) for column in columns]
    varies = [len(rank) > 0 and np.ptp(rank) > 0 for rank in ranks]
    result = np.eye(len(columns))
    for i in range(len(columns)):
        for j in range(i):
            defined = varies[i] and varies[j]
            result[i, j] = result[j, i] = np.corrcoef(ranks[i], ranks[j])[0, 1] if defined else np.nan
    return result


def unimportant(scores: Scores, share: float) -> Keep:
    """Mark the ⌊share · n⌋ lowest of each structure's n units, over all layers.

    Among equal scores lower layers and then lower indices come first. Where there is no unit (NaN), False.

    >>> unimportant({"mlp": np.array([[3.0, 1.0], [np.nan, 2.0]])}, 0.67)["mlp"].tolist()
    [[False, True], [False, True]]
    """
    places = {name: _places(np.asarray(values, np.float64)) for name, values in scores.items()}
    counts = {name: math.floor(Fraction(str(share)) * int(np.isfinite(each).sum())) for name, each in places.items()}
    return {name: each < counts[name] for name, each in places.items()}  # NaN < x is False


def patterns(
    scores: dict[str, dict[str, Scores]], importance: str, usage: str | None = None, share: float = 0.2
) -> Patterns:
    """Compare what is important, and what is used, between scenarios of one model.

    With one scenario the units that are unimportant in all scenarios are simply its lowest.

    Args:
        scores: `{scenario: {estimator: {structure: [layers, units]}}}`; NaN where a layer has no such unit.
        importance: the estimator that says what is important.
        usage: the estimator of usage frequency, in [0, 1]; None leaves usage out.
        share: units of each structure that count as unimportant in a scenario, in [0, 1].

    Raises:
        ValueError: an estimator that a scenario lacks.
    """
    for scenario, estimator in itertools.product(scores, filter(None, (importance, usage))):
        if estimator not in scores[scenario]:
            names = ", ".join(scores[scenario]) or "none"
            raise ValueError(f"patterns: expected scores of {estimator} in scenario {scenario}, got those of: {names}")
    structures = {}
    for name in next(iter(scores.values()))[importance]:
        important = {s: np.asarray(each[importance][name], np.float64) for s, each in scores.items()}
        used = {s: np.asarray(each[usage][name], np.float64) for s, each in scores.items()} if usage else {}
        structures[name] = _structure(important, used, share)
    return Patterns(importance, usage, share, tuple(scores), structures)


def _structure(important: dict[str, np.ndarray], frequencies: dict[str, np.ndarray], share: float) -> StructurePatterns:
    """Find the patterns of one structure; importance and usage are by scenario."""
    lowest = {s: unimportant({"": values}, share)[""] for s, values in important.items()}
    exists = ~np.isnan(next(iter(important.values())))
    units = int(exists.sum())
    # by the same order as `lowest`, so that equal scenarios have no task-specific unit, whatever the share
    upper = {s: (_places(values) >= math.ceil(units / 2)) & ~lowest[s] for s, values in important.items()}
    specific = np.any([upper[s] & lowest[t] for s in important for t in important if s != t] or [~exists & exists], 0)
    between = rank_agreement({s: {"": values} for s, values in important.items()}, "")
    np.fill_diagonal(between, 0)
    means = between.sum(axis=1) / (len(important) - 1) if len(important) > 1 else [math.nan]
    return StructurePatterns(
        units=units,
        lowest=int(next(iter(lowest.values())).sum()),
        usage={s: float(np.mean(f[exists])) if units else math.nan for s, f in frequencies.items()},
        agreement=dict(zip(important, map(float, means), strict=True)),
        usage_importance={
            s: float(rank_agreement({"importance": {"": important[s]}, "usage": {"": f}}, "")[0, 1])
            for s, f in frequencies.items()
        },
        consistent=np.all(list(lowest.values()), axis=0),
        task_specific=int(specific.sum()),
    )


def _places(values: Float[np.ndarray, "_layers _units"]) -> Float[np.ndarray, "_layers _units"]:
    """Find the place of each unit from the lowest score, 0, 1, …; equal scores by layer, then index; NaN stays."""
    exists = ~np.isnan(values)
    places = np.full(values.shape, np.nan)
    places[exists] = rankdata(values[exists], method="ordinal") - 1
    return places
