"""Activation patterns over scenarios: how often units are used, and which are unimportant in every scenario.

Within a scenario the unimportant units of a structure are those of the lowest scores, the same share of all its units
whatever the layer. Ranks are given as percentile ranks, (mid-rank − ½) / units: 0 lowest, 1 highest, free of the
estimator's unit.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from saap_jax.report.figures.patterns import pattern_plot
from saap_jax.report.kinds.scores import rank_agreement
from saap_jax.report.page.blocks import Block, Data, Detail, Folded, Part, Picture, Section, Table, Words, text_table
from saap_jax.report.page.formats import format_correlation, format_percent
from saap_jax.types import Keep, Scores

_ROUNDING = 1e-6
"""How far a frequency in float32 may be off."""

ByScenario = dict[str, Float[np.ndarray, "_layers _units"]]
"""Values of one structure's units in each scenario, float64; NaN where there is no unit."""


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
    chance: float
    """Share of the units that is unimportant in all scenarios if their orders are independent."""
    task_specific: int
    """Units that are unimportant in a scenario, and in another neither that nor in the lower half."""
    ranks: ByScenario
    """Percentile rank of importance in each scenario."""
    frequencies: ByScenario
    """Usage frequency in each scenario; empty without an estimator of it."""

    @property
    def agreed(self) -> int:
        """Units that are unimportant in all scenarios."""
        return int(self.consistent.sum())

    @property
    def share(self) -> float:
        """Share of the units that is unimportant in all scenarios."""
        return self.agreed / self.units if self.units else math.nan

    @property
    def layers(self) -> list[int]:
        """Units of each layer that are unimportant in all scenarios."""
        return self.consistent.sum(axis=1).tolist()


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

    @property
    def indices(self) -> dict[str, list[list[int]]]:
        """`{structure: [[layer, unit], …]}` of the units that are unimportant in all scenarios."""
        return {name: np.argwhere(part.consistent).tolist() for name, part in self.structures.items()}


def unimportant(scores: Scores, share: float) -> Keep:
    """Return True for the ⌊share · n⌋ lowest of each structure's n units, over all layers.

    Among equal scores lower layers and then lower indices come first. Where there is no unit (NaN), False.

    Raises:
        ValueError: `share` outside [0, 1].

    >>> unimportant({"mlp": np.array([[3.0, 1.0], [np.nan, 2.0]])}, 0.67)["mlp"].tolist()
    [[False, True], [False, True]]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"patterns: expected a share in [0, 1], got {share}")
    masks: Keep = {}
    for name, values in scores.items():
        places = _places(np.asarray(values, np.float64))
        units = np.isfinite(places).sum()
        masks[name] = places < math.floor(Fraction(str(share)) * int(units))  # NaN < x is False
    return masks


def patterns(
    scores: dict[str, dict[str, Scores]], importance: str, usage: str | None = None, share: float = 0.2
) -> Patterns:
    """Compare what is important, and what is used, between scenarios.

    With one scenario the units that are unimportant in all scenarios are simply its lowest.

    Args:
        scores: `{scenario: {estimator: {structure: [layers, units]}}}`; NaN where a layer has no such unit.
        importance: the estimator that says what is important.
        usage: the estimator of usage frequency, in [0, 1]; None leaves usage out.
        share: units of each structure that count as unimportant in a scenario, in [0, 1].

    Raises:
        ValueError: no scenario, an estimator that a scenario lacks, units that differ between scenarios or estimators,
            or a usage that is no frequency.
    """
    _check(scores, importance, usage)
    first = next(iter(scores.values()))[importance]
    lowest = {scenario: unimportant(each[importance], share) for scenario, each in scores.items()}
    structures = {}
    for name in first:
        important = {s: np.asarray(each[importance][name], np.float64) for s, each in scores.items()}
        frequencies = {s: np.asarray(e[usage][name], np.float64) for s, e in scores.items()} if usage else {}
        structures[name] = _structure(important, frequencies, {s: masks[name] for s, masks in lowest.items()})
    return Patterns(importance, usage, share, tuple(scores), structures)


def _structure(important: ByScenario, frequencies: ByScenario, lowest: Keep) -> StructurePatterns:
    """Return the patterns of one structure; all arguments are by scenario."""
    exists = ~np.isnan(next(iter(important.values())))
    units, count = int(exists.sum()), int(next(iter(lowest.values())).sum())
    # by the same order as `lowest`, so that equal scenarios have no task-specific unit, whatever the share
    upper = {s: (_places(values) >= math.ceil(units / 2)) & ~lowest[s] for s, values in important.items()}
    specific = [upper[s] & lowest[t] for s in important for t in important if s != t]
    between = rank_agreement({s: {"": values} for s, values in important.items()}, "")
    others = ~np.eye(len(important), dtype=bool)
    agreement = [
        float(np.mean(row[mask])) if mask.any() else math.nan for row, mask in zip(between, others, strict=True)
    ]
    return StructurePatterns(
        units=units,
        lowest=count,
        usage={s: float(np.mean(f[exists])) if units else math.nan for s, f in frequencies.items()},
        agreement=dict(zip(important, agreement, strict=True)),
        usage_importance={
            s: float(rank_agreement({"importance": {"": important[s]}, "usage": {"": f}}, "")[0, 1])
            for s, f in frequencies.items()
        },
        consistent=np.all(list(lowest.values()), axis=0),
        chance=(count / units) ** len(important) if units else math.nan,
        task_specific=int(np.any(specific, axis=0).sum()) if specific else 0,
        ranks={s: _percentiles(values) for s, values in important.items()},
        frequencies=frequencies,
    )


def _check(scores: dict[str, dict[str, Scores]], importance: str, usage: str | None) -> None:
    """Raise ValueError unless all scenarios have both estimators' scores of the same units."""
    if not scores:
        raise ValueError("patterns: expected the scores of at least one scenario, got none")
    reference: dict[str, np.ndarray] = {}
    for scenario, by_estimator in scores.items():
        for estimator in (importance, *((usage,) if usage else ())):
            if estimator not in by_estimator:
                names = ", ".join(by_estimator) or "none"
                raise ValueError(
                    f"patterns: expected scores of {estimator} in scenario {scenario}, got those of: {names}"
                )
            found = {name: ~np.isnan(np.asarray(values)) for name, values in by_estimator[estimator].items()}
            reference = reference or found
            if found.keys() != reference.keys() or any(not np.array_equal(found[n], reference[n]) for n in reference):
                raise ValueError(
                    f"patterns: expected {estimator} in scenario {scenario} to score the units that {importance} "
                    f"scores in {next(iter(scores))}, got others; score all scenarios with one model"
                )
        for name, values in by_estimator[usage].items() if usage else ():
            shares = np.asarray(values)[reference[name]]
            if np.any((shares < -_ROUNDING) | (shares > 1 + _ROUNDING)):
                raise ValueError(
                    f"patterns: expected frequencies in [0, 1] of {usage} in scenario {scenario}, {name}, "
                    f"got {shares.min():.4g} to {shares.max():.4g}; name an activation_frequency"
                )


def _places(values: Float[np.ndarray, "_layers _units"]) -> Float[np.ndarray, "_layers _units"]:
    """Return the place of each unit from the lowest score, 0, 1, …; equal scores by layer, then index; NaN stays."""
    exists = ~np.isnan(values)
    places = np.full(values.shape, np.nan)
    order = np.argsort(values[exists], kind="stable")
    row = np.empty(len(order))
    row[order] = np.arange(len(order))
    places[exists] = row
    return places


def _percentiles(values: Float[np.ndarray, "_layers _units"]) -> Float[np.ndarray, "_layers _units"]:
    """Return (mid-rank − ½) / units; NaN stays."""
    exists = ~np.isnan(values)
    result = np.full(values.shape, np.nan)
    result[exists] = (rankdata(values[exists]) - 0.5) / max(int(exists.sum()), 1)
    return result


# --- blocks ----------------------------------------------------------------------------------------


def pattern_section(found: Patterns | None, detail: Detail) -> list[Section]:
    """Return what scenarios have in common, structure by structure."""
    if found is None:
        return []
    many = len(found.scenarios)
    counted = "Unimportant in all scenarios" if many > 1 else "Unimportant units"
    blocks: list[Block] = [
        Words(
            "~ is Spearman's rank correlation over all units. Unimportant units are the lowest of their structure, "
            "over all layers."
        )
    ]
    if many > 1 and detail.downloads:
        blocks.append(pattern_data(found))
    parts = []
    for name, part in found.structures.items():
        if part.units:
            said = " ".join(pattern_notes(found, name))
            maps = [Picture(f"Heat maps, {name}", pattern_plot(found, name, said))] if detail.drawn else []
            folded = Folded(f"{counted}, by layer", [_by_layer(f"{counted} by layer, {name}", part.layers)])
            parts.append(Part(name, [pattern_table(found, name), *maps, folded]))
    title = "Patterns by scenario" if many > 1 else "Importance and usage"
    return [Section("patterns", title, [*blocks, *parts])] if parts else []


def pattern_table(found: Patterns, structure: str) -> Table:
    """Return a structure's table, one line a scenario."""
    part = found.structures[structure]
    header = ["scenario"]
    header += ["mean usage %", "usage ~ importance"] if found.usage else []
    header += ["importance ~ other scenarios"] if len(found.scenarios) > 1 else []
    lines = []
    for scenario in found.scenarios:
        line = [scenario]
        if found.usage:
            line += [format_percent(part.usage[scenario]), format_correlation(part.usage_importance[scenario])]
        line += [format_correlation(part.agreement[scenario])] if len(found.scenarios) > 1 else []
        lines.append(line)
    title = f"{structure}, {part.units:,} units: patterns by scenario"
    return text_table(title, header, lines, notes=pattern_notes(found, structure))


def pattern_notes(found: Patterns, structure: str) -> list[str]:
    """Say how many units of a structure are unimportant in all scenarios, against chance, and how many change sides."""
    part, many = found.structures[structure], len(found.scenarios)
    if not part.units:
        return [f"No {structure} units."]
    lowest = f"lowest {100 * found.share:g} % by {found.importance}"
    counted = f"{part.agreed:,} of {part.units:,} {structure} units ({format_percent(part.share)} %)"
    if many == 1:
        return [f"{counted} are the {lowest}: with one scenario, consistently unimportant is no more than that."]
    alike = format_percent(part.lowest / part.units)
    are = "unit is" if part.task_specific == 1 else "units are"
    return [
        f"{counted} are among the {lowest} in all {many} scenarios; independent orders would give "
        f"{_small_percent(part.chance)} %, equal ones {alike} %.",
        f"{part.task_specific:,} {are} among the lowest in one scenario and in the upper half of another.",
    ]


def pattern_data(found: Patterns, *, only_consistent: bool = True) -> Data:
    """Return one line a unit: percentile rank and usage in each scenario, unimportant in all of them (1) or not.

    `only_consistent` leaves out units that are not.
    """
    columns = [f"rank {s}" for s in found.scenarios] + ([f"usage {s}" for s in found.scenarios] if found.usage else [])
    rows = []
    for structure, part in found.structures.items():
        values = np.stack([*part.ranks.values(), *part.frequencies.values()])
        where = part.consistent if only_consistent else ~np.isnan(values[0])
        for layer, unit in np.argwhere(where).tolist():
            numbers = [f"{value:.6g}" for value in values[:, layer, unit].tolist()]
            rows.append([structure, layer, unit, *numbers, int(part.consistent[layer, unit])])
    header = ["structure", "layer", "unit", *columns, "consistently_unimportant"]
    return Data("CSV of the units that are unimportant in all scenarios", "unimportant.csv", header, rows)


def _by_layer(title: str, layers: list[int]) -> Table:
    """Return counts by layer, a column a layer."""
    return text_table(title, [], [["layer", *map(str, range(len(layers)))], ["units", *map(str, layers)]])


def _small_percent(value: float) -> str:
    """Return a fraction as percent, with one digit where `format_percent` would leave none."""
    return f"{100 * value:.1g}" if 0 < value < 0.0005 else format_percent(value)
