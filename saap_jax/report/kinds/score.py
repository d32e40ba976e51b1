"""A score run as sections: how estimators agree, how fusions came about, what scenarios have in common."""

import math
import os
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from saap_jax.report.kinds.common import cost_section, model_name, reproduce_section
from saap_jax.report.kinds.distributions import score_parts
from saap_jax.report.kinds.fusion import fusion_section
from saap_jax.report.kinds.patterns import Patterns, pattern_notes, pattern_section, patterns
from saap_jax.report.kinds.scores import layered, rank_agreement, rank_table
from saap_jax.report.page.blocks import Block, Bullets, Detail, Part, Section, Words
from saap_jax.report.page.formats import format_correlation
from saap_jax.runs.records import RunRecord
from saap_jax.runs.score_arrays import ByScenario, read_scores, structures_of
from saap_jax.runtime.words import plural

_USAGE = re.compile(r"activation_frequency(\([^()]*\))?")
_RANDOM = re.compile(r"random(\([^()]*\))?")
"""Names of estimators, with hyper-parameters or without; a fusion that one of them is part of does not match."""


def score_sections(run_dir: str | os.PathLike[str], run: RunRecord, detail: Detail) -> list[Section]:
    """Return the sections of a score run, made from `run.json` and `scores.npz` alone.

    Patterns are shown of two scenarios or more, or where usage frequencies were scored. The estimator of importance is
    `config.patterns.importance`, else the first that is neither random nor a frequency and whose scores differ between
    scenarios (weights alone say nothing of them).

    Raises:
        ValueError: scores of another layout, or patterns that name an unknown estimator.
    """
    scores = read_scores(run_dir, structures_of(run))
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
    several = {scenario: each for scenario, each in scores.items() if len(each) > 1}
    parts = [Part(scenario, [rank_table(each, scenario)]) for scenario, each in several.items()]
    halves = all(map(layered, several.values()))
    where = ": attention units below the diagonal, MLP channels above it" if halves else ""
    said = f"Spearman's rank correlation between the scores of all units{where}. Blue agrees, orange disagrees."
    return [Section("agreement", "Do estimators agree?", [Words(said), *parts])] if parts else []


def distribution_section(scores: ByScenario, detail: Detail) -> list[Section]:
    """Return the distributions of the scores, scenario by scenario."""
    several = len(scores) > 1
    parts: list[Block] = []
    for scenario, by_estimator in scores.items():
        said, charts = score_parts(by_estimator, detail, scenario if several else "")
        parts += ([] if parts else [Words(said)]) + charts if charts else []
    return [Section("scores", "How scores are distributed", parts)] if parts else []


def find_patterns(run: RunRecord, scores: ByScenario) -> Patterns | None:
    """Return the patterns of a run; None where there is nothing to compare, or no estimator of importance."""
    asked = run.get("config", {}).get("patterns", {})
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
    for structure in first:
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


def facts(run: RunRecord, scores: ByScenario) -> dict[str, str]:
    """Return the facts of a score run's configuration that its scores depend on."""
    config, model = run.get("config", {}), run.get("config", {}).get("model", "")
    calibration, windows = config.get("calibration", {}), run.get("scenarios", {})
    about = {
        "model": model_name(run),
        "parameter type": None if isinstance(model, str) else model.get("dtype"),
        "scenarios": ", ".join(
            f"{name} ({_shape(windows[name])})" if name in windows else name for name in (scores or windows)
        ),
        "calibration": ", ".join(f"{name} {_short(value)}" for name, value in calibration.items()),
        "statistics of": config.get("from_run"),
        "estimators": ", ".join(next(iter(scores.values()), {})),
    }
    return {name: str(value) for name, value in about.items() if value not in (None, "")}


def _shape(shape: Sequence[int]) -> str:
    return f"{shape[0]:,} windows of {shape[1]:,} tokens" if shape[1] > 1 else plural(shape[0], "example")


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
