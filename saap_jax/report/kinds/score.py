"""A score run as sections: how estimators agree, how fusions came about, what scenarios have in common."""

import math
import os
import re
from itertools import combinations
from typing import Any

import numpy as np

from saap_jax.report.kinds.common import cost_section, model_name, reproduce_section
from saap_jax.report.kinds.compare import fusion_section, score_parts
from saap_jax.report.kinds.patterns import (
    Patterns,
    csv_patterns,
    pattern_cells,
    pattern_figure,
    pattern_notes,
    patterns,
)
from saap_jax.report.kinds.scores import format_correlation, rank_agreement, rank_cells
from saap_jax.report.page.blocks import (
    Block,
    Bullets,
    Cell,
    Detail,
    Download,
    Folded,
    Line,
    Part,
    Picture,
    Section,
    Table,
    Words,
    plain_table,
    plural,
)
from saap_jax.report.rows import Record
from saap_jax.report.score_arrays import ByScenario, read_scores
from saap_jax.types import STRUCTURES, Scores

_USAGE = re.compile(r"activation_frequency(\([^()]*\))?")
_RANDOM = re.compile(r"random(\([^()]*\))?")
"""Names of estimators, with hyper-parameters or without; a fusion that one of them is part of does not match."""


def score_sections(run_dir: str | os.PathLike[str], run: Record, detail: Detail) -> list[Section]:
    """Return the sections of a score run, made from `run.json` and `scores.npz` alone.

    Patterns are shown of two scenarios or more, or where usage frequencies were scored. The estimator of importance is
    `config.patterns.importance`, else the first that is neither random nor a frequency and whose scores differ between
    scenarios (weights alone say nothing of them).

    Raises:
        ValueError: scores of another layout, or patterns that name an unknown estimator.
    """
    scores = read_scores(run_dir)
    found = find_patterns(run, scores)
    return [
        Section("summary", "Summary", [Bullets(summary(scores, found))]),
        *agreement_section(scores),
        *distribution_section(scores, detail),
        *fusion_section(run, detail),
        *pattern_section(found, detail),
        *cost_section(run),
        reproduce_section(run, facts(run, scores)),
    ]


def agreement_section(scores: ByScenario) -> list[Section]:
    """Return the rank correlations of every scenario of two estimators or more."""
    parts = []
    for scenario, by_estimator in scores.items():
        if len(by_estimator) > 1:
            header = ["estimator", *map(str, range(1, len(by_estimator) + 1))]
            table = Table(f"Rank correlations, {scenario}", header, _agreement(by_estimator), matrix=True)
            parts.append(Part(scenario, [table]))
    said = (
        "Spearman's rank correlation between the scores of all units: attention units below the diagonal, MLP channels "
        "above it. Blue agrees, orange disagrees."
    )
    return [Section("agreement", "Do estimators agree?", [Words(said), *parts])] if parts else []


def distribution_section(scores: ByScenario, detail: Detail) -> list[Section]:
    """Return the distributions of the scores, scenario by scenario."""
    several = len(scores) > 1
    parts: list[Block] = []
    for scenario, by_estimator in scores.items():
        said, charts = score_parts(by_estimator, detail, scenario if several else "")
        parts += ([] if parts else [Words(said)]) + charts if charts else []
    return [Section("scores", "How scores are distributed", parts)] if parts else []


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
        csv = csv_patterns(found, only_consistent=True)
        blocks.append(Download("CSV of the units that are unimportant in all scenarios", "unimportant.csv", csv))
    parts = [
        Part(
            name,
            [
                plain_table(f"Patterns, {name}", *pattern_cells(found, name)),
                *(Words(note, soft=False) for note in pattern_notes(found, name)),
                *([Picture(f"Heat maps, {name}", pattern_figure(found, name), wide=True)] if detail.drawn else []),
                Folded(f"{counted}, by layer", [_by_layer(f"{counted} by layer, {name}", part.layers)]),
            ],
        )
        for name, part in found.structures.items()
        if part.units
    ]
    title = "Patterns by scenario" if many > 1 else "Importance and usage"
    return [Section("patterns", title, [*blocks, *parts])] if parts else []


def find_patterns(run: Record, scores: ByScenario) -> Patterns | None:
    """Return the patterns of a run; None where there is nothing to compare, or no estimator of importance."""
    asked = (run.get("config") or {}).get("patterns") or {}
    names = list(next(iter(scores.values()), {}))
    usage = next(filter(_USAGE.fullmatch, names), None)
    importance = asked.get("importance") or _importance(scores)
    if not importance or (len(scores) < 2 and usage is None):
        return None
    return patterns(scores, importance, usage, asked.get("share", 0.2))


def _importance(scores: ByScenario) -> str:
    """Return the first estimator that is neither random nor a frequency, if possible one that reads the text."""
    (first, *others) = scores.values() or [{}]
    likely = [name for name in first if not (_USAGE.fullmatch(name) or _RANDOM.fullmatch(name))]

    def differs(name: str) -> bool:
        return any(
            not np.array_equal(first[name][part], other[name][part], equal_nan=True)
            for other in others
            if name in other
            for part in first[name]
        )

    return next(filter(differs, likely), next(iter(likely), ""))


def summary(scores: ByScenario, found: Patterns | None) -> list[str]:
    """Say in words what was scored, which estimators agree most and least, and what scenarios have in common."""
    if not scores:
        return ["Nothing is scored yet."]
    (scenario, by_estimator), many = next(iter(scores.items())), len(scores)
    first = next(iter(by_estimator.values()))
    units = ", ".join(f"{(~np.isnan(np.asarray(values))).sum():,} {name}" for name, values in first.items())
    what = f"{plural(len(by_estimator), 'estimator')} scored all units ({units})"
    sentences = [f"{what} in {plural(many, 'scenario')}: {', '.join(scores)}."]
    chosen = {name: values for name, values in by_estimator.items() if not _RANDOM.fullmatch(name)}
    for structure in STRUCTURES:
        matrix = rank_agreement(chosen, structure)
        pairs = [(matrix[i, j], *(list(chosen)[k] for k in (i, j))) for i, j in combinations(range(len(chosen)), 2)]
        pairs = [pair for pair in pairs if math.isfinite(pair[0])]
        if len(pairs) > 1:
            (most, *alike), (least, *unlike) = max(pairs), min(pairs)
            where = f"On {structure} units" + (f" of scenario {scenario}" if many > 1 else "")
            agree = f"{' and '.join(alike)} agree most (Spearman {format_correlation(most)})"
            sentences.append(f"{where}, {agree}, {' and '.join(unlike)} least ({format_correlation(least)}).")
    if found:
        sentences += [pattern_notes(found, structure)[0] for structure in found.structures]
    return sentences


def facts(run: Record, scores: ByScenario) -> dict[str, str]:
    """Return the facts of a score run's configuration that its scores depend on."""
    config = run.get("config") or {}
    calibration, windows = config.get("calibration") or {}, run.get("scenarios") or {}
    about = {
        "model": model_name(run),
        "parameter type": (config.get("model") or {}).get("dtype"),
        "scenarios": ", ".join(
            f"{name} ({windows[name][0]:,} windows of {windows[name][1]:,} tokens)" if name in windows else name
            for name in (scores or windows)
        ),
        "calibration": ", ".join(f"{name} {_short(value)}" for name, value in calibration.items()),
        "statistics of": config.get("from_run"),
        "estimators": ", ".join(next(iter(scores.values()), {})),
    }
    return {name: str(value) for name, value in about.items() if value not in (None, "")}


def _by_layer(title: str, layers: list[int]) -> Table:
    """Return counts by layer, a column a layer."""
    lines = [Line([Cell("layer"), *(Cell(str(layer)) for layer in range(len(layers)))])]
    lines.append(Line([Cell("units"), *(Cell(str(count)) for count in layers)]))
    return Table(title, [], lines)


def _agreement(by_estimator: dict[str, Scores]) -> list[Line]:
    """Return each estimator with its row of rank correlations; each as text and as a tint."""
    rows = []
    for index, (name, values) in enumerate(zip(by_estimator, rank_cells(by_estimator), strict=True)):
        cells = [Cell(f"{index + 1} {name}")]
        for other, value in enumerate(values):
            text = "·" if index == other else format_correlation(value)
            rgb = "0, 114, 178" if value > 0 else "213, 94, 0"
            tint = "" if math.isnan(value) else f"rgba({rgb}, {0.55 * abs(value):.2f})"
            cells.append(Cell(text, tint=tint))
        rows.append(Line(cells))
    return rows


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
