"""A score run: how estimators agree, where they see importance, how fusions came about, what scenarios share."""

import itertools
import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from saap_jax.records import Fused, RunRecord
from saap_jax.report.blocks import Column, Findings, Row, Section, Table, folded, section, text_table
from saap_jax.report.figures import share_figure
from saap_jax.report.formats import format_hundredths, format_percent, slug
from saap_jax.report.pages.common import model_name
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import ByScenario, read_scores
from saap_jax.runtime.words import plural
from saap_jax.steps.score.fusion import scope_parts
from saap_jax.types import STRUCTURES, Scores

_USAGE = re.compile(r"activation_frequency(\([^()]*\))?")
_RANDOM = re.compile(r"random(\([^()]*\))?")
"""Names of estimators, with hyper-parameters or without; a fusion that one of them is part of does not match."""


# --- what is computed ------------------------------------------------------------------------------


def rank_agreement(scores: Iterable[Any]) -> Float[np.ndarray, "estimators estimators"]:
    """Compute Spearman's rank correlation between every two arrays of scores, of the same units.

    Units count whose scores are all finite. NaN where there is no correlation: fewer than two units, or an array of
    equal scores.
    """
    from scipy.stats import rankdata  # here and below: it takes longer than all else that reports import

    columns = [np.asarray(each, np.float64).ravel() for each in scores]
    exists = np.all(np.isfinite(columns), axis=0)
    ranks = [rankdata(column[exists]) for column in columns]
    varies = [len(rank) > 0 and np.ptp(rank) > 0 for rank in ranks]
    result = np.eye(len(columns))
    for i in range(len(columns)):
        for j in range(i):
            defined = varies[i] and varies[j]
            result[i, j] = result[j, i] = np.corrcoef(ranks[i], ranks[j])[0, 1] if defined else np.nan
    return result


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
        if self.units:
            return self.agreed / self.units
        return math.nan

    @property
    def chance(self) -> float:
        """Share of the units that is unimportant in all scenarios if their orders are independent."""
        if self.units:
            return (self.lowest / self.units) ** len(self.agreement)
        return math.nan


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


def unimportant(scores: Float[np.ndarray, "_layers _units"], share: float) -> Bool[np.ndarray, "_layers _units"]:
    """Mark the ⌊share · n⌋ lowest of a structure's n units, over all layers.

    Among equal scores lower layers and then lower indices come first. Where there is no unit (NaN), False.

    >>> unimportant(np.array([[3.0, 1.0], [np.nan, 2.0]]), 0.67).tolist()
    [[False, True], [False, True]]
    """
    places = _places(scores)
    return places < math.floor(Fraction(str(share)) * int(np.isfinite(places).sum()))  # NaN < x is False


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
    """
    structures = {}
    for name in next(iter(scores.values()))[importance]:
        important = {s: np.asarray(each[importance][name], np.float64) for s, each in scores.items()}
        used = {}
        if usage:
            used = {s: np.asarray(each[usage][name], np.float64) for s, each in scores.items()}
        lowest = {s: unimportant(values, share) for s, values in important.items()}
        exists = ~np.isnan(next(iter(important.values())))
        units = int(exists.sum())
        # by the same order as `lowest`, so that equal scenarios have no task-specific unit, whatever the share
        upper = {s: (_places(values) >= math.ceil(units / 2)) & ~lowest[s] for s, values in important.items()}
        pairs = itertools.permutations(important, 2)
        between = rank_agreement(important.values())
        np.fill_diagonal(between, 0)
        if len(important) > 1:
            means = between.sum(axis=1) / (len(important) - 1)
        else:
            means = [math.nan]
        structures[name] = StructurePatterns(
            units=units,
            lowest=int(next(iter(lowest.values())).sum()),
            usage={s: float(np.mean(f[exists])) if units else math.nan for s, f in used.items()},
            agreement=dict(zip(important, map(float, means), strict=True)),
            usage_importance={s: float(rank_agreement([important[s], f])[0, 1]) for s, f in used.items()},
            consistent=np.all(list(lowest.values()), axis=0),
            task_specific=int(np.any([upper[s] & lowest[t] for s, t in pairs] or [~exists & exists], axis=0).sum()),
        )
    return Patterns(importance, usage, share, tuple(scores), structures)


def _places(values: Float[np.ndarray, "_layers _units"]) -> Float[np.ndarray, "_layers _units"]:
    """Find the place of each unit from the lowest score, 0, 1, …; equal scores by layer, then index; NaN stays."""
    order = np.argsort(values, axis=None, kind="stable")  # NaN last
    places = np.empty(values.size)
    places[order] = np.arange(values.size)
    return np.where(np.isnan(values), np.nan, places.reshape(values.shape))


# --- the page ----------------------------------------------------------------------------------------


def score_findings(directory: RunDirectory) -> Findings:
    """Show how estimators and scenarios agree, of `run.json` and `scores.npz` alone.

    Raises:
        ValueError: scores of another layout, or patterns that name an unknown estimator.
    """
    run = directory.record
    if directory.has("scores.npz"):
        scores = read_scores(directory).scenarios
    else:
        scores = {}
    found = find_patterns(scores)
    alike = []
    for name, part in found.structures.items() if found else ():
        if found and part.units:
            by_layer = [[str(layer), str(units)] for layer, units in enumerate(part.consistent.sum(axis=1))]
            counts = text_table(f"{name}: unimportant units by layer", ("layer", "units"), by_layer)
            alike += [pattern_table(found, name), folded(counts)]
    about = "~ is Spearman's rank correlation over all units. Unimportant units are the lowest of their structure."
    agreement = [rank_table(each, scenario) for scenario, each in scores.items() if len(each) > 1]
    more = [*_layer_section(scores), *fusion_section(run), *section("Patterns by scenario", *alike, about=about)]
    known = _about(run, scores)
    return Findings(summary(scores, found), "Do estimators agree?", agreement, more=more, known=known)


def summary(scores: ByScenario, found: Patterns | None) -> list[str]:
    """Say in words what was scored, which estimators agree most and least, and what scenarios have in common."""
    if not scores:
        return ["Nothing is scored yet."]
    (scenario, by_estimator) = next(iter(scores.items()))
    many = len(scores)
    first = next(iter(by_estimator.values()))
    units = ", ".join(f"{(~np.isnan(np.asarray(values))).sum():,} {name}" for name, values in first.items())
    what = f"{plural(len(by_estimator), 'estimator')} scored all units ({units})"
    sentences = [f"{what} in {plural(many, 'scenario')}: {', '.join(scores)}."]
    chosen = {name: values for name, values in by_estimator.items() if not _RANDOM.fullmatch(name)}
    for structure in first:
        matrix = rank_agreement(each[structure] for each in chosen.values())
        names = list(chosen)
        pairs = itertools.combinations(range(len(chosen)), 2)
        known = [(matrix[i, j], names[i], names[j]) for i, j in pairs if math.isfinite(matrix[i, j])]
        if len(known) > 1:
            (most, *alike) = max(known)
            (least, *unlike) = min(known)
            where = f"On {structure} units" + (f" of scenario {scenario}" if many > 1 else "")
            agree = f"{' and '.join(alike)} agree most (Spearman {format_hundredths(most)})"
            sentences.append(f"{where}, {agree}, {' and '.join(unlike)} least ({format_hundredths(least)}).")
    return sentences + ([pattern_notes(found, structure)[0] for structure in found.structures] if found else [])


def _about(run: RunRecord, scores: ByScenario) -> dict[str, str | None]:
    """Say the facts of a score run's configuration that its scores depend on."""
    config = run.get("config", {})
    model = run.get("config", {}).get("model", "")
    calibration = config.get("calibration", {})
    windows = run.get("scenarios", {})
    shapes = {
        name: f" ({many:,} windows of {length:,} tokens)" if length > 1 else f" ({plural(many, 'example')})"
        for name, (many, length) in windows.items()
    }
    listed = {name: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in calibration.items()}
    return {
        "model": model_name(run),
        "parameter type": None if isinstance(model, str) else model.get("dtype"),
        "scenarios": ", ".join(f"{name}{shapes.get(name, '')}" for name in (scores or windows)),
        "calibration": ", ".join(f"{name} {value}" for name, value in listed.items()),
        "statistics of": config.get("from_run"),
        "estimators": ", ".join(next(iter(scores.values()), {})),
    }


# --- agreement and layers ----------------------------------------------------------------------------


def rank_table(scores: dict[str, Scores], scenario: str | None = None) -> Table:
    """Set rank correlations side by side: of our models attention units below the diagonal and MLP channels above it,
    of a traced model those of all structures.

    A `scenario` is named in the title.
    """
    halves = all(set(STRUCTURES) <= set(by_structure) for by_structure in scores.values())
    if halves:
        lower, upper = (rank_agreement(each[name] for each in scores.values()) for name in STRUCTURES)
    else:
        lower = upper = rank_agreement(np.concatenate([*map(np.ravel, each.values())]) for each in scores.values())
    cells = np.tril(lower, -1) + np.triu(upper, 1)
    rows: list[Row] = []
    for place, name in enumerate(scores):
        values = {str(other + 1): float(cells[place, other]) for other in range(len(scores)) if other != place}
        rows.append({"estimator": f"{place + 1} {name}"} | values)
    of = "" if scenario is None else f" in scenario {scenario}"
    if halves:
        where = "attention units below the diagonal, MLP channels above"
    else:
        where = "units of all structures"
    columns = [Column(str(n), (str(n),), format_hundredths) for n in range(1, len(scores) + 1)]
    columns.insert(0, Column("estimator", ("estimator",), words=True))
    return Table(f"Spearman rank correlation of scores{of}: {where}", columns, rows, file="agreement", matrix=True)


def layer_ranks(scores: np.ndarray) -> np.ndarray:
    """Find the mean percentile rank of each layer's units among all of a structure; NaN where it has none.

    >>> layer_ranks(np.array([[1.0, 2.0], [3.0, np.nan]])).round(3).tolist()
    [0.333, 0.833]
    """
    from scipy.stats import rankdata

    values = np.asarray(scores, np.float64)
    exists = np.isfinite(values)
    ranks = np.full(values.shape, np.nan)
    ranks[exists] = (rankdata(values[exists]) - 0.5) / max(int(exists.sum()), 1)
    counts = exists.sum(axis=1)
    return np.where(counts > 0, np.where(exists, ranks, 0).sum(axis=1) / np.maximum(counts, 1), np.nan)


def _layer_section(scores: ByScenario) -> list[Section]:
    """Draw where each estimator sees importance: a map a scenario, of estimators and layers."""
    figures = []
    for scenario, by_estimator in scores.items():
        panels = {
            structure: np.stack([layer_ranks(np.asarray(each[structure])) for each in by_estimator.values()])
            for structure in next(iter(by_estimator.values()))
            if all(structure in each for each in by_estimator.values())
        }
        panels = {name: cells for name, cells in panels.items() if np.isfinite(cells).any()}
        if panels:
            title = f"Mean rank by layer, {scenario}"
            figures.append(share_figure(f"layers-{slug(scenario)}", title, panels, [*by_estimator], "percentile"))
    about = "Mean percentile rank of each layer's units among all of their structure: bright is important."
    return section("Where importance lies", *figures, about=about)


# --- fusions -----------------------------------------------------------------------------------------


def fusion_section(run: RunRecord) -> list[Section]:
    """Show how a run's fused scores came about; nothing where none was fused."""
    about = (
        "A unit's fused score is a weighted sum over the estimators that are its members, by the weight 1 / (2 σ²) of "
        "the unit's scope. The scores of a member have a unit of their own, and so have its σ and weight: compare them "
        "between scopes and scenarios, not between members."
    )
    table = fusion_table(run.get("fusions", {}))
    return section("How fused scores came about", table if table.rows else None, about=about)


def fusion_table(fusions: dict[str, dict[str, Fused]]) -> Table:
    """List σ and weight of every member and scope; all layers of a structure are one row, as a range."""
    lines = []
    for scenario, by_name in fusions.items():
        for name, fused in by_name.items():
            for member, sigmas in fused["sigmas"].items():
                for structure, group in itertools.groupby(sigmas, key=lambda scope: scope_parts(scope)[0]):
                    scopes = list(group)
                    layers = ""
                    if scope_parts(scopes[0])[1] is not None:
                        layers = f", {plural(len(scopes), 'layer')}"
                    ranges = (_range(fused[kind][member][scope] for scope in scopes) for kind in ("sigmas", "weights"))
                    lines.append([scenario, name, member, f"{structure}{layers}", *ranges])
    header = ["scenario", "fused", "member", "scope", "σ", "weight"]
    return text_table("σ and weights of fused scores", header, lines, words=4)


def _range(values: Iterable[float]) -> str:
    found = list(map(float, values))
    low, high = (f"{end:,.0f}" if end >= 1000 else f"{end:.3g}" for end in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


# --- patterns ----------------------------------------------------------------------------------------


def find_patterns(scores: ByScenario) -> Patterns | None:
    """Find the patterns of a run; None where there is nothing to compare, or no estimator of importance.

    They are of two scenarios or more, or where usage frequencies were scored. The estimator of importance is
    the first that is neither random nor a frequency and whose scores differ between scenarios (weights alone say
    nothing of them).
    """
    first, *others = scores.values() or [{}]
    usage = next(filter(_USAGE.fullmatch, first), None)
    likely = [name for name in first if not (_USAGE.fullmatch(name) or _RANDOM.fullmatch(name))]

    def differs(name: str) -> bool:
        pairs = ((values, other[name][part]) for other in others for part, values in first[name].items())
        return any(not np.array_equal(one, other, equal_nan=True) for one, other in pairs)

    importance = next(filter(differs, likely), next(iter(likely), ""))
    if not importance or (len(scores) < 2 and usage is None):
        return None
    return patterns(scores, importance, usage)


def pattern_table(found: Patterns, structure: str) -> Table:
    """List a structure's patterns, a row a scenario."""
    part = found.structures[structure]
    columns = [
        Column("scenario", ("scenario",), words=True),
        *([Column("mean usage %", ("usage",), format_percent),
           Column("usage ~ importance", ("usage_importance",), format_hundredths)] if found.usage else []),
        *([Column("importance ~ other scenarios", ("agreement",), format_hundredths)]
          if len(found.scenarios) > 1 else []),
    ]  # fmt: skip
    kinds = ("usage", "usage_importance", "agreement")
    rows = [{"scenario": one} | {name: getattr(part, name).get(one) for name in kinds} for one in found.scenarios]
    title = f"{structure}, {part.units:,} units: patterns by scenario"
    return Table(title, columns, rows, pattern_notes(found, structure))


def pattern_notes(found: Patterns, structure: str) -> list[str]:
    """Say how many units of a structure are unimportant in all scenarios, against chance, and how many change sides."""
    part = found.structures[structure]
    many = len(found.scenarios)
    if not part.units:
        return [f"No {structure} units."]
    lowest = f"lowest {100 * found.share:g} % by {found.importance}"
    counted = f"{part.agreed:,} of {part.units:,} {structure} units ({format_percent(part.share)} %)"
    if many == 1:
        return [f"{counted} are the {lowest}: with one scenario, consistently unimportant is no more than that."]
    alike = format_percent(part.lowest / part.units)
    are = "unit is" if part.task_specific == 1 else "units are"
    if 0 < part.chance < 0.0005:
        chance = f"{100 * part.chance:.1g}"
    else:
        chance = format_percent(part.chance)
    return [
        f"{counted} are among the {lowest} in all {many} scenarios; independent orders would give {chance} %, equal "
        f"ones {alike} %.",
        f"{part.task_specific:,} {are} among the lowest in one scenario and in the upper half of another.",
    ]
