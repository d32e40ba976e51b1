"""The first look at a comparison: what was compared, the best of each ratio, and how sure that is."""

import math
from collections.abc import Sequence

import numpy as np

from saap_jax.evaluation.differences import Difference, differences_against
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.kinds.against import Against
from saap_jax.report.kinds.variants import DOMAINS, difference_cell, figure_of, protocol
from saap_jax.report.page.blocks import Cell, Line, Table
from saap_jax.report.page.formats import BEST, TIED, format_percent
from saap_jax.runs.records import RunRecord
from saap_jax.runs.standing import DENSE, ComparisonRow, Variant, first_metric, metrics, untested
from saap_jax.runtime.words import plural, some

_NAMES = 12
"""Variants that are named."""


def compared_facts(run: RunRecord, rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """Return what was compared: model, ratios, variants, texts, and by which windows."""
    model, found = run.get("model", {}), [row for row in rows if row.candidate != DENSE]
    labels = list(dict.fromkeys(row.label for row in found))
    ratios = ", ".join(f"{100 * asked:g}" for asked in dict.fromkeys(row.asked for row in found))
    parameters = f", {model['parameters']:,} parameters" if "parameters" in model else ""
    measured = [sentence.removeprefix("protocol: ") for sentence in protocol(run)]
    facts = {
        "model": f"{model.get('name', '')}{parameters}".removeprefix(", "),
        "removed": f"{ratios} % of the prunable parameters",
        plural(len(labels), "variant").partition(" ")[2] + " compared": f"{len(labels):,}: {some(labels, _NAMES)}",
        "texts": "; ".join(f"{metric['name']} ({DOMAINS[metric['domain']]})" for metric in metrics(run)),
        "protocol": " ".join(measured),
    }
    return {name: value for name, value in facts.items() if value}


def winner_table(
    run: RunRecord, variants: Sequence[Variant], rows: Sequence[ComparisonRow], against: Sequence[Against]
) -> Table:
    """Return the best of each ratio or what is tied, beside the dense model and the next; no line without a figure.

    Args:
        variants: the records of variants over their seeds, see `merged`.
        rows: the same as rows, best first within a ratio.
        against: the same beside the best of each ratio.
    """
    domain = "out" if first_metric(run, "out") else "in"
    metric, scale = first_metric(run, domain) or "", figure_of(run)
    above = differences_from_dense(run, variants, metric, {row.candidate for row in rows if row.best})
    lines = []
    for asked in dict.fromkeys(row.asked for row in rows if row.best):
        group = [row for row in rows if row.asked == asked]
        best, *level = [row for row in group if row.best]
        tied = [row.label for row in (*level, *group) if row.tied or row in level]
        name = f"{best.label} {TIED} {some(list(dict.fromkeys(tied)))}" if tied else f"{best.label} {BEST}"
        figure = getattr(best, f"ppl_{domain}")
        nexts = [one for one in against if (one.asked, one.metric) == (best.asked, metric)]
        later = min(nexts, key=lambda one: (math.isnan(one.difference.value), one.difference.value), default=None)
        cells = [
            Cell(f"{format_percent(best.asked).removesuffix('.0')} %: {name}", best.asked),
            Cell(format_figure(figure, scale), figure),
            difference_cell(above.get(best.candidate)),
            difference_cell(later.difference if later else None),
        ]
        lines.append(Line(cells))
    header = ["removed: lowest", f"{scale.short} {domain}", "above dense, %", "next above it, %"]
    return Table(f"Lowest {scale.noun} {DOMAINS[domain]}", header, lines, notes=_notes(run, rows, domain))


def _notes(run: RunRecord, rows: Sequence[ComparisonRow], domain: str) -> list[str]:
    """Say what the marks and the intervals are."""
    noun = figure_of(run).noun
    dense = next((getattr(row, f"ppl_{domain}") for row in rows if row.candidate == DENSE), math.nan)
    said = f"{BEST} lowest {noun} {DOMAINS[domain]}; {TIED} who cannot be told apart from it"
    said += " by the race" if run.get("race") else ""
    said += f"; dense: {format_figure(dense, figure_of(run))}" if math.isfinite(dense) else ""
    why = untested(rows)
    over = "windows and seeds" if max((row.seeds for row in rows), default=1) > 1 else "windows"
    return [said, f"nothing is tested: {why}" if why else f"brackets: 95 % intervals, paired bootstrap over {over}"]


def differences_from_dense(
    run: RunRecord, variants: Sequence[Variant], metric: str, wanted: set[str]
) -> dict[str, Difference]:
    """Return how far the wanted candidates are above the unpruned model on a text, by candidate.

    Those without losses of all windows of the unpruned model are left out. Windows and seeds are drawn as for the
    comparison of variants; all seeds have the same unpruned model.
    """
    dense = np.asarray(run.get(DENSE, {}).get("losses", {}).get(metric, ()), np.float64)
    groups: dict[int, dict[str, np.ndarray]] = {}
    for variant in variants:
        losses = np.asarray(variant["losses_by_seed"].get(metric, ()), np.float64)
        if variant["candidate"] in wanted and losses.ndim == 2 and dense.size and losses.shape[1:] == dense.shape:
            groups.setdefault(len(losses), {})[variant["candidate"]] = losses
    found: dict[str, Difference] = {}
    for seeds, group in groups.items():
        base = np.tile(dense, (seeds, 1))
        found |= zip(
            group, differences_against(base, np.stack(list(group.values())), scale=scale_of(metric)), strict=True
        )
    return found


def interval_ends(
    run: RunRecord, variants: Sequence[Variant], metric: str, labels: Sequence[str]
) -> dict[str, list[tuple[float, float, float]]]:
    """Return (actual ratio, low, high) of the points of each curve: the unpruned model's figure and the difference."""
    scale = scale_of(metric)
    dense = scale.loss(run.get(DENSE, {}).get("ppl", {}).get(metric, math.nan))
    wanted = {variant["candidate"]: variant for variant in variants if variant["label"] in labels}
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, difference in differences_from_dense(run, variants, metric, set(wanted)).items():
        low, high = (scale.value(dense + end) for end in (difference.low, difference.high))
        if not (math.isnan(low) or math.isnan(high)):
            ratio = wanted[name].get("ratio_actual", wanted[name].get("ratio_asked", math.nan))
            found.setdefault(wanted[name]["label"], []).append((float(ratio), low, high))
    return found
