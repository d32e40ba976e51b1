"""What a comparison found: the variants as a table and in words, and the cut model beside the dense one."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saap_jax.evaluation.differences import Difference
from saap_jax.evaluation.resample import LEVEL
from saap_jax.evaluation.scales import Scale, format_figure, scale_of
from saap_jax.report.kinds.against import Against, format_difference, format_interval
from saap_jax.report.page.blocks import Cell, Data, Line, Table, text_table
from saap_jax.report.page.csv_text import data_text
from saap_jax.report.page.formats import (
    BEST,
    TIED,
    format_change,
    format_count,
    format_mebibytes,
    format_millions,
    format_milliseconds,
    format_p,
    format_percent,
    format_spread,
)
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, ComparisonRow, cut_of, first_metric, metrics, number, untested
from saap_jax.runtime.words import plural, some

DOMAINS = {"in": "in domain", "out": "out of domain"}
ESTIMATED = "~"
"""Before a figure that is not of all windows."""


# --- tables ----------------------------------------------------------------------------------------


def headline(run: RunRecord) -> str:
    """Say which metrics the columns in and out stand for.

    >>> headline({"metrics": [{"name": "ppl@128 a", "domain": "in"}, {"name": "ppl@128 b", "domain": "out"}]})
    'ppl@128: in = a, out = b'
    """
    names = {domain: name for domain in ("in", "out") if (name := first_metric(run, domain))}
    kinds = {name.partition(" ")[0] for name in names.values()}
    prefix = ""
    if len(kinds) == 1 and all(" " in name for name in names.values()):
        names = {domain: name.partition(" ")[2] for domain, name in names.items()}
        prefix = f"{kinds.pop()}: "
    return prefix + ", ".join(f"{domain} = {name}" for domain, name in names.items())


def figure_of(run: RunRecord) -> Scale:
    """Return what the figures of a run are: perplexities, or mean losses."""
    return scale_of(next((metric["name"] for metric in metrics(run)), ""))


def variant_table(run: RunRecord, rows: Sequence[ComparisonRow], against: Sequence[Against] = ()) -> Table:
    """Return every variant beside the dense model, and as far as `against` goes, beside the best of its ratio."""
    shown = [domain for domain in ("in", "out") if first_metric(run, domain)]
    compared = [domain for domain in ("in", "out") if any(one.domain == domain for one in against)]
    scale = figure_of(run)
    by_row = {(one.candidate, one.domain): one for one in reversed(against)}  # the first text of a domain counts
    raced = {(race["ratio"], label): count for race in run.get("race", []) for label, count in race["windows"].items()}
    header = ["variant", *(f"{scale.short} {domain}" for domain in shown), "asked %", "actual %", "params (M)"]
    header += ["windows"] * bool(raced)
    header += [f"Δ {domain} %" for domain in compared] + (["wins %", "p"] if compared else [])
    lines = []
    for row in rows:
        mine = [by_row.get((row.candidate, domain)) for domain in compared]
        cells = [
            Cell(f"{row.label} {BEST if row.best else TIED}" if row.best or row.tied else row.label),
            *(_figure_cell(row, domain, scale) for domain in shown),
            Cell("-" if row.candidate == DENSE else format_percent(row.asked), 100 * row.asked),
            Cell(format_percent(row.actual), row.actual),
            Cell(format_millions(row.parameters)),
            *([_count_cell(raced.get((row.asked, row.label)))] if raced else []),
            *(difference_cell(one.difference if one else None) for one in mine),
            *(_win_cells(mine[-1]) if mine else ()),
        ]
        lines.append(Line(cells, "best" if row.best else "dense" if row.candidate == DENSE else ""))
    return Table(headline(run), header, lines, sortable=True, notes=legend(run, rows))


def legend(run: RunRecord, rows: Sequence[ComparisonRow]) -> list[str]:
    """Say what the marks mean, and over how many seeds the numbers are."""
    said = [f"{BEST} lowest {figure_of(run).noun} {DOMAINS['out' if first_metric(run, 'out') else 'in']} at its ratio"]
    how = "a race: t-tests valid at any time, Bonferroni" if "race" in run else "paired bootstrap, Holm"
    if any(row.tied for row in rows):
        said[0] += f"   {TIED} cannot be told apart from it ({how}, {100 * LEVEL:g} %)"
    if any(row.raced for row in rows):
        said.append(
            f"{ESTIMATED} from the windows that it took to be surely worse, by how far it is from the dense model"
        )
    said += [race_words(run)] if run.get("race") else []
    if any(row.windows for row in rows) and (why := untested(rows)):
        said.append(f"which others are as good is not tested: {why}")
    seeds = max((row.seeds for row in rows), default=1)
    said += [f"mean ± standard deviation over {seeds} seeds"] * (seeds > 1)
    return [*said, *protocol(run)]


def protocol(run: RunRecord) -> list[str]:
    """Say by what the figures were measured, without which they compare with none of another table; as far as known."""
    config, model = run.get("config", {}), run.get("model", {})
    evaluation, calibration = config.get("evaluation", {}), config.get("calibration", {})
    losses = run.get("dense", {}).get("losses", {})
    if not (evaluation and calibration and losses and "prunable_parameters" in model):
        return []
    counts = {len(values) for values in losses.values()}
    windows = " and ".join(f"{count:,}" for count in sorted(counts))
    text = ", ".join(calibration.get("scenarios", ())) or "all sets"
    seeds = run.get("seeds", {}).get("calibration", ())
    traced = "structures" in run
    kind = "examples" if traced else "windows"
    size, drawn = ("" if traced else _size(part, model) for part in (evaluation, calibration))
    drawn = f"{calibration.get('examples') or 'all'} {kind}{drawn}"
    named = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    return [
        f"protocol: {windows} {kind}{size} a text; calibrated on {drawn} of {text}{named}; ratio of "
        f"{model['prunable_parameters']:,} prunable parameters"
    ]


def _size(text: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Say how long the windows of a text are, and whether each begins with a token of its own.

    >>> [_size({"length": 128, "bos": bos}, {"begins": True}) for bos in ("auto", "never")]
    [' of 128 tokens, the first of which is the beginning of text,', ' of 128 tokens']
    """
    begins = text.get("bos") == "always" or (text.get("bos") == "auto" and model.get("begins"))
    return f" of {text.get('length')} tokens" + ", the first of which is the beginning of text," * bool(begins)


def candidate_data(run: RunRecord, candidates: Sequence[Row], filename: str = "comparison.csv") -> Data:
    """Return dense model and candidates, one line a seed: every metric, fractions, full precision."""
    names = [metric["name"] for metric in metrics(run)]
    keys = ["candidate", "variant", "seed", "estimator", "allocation", "ratio_asked", "ratio_actual", "parameters"]
    records = sorted(candidates, key=lambda record: (number(record.get("ratio_asked")), record["candidate"]))
    if "dense" in run:
        records = [{"candidate": DENSE, "ratio_asked": 0.0, "ratio_actual": 0.0, **run["dense"]}, *records]
    rows = [[*map(record.get, keys), *map(record.get("ppl", {}).get, names)] for record in records]
    return Data("CSV of all candidates, full precision", filename, [*keys, *names], rows)


def csv_table(run: RunRecord, candidates: Sequence[Row]) -> str:
    """Return dense model and candidates as CSV, see `candidate_data`."""
    return data_text(candidate_data(run, candidates))


def race_words(run: RunRecord) -> str:
    """Say what a race saved, and what its verdict is of."""
    races = run.get("race", [])
    evaluated, all_of_them = (sum(numbers) for numbers in zip(
        *((race.get("evaluated", 0), race.get("keep_sets", 0) * race.get("budget", 0)) for race in races), strict=True
    ))  # fmt: skip
    seeds = len(run.get("seeds", {}).get("calibration", ()))
    whose = f"the means over these {seeds} calibration seeds" if seeds > 1 else "these keep-sets"
    share = f"{100 * evaluated / all_of_them:.0f} % of the windows were evaluated; " if all_of_them else ""
    return f"{share}the verdict is of {whose} on such text, not of estimators on other calibration text"


def _figure_cell(row: ComparisonRow, domain: str, scale: Scale) -> Cell:
    value, spread = (getattr(row, f"{name}_{domain}") for name in ("ppl", "spread"))
    return Cell(ESTIMATED * bool(row.raced) + format_spread(value, spread, scale), value)


def _count_cell(count: int | None) -> Cell:
    return Cell("-", math.nan) if count is None else Cell(f"{count:,}", count)


def difference_cell(difference: Difference | None) -> Cell:
    """Return a difference in percent with its interval, a dash where there is none."""
    if difference is None:
        return Cell("-", math.nan)
    interval = format_interval(difference)
    return Cell(format_difference(difference) + (f" {interval}" if interval else ""), difference.value)


def _win_cells(one: Against | None) -> list[Cell]:
    if one is None:
        return [Cell("-", math.nan)] * 2
    return [Cell(f"{100 * one.difference.win_rate:.0f}"), Cell(format_p(one.p_value, floor=one.floor), one.p_value)]


# --- words -----------------------------------------------------------------------------------------


def summary(run: RunRecord, lines: Sequence[ComparisonRow], against: Sequence[Against] = ()) -> list[str]:
    """Say in words what the run found: the lowest perplexity of each ratio, who ties with it, what the cut model saves.

    A variant is called best only where all others were tested and can be told apart from it.

    Args:
        lines: the rows of the comparison.
        against: the same beside the best of each ratio, of every text.
    """
    rows = [row for row in lines if row.candidate != DENSE]
    dense = next((row for row in lines if row.candidate == DENSE), None)
    sentences = structure_sentences(run) + ([] if rows else ["No candidate is finished yet."])
    domains = [domain for domain in ("out", "in") if first_metric(run, domain)]
    for ratio in dict.fromkeys(row.asked for row in rows):
        group = [row for row in rows if row.asked == ratio]
        said = []
        for place, domain in enumerate(domains):
            tested = {row.label: row.p_value for row in group}
            if place:  # the other text, on which all are compared with the best of the first
                tested = {one.label: one.p_value for one in against if (one.asked, one.domain) == (ratio, domain)}
            said.append(_lead(group, domain, getattr(dense, f"ppl_{domain}", math.nan), tested, figure_of(run)))
        why = untested(group) if len(group) > 1 else ""
        sentences.append(
            f"At {100 * ratio:g} % asked, {'; '.join(said)}.{f' Nothing is tested: {why}.' if why else ''}"
        )
    if best := cut_of(run):
        changes = [f"{row.label} {row.dense} to {row.cut} ({row.change})" for row in cut_rows(run)[:3]]
        sentences.append(
            f"The cut model ({best.get('candidate', 'unnamed')}) goes from dense to cut: {', '.join(changes)}."
        )
    return sentences


def structure_sentences(run: RunRecord) -> list[str]:
    """Say what of a traced model can be pruned."""
    if "structures" not in run:
        return []
    structures, model = run["structures"], run["model"]
    held = f"{model['prunable_parameters']:,} of {model['parameters']:,} parameters"
    copied = ", ".join(structure["name"] for structure in structures if structure["copied"])
    lines = [f"{plural(len(structures), 'structure')} with {held} can be pruned."]
    if copied:
        lines.append(f"Each copy (layer, expert) of a structure keeps as many units as the others: {copied}.")
    for method, reasons in run.get("uncompensated", {}).items():
        alone = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        lines.append(f"Compensation by {method} leaves structures as they are: {alone}.")
    return lines


def _lead(group: Sequence[ComparisonRow], domain: str, dense: float, tested: Mapping[str, float], scale: Scale) -> str:
    """Say which row has the lowest figure on a domain, and how it stands to the others and to the dense model.

    `tested` are the p-values of the others against the best of the ratio, adjusted.
    """
    noun, shown = scale.noun, functools.partial(format_figure, scale=scale)
    known = [row for row in group if math.isfinite(getattr(row, f"ppl_{domain}"))]  # NaN has no place in an order
    ordered = sorted(known, key=lambda row: (row.raced > 0, getattr(row, f"ppl_{domain}"), row.label))
    finite = [(getattr(row, f"ppl_{domain}"), row.label, row.best) for row in ordered]
    if not finite:
        return f"no variant has a finite {noun} {DOMAINS[domain]}"
    (ppl, label, best), *others = finite
    known = f" (dense {shown(dense)})" if math.isfinite(dense) else ""
    p_values = [(name, tested.get(name, math.nan)) for _, name, _ in others]
    tied = [name for name, p in p_values if p >= LEVEL]
    lowest = f"{label} has the lowest {noun} {DOMAINS[domain]}, {shown(ppl)}{known}"
    if not others:
        return f"{label} has a {noun} of {shown(ppl)} {DOMAINS[domain]}{known}"
    if best and tied:
        return f"{lowest}, and {plural(len(tied), 'other')} cannot be told apart from it: {some(tied)}"
    if best and all(p < LEVEL for _, p in p_values):
        lowest = f"{label} is best {DOMAINS[domain]} with {noun} {shown(ppl)}{known}"
    second, name, _ = others[0]
    gap = 100 * (second - ppl) / abs(second) if second else math.inf
    return f"{lowest}, level with {name}" if gap < 0.05 else f"{lowest}, {gap:,.1f} % below {name} ({shown(second)})"


# --- the cut model ---------------------------------------------------------------------------------


class CutRow(NamedTuple):
    """One property of the cut model beside the dense one, formatted."""

    label: str
    dense: str
    cut: str
    change: str


def cut_rows(run: RunRecord) -> list[CutRow]:
    """Return the cut model of a run (`best`) beside the dense one, property by property; empty if there is none.

    Properties that were not recorded are left out. Tokens a second need `forward_tokens`, the tokens of one timed
    forward pass.
    """
    if not (best := cut_of(run)):
        return []
    dense = run.get("dense", {})
    tokens = number(best.get("forward_tokens"))
    seconds = tuple(number(best.get(key)) for key in ("dense_forward_seconds", "forward_seconds"))
    pairs = [
        ("parameters (M)", number(dense.get("parameters")), number(best.get("parameters")), format_millions),
        ("weights (MiB)", number(best.get("dense_bytes")), number(best.get("bytes")), format_mebibytes),
        ("forward pass (ms)", *seconds, format_milliseconds),
        ("tokens a second", *(tokens / each if each else math.nan for each in seconds), format_count),
    ]
    shown = functools.partial(format_figure, scale=figure_of(run))
    for metric in metrics(run):
        before, after = (record.get("ppl", {}).get(metric["name"]) for record in (dense, best))
        pairs.append((f"{metric['name']} ({metric['domain']})", number(before), number(after), shown))
    return [
        CutRow(label, form(before), form(after), format_change(before, after))
        for label, before, after, form in pairs
        if not math.isnan(after)
    ]


def cut_table(run: RunRecord) -> Table:
    """Return the cut model beside the dense one, and what else was recorded about it."""
    best, notes = cut_of(run), []
    if "segments" in best:
        notes.append(f"Compiled as {plural(best['segments'], 'segment')} of neighbouring equal layers.")
    masked = best.get("ppl_masked", {})
    gaps = [abs(best["ppl"][name] / value - 1) for name, value in masked.items() if name in best.get("ppl", {})]
    if gaps:
        noun = figure_of(run).noun.capitalize()
        notes.append(f"{noun} with masks instead of cuts differs by at most {max(gaps):.1e} (relative).")
    title = f"cut model: {best.get('candidate', 'none')}"
    return text_table(title, ["", "dense", "cut", "change"], cut_rows(run), notes=notes)
