"""The page of a score run: how estimators agree, how fusions came about, what scenarios have in common."""

import json
import math
import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.report.html import csv_link, fusion_section, render_page, run_facts
from saap_jax.report.patterns import Patterns, csv_patterns, pattern_cells, pattern_figure, pattern_notes, patterns
from saap_jax.report.records import plain, read_run
from saap_jax.report.rows import Record
from saap_jax.report.scores import format_correlation, rank_agreement, rank_cells
from saap_jax.types import STRUCTURES, Scores

ByScenario = dict[str, dict[str, Scores]]
"""`{scenario: {estimator: {structure: [layers, units]}}}`."""

_USAGE = re.compile(r"activation_frequency(\([^()]*\))?")
_RANDOM = re.compile(r"random(\([^()]*\))?")
"""Names of estimators, with hyper-parameters or without; a fusion that one of them is part of does not match."""


def render_scores(run_dir: str | os.PathLike[str]) -> str:
    """Return the page of a score run, made from `run.json` and `scores.npz` alone.

    Patterns are shown of two scenarios or more, or where usage frequencies were scored. The estimator of importance is
    `config.patterns.importance`, else the first that is neither random nor a frequency and whose scores differ between
    scenarios (weights alone say nothing of them).

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run, or its patterns name an unknown estimator.
    """
    run, scores = read_run(run_dir), read_scores(run_dir)
    found = find_patterns(run, scores)
    view = {
        "style": _style(),
        "run": run,
        "model": _model(run),
        "scored": bool(scores),
        "summary": summary(scores, found),
        "agreement": {name: _agreement(by_estimator) for name, by_estimator in scores.items() if len(by_estimator) > 1},
        "fusion": fusion_section(run),
        "many": len(scores),
        "counted": "Unimportant in all scenarios" if len(scores) > 1 else "Unimportant units",
        "patterns": _patterns(found) if found else {},
        "patterns_csv": csv_link(csv_patterns(found, only_consistent=True)) if found and len(scores) > 1 else "",
        "facts": facts(run, scores) | run_facts(run),
        "config": json.dumps(plain(run.get("config")), indent=2),
    }
    return render_page("scores.html", view)


def read_scores(run_dir: str | os.PathLike[str]) -> ByScenario:
    """Return the scores of `scores.npz`, whose arrays are named `scenario/estimator/structure`; empty without the file.

    Raises:
        ValueError: an array of another name.
    """
    path = Path(run_dir) / "scores.npz"
    scores: ByScenario = {}
    if not path.exists():
        return scores
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            scenario, _, rest = key.partition("/")
            estimator, _, structure = rest.rpartition("/")
            if not (scenario and estimator and structure in STRUCTURES):
                raise ValueError(
                    f"expected arrays named scenario/estimator/structure, got {key!r} in {path}; score again with "
                    "--overwrite"
                )
            scores.setdefault(scenario, {}).setdefault(estimator, {})[structure] = file[key]
    return scores


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
    what = f"{_count(len(by_estimator), 'estimator')} scored all units ({units})"
    sentences = [f"{what} in {_count(many, 'scenario')}: {', '.join(scores)}."]
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
        "model": _model(run),
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


def _patterns(found: Patterns) -> dict[str, dict[str, Any]]:
    """Return what the page shows of each structure that has units."""
    return {
        name: {
            "table": pattern_cells(found, name),
            "notes": pattern_notes(found, name),
            "layers": part.layers,
            "figure": pattern_figure(found, name),
        }
        for name, part in found.structures.items()
        if part.units
    }


def _agreement(by_estimator: dict[str, Scores]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return each estimator with its row of rank correlations; each as text and as a tint."""
    rows = []
    for index, (name, values) in enumerate(zip(by_estimator, rank_cells(by_estimator), strict=True)):
        cells = []
        for other, value in enumerate(values):
            text = "·" if index == other else format_correlation(value)
            rgb = "0, 114, 178" if value > 0 else "213, 94, 0"
            tint = "" if math.isnan(value) else f"background: rgba({rgb}, {0.55 * abs(value):.2f})"
            cells.append({"text": text, "style": tint})
        rows.append((name, cells))
    return rows


def _model(run: Record) -> str:
    return str((run.get("model") or {}).get("name") or ((run.get("config") or {}).get("model") or {}).get("name") or "")


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _style() -> str:
    """Return the style sheet of the comparison's page: both pages look alike."""
    return (Path(__file__).parent / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
