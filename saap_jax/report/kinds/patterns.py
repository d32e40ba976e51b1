"""Activation patterns over scenarios: how often units are used, and which are unimportant in every scenario.

Within a scenario the unimportant units of a structure are those of the lowest scores, the same share of all its units
whatever the layer. Ranks are given as percentile ranks, (mid-rank − ½) / units: 0 lowest, 1 highest, free of the
estimator's unit.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from rich import box
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata

from saap_jax.report.kinds.scores import format_correlation, heat_maps, inline_svg, rank_agreement, short_name
from saap_jax.report.kinds.tables import format_percent
from saap_jax.report.page.csv_text import csv_text
from saap_jax.types import Keep, Scores

_CELLS = 200
"""Cells of a heat map side by side; more units than that are averaged, about as a screen would."""

_LEVELS = 64
"""Colours of a heat map: few enough for small files, too many to be told apart."""

_PANELS = 4
"""Scenarios side by side."""

_TALL = {"least": 1.7, "layer": 0.1, "most": 5.0, "frame": 1.3}
"""Inches: of a panel at least, of each layer, of a panel at most, and of titles, ticks and colour bar of a row."""

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


# --- tables ----------------------------------------------------------------------------------------


def pattern_cells(found: Patterns, structure: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the formatted cells of a structure's table, one line a scenario."""
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
    return header, lines


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


def _small_percent(value: float) -> str:
    """Return a fraction as percent, with one digit where `format_percent` would leave none."""
    return f"{100 * value:.1g}" if 0 < value < 0.0005 else format_percent(value)


def rich_patterns(found: Patterns, structure: str) -> Table:
    """Return the table of a structure for a terminal of 100 columns."""
    table = Table(
        title=Text(f"{structure}, {found.structures[structure].units:,} units: patterns by scenario", style="italic"),
        caption=Text("\n".join(pattern_notes(found, structure))),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    header, lines = pattern_cells(found, structure)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def csv_patterns(found: Patterns, *, only_consistent: bool = False) -> str:
    """Return one line a unit as CSV: percentile rank and usage in each scenario, unimportant in all of them (1) or not.

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
    return csv_text(["structure", "layer", "unit", *columns, "consistently_unimportant"], rows)


# --- the figure ------------------------------------------------------------------------------------


def pattern_figure(found: Patterns, structure: str) -> str:
    """Return a structure's heat maps as SVG: importance and usage, a panel a scenario, and what all agree on.

    A row of a panel is a layer. Attention units stand in order; MLP channels are sorted within their layer by their
    mean rank over scenarios, the same order in all panels. Where there are more units than cells, a cell is a mean.
    Empty if the model has no such unit.
    """
    part = found.structures[structure]
    if not part.units:
        return ""
    panel = min(max(_TALL["least"], _TALL["layer"] * len(part.consistent)), _TALL["most"])
    said = f"Percentile rank of importance by {found.importance}"
    said += f" and frequency by {found.usage}" if found.usage else ""
    said += f" of each unit by layer, a panel a scenario: {', '.join(found.scenarios)}."
    return inline_svg(
        lambda figure: _paint(figure, found, structure),
        height=_shape(found)[0] * (panel + _TALL["frame"]),
        title=f"Patterns by scenario: {structure}",
        description=" ".join([said, *pattern_notes(found, structure)]),
    )


def _shape(found: Patterns) -> tuple[int, int]:
    """Return rows and columns of panels: usage below importance (of one scenario: beside it), agreement at the end."""
    many, kinds = len(found.scenarios), 2 if found.usage else 1
    rows = -(-many // _PANELS)
    return (1, kinds + 1) if many == 1 else (kinds * rows, -(-many // rows) + 1)


def _paint(figure: Any, found: Patterns, structure: str) -> None:
    """Draw all panels: importance, usage, and in the last column what scenarios agree on."""
    from matplotlib import colormaps  # here, because plotting takes long to import
    from matplotlib.colors import LinearSegmentedColormap

    part, many = found.structures[structure], len(found.scenarios)
    order = _by_mean_rank(part) if structure == "mlp" else None
    figure.get_layout_engine().set(hspace=0.06)
    axes = figure.subplots(*_shape(found), squeeze=False)
    for axis in axes.ravel():
        axis.set_visible(False)  # until something is drawn there
    kinds = [("importance", part.ranks, "viridis", f"percentile rank, %\nby {short_name(found.importance, 40)}")]
    if found.usage:
        label = f"share of tokens that use the unit, %\nby {short_name(found.usage, 40)}"
        kinds.append(("usage", part.frequencies, "cividis", label))
    places = np.split(axes[:, :-1], len(kinds), axis=1 if many == 1 else 0)
    for grid, (kind, values, scale, label) in zip(places, kinds, strict=True):
        cells = {scenario: _cells(each, order) for scenario, each in values.items()}
        most = 1.0 if kind == "importance" else max(0.01, *(float(np.nanmax(each)) for each in cells.values()))
        heat_maps(grid.ravel()[:many], cells, part.consistent.shape, colormaps[scale].resampled(_LEVELS), most, label)
        for axis in grid[:, 0]:
            axis.set_ylabel(f"{kind} by layer")
    exists = ~np.isnan(next(iter(part.ranks.values())))
    agreed = _cells(np.where(exists, part.consistent, np.nan), order)
    scale = LinearSegmentedColormap.from_list("share", [(0.5, 0.5, 0.5, 0.15), "#e69f00", "#c44a00"], N=_LEVELS)
    title = "unimportant in all" if many > 1 else f"the lowest {100 * found.share:g} %"
    heat_maps(axes[0, -1:], {title: agreed}, part.consistent.shape, scale, 1.0, "share of the units, %\n")
    for axis in axes.ravel():
        axis.set_xlabel("unit" if order is None else f"channels by {'mean ' if many > 1 else ''}rank")


def _by_mean_rank(part: StructurePatterns) -> np.ndarray:
    """Return the order of each layer's units by their mean rank over scenarios, absent units last."""
    return np.argsort(np.mean(list(part.ranks.values()), axis=0), axis=1, kind="stable")


def _cells(values: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """Return the cells of a heat map: units in the given order, and neighbours averaged where there are too many."""
    if order is not None:
        values = np.take_along_axis(values, order, axis=1)
    units = values.shape[1]
    if units <= _CELLS:
        return values
    starts = np.arange(_CELLS) * units // _CELLS
    exists = ~np.isnan(values)
    counts = np.add.reduceat(exists, starts, axis=1, dtype=np.int64)
    totals = np.add.reduceat(np.where(exists, values, 0), starts, axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
