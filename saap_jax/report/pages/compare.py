"""A comparison: who is best at each ratio, by how much and how surely, what is kept where, what the cut saves."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax import records
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import Scale, format_figure
from saap_jax.records import RunRecord
from saap_jax.report.blocks import Block, Column, Figure, Row, Section, Table, facts, said, section, text_table
from saap_jax.report.figures import MOST, Curve, is_baseline, learning_figure, ratio_figure, share_figure
from saap_jax.report.formats import (
    BEST,
    ESTIMATED,
    TIED,
    VERDICT,
    format_count,
    format_difference,
    format_mebibytes,
    format_millions,
    format_percent,
    format_relative,
    format_spread,
    format_times,
    marked,
)
from saap_jax.report.pages.common import (
    DOMAINS,
    closing_sections,
    figure_of,
    metric_columns,
    share_evaluated,
    structure_sentences,
    suggestions_section,
)
from saap_jax.runs.standing import (
    DENSE,
    ComparisonRow,
    Variant,
    comparison_rows,
    differences_from_dense,
    first_metric,
    leading,
    merged,
    metrics,
    number,
    primary_domain,
    untested,
)
from saap_jax.runtime.words import plural, signed, some
from saap_jax.wings import wing


def compare_sections(run: RunRecord, candidates: Sequence[records.Row]) -> tuple[list[Section], list[Row]]:
    """Make the sections of a compare run, finished or not, and its rows."""
    variants = merged(candidates)
    rows = comparison_rows(run, candidates)
    table = comparison_table(run, candidates)
    seeds = {candidate.get("seed") for candidate in candidates}
    each_seed = []
    if len(seeds) > 1:
        each_seed = [Section("Each seed", [candidate_table(run, candidates)], folded=True)]
    sections = [
        Section("Summary", [facts(_about(run, rows)), *said(*summary(run, rows))]),
        *_ratio_section(run, variants, rows),
        *suggestions_section(run),
        *section("Comparison", *([table, *each_seed] if rows else [])),
        *_kept_section(run, variants, rows),
        *wing("fusion_section")(run),
        *_divergence_sections(run),
        *section("The cut model", *cut_tables(run)),
        *closing_sections(run),
    ]
    return sections, list(table.rows)


# --- rows --------------------------------------------------------------------------------------------


def comparison_table(run: RunRecord, candidates: Sequence[records.Row]) -> Table:
    """Set every variant beside the dense model and the best of its ratio, with the intervals of its difference."""
    rows = comparison_rows(run, candidates)
    scale = figure_of(run)
    names = {domain: name for domain in DOMAINS if (name := first_metric(run, domain))}
    compared = [domain for domain, name in names.items() if any(name in row.against for row in rows)]

    def figure(value: float, spread: float, raced: int) -> str:
        return ESTIMATED * bool(raced) + format_spread(value, spread, scale)

    columns = [
        Column("variant", ("variant", "best", "tied", "candidate", "seeds"), marked, True),
        *(Column(f"{scale.short} {each}", (f"ppl_{each}", f"spread_{each}", "raced"), figure) for each in names),
        Column("asked %", ("ratio_asked",), format_percent),
        Column("actual %", ("ratio_actual",), format_percent),
        Column("params (M)", ("parameters",), format_millions),
        *([Column("windows", ("windows",), format_count)] if run.get("race") else []),
        *(Column(f"Δ {each} %", (f"change_{each}", f"low_{each}", f"high_{each}"), format_difference, wide=True,
                 note=f"Δ: how far the {scale.noun} is above that of the best of its ratio")
          for each in compared),
    ]  # fmt: skip
    every = {race["ratio"]: race["budget"] for race in run.get("race", [])}
    found = []
    for row in rows:
        dense = row.candidate == DENSE
        one = {"candidate": row.candidate, "variant": row.label, "seeds": row.seeds, "best": row.best, "tied": row.tied,
               "mark": "best" if row.best else DENSE if dense else "", "ratio_asked": None if dense else row.asked,
               "ratio_actual": row.actual, "parameters": row.parameters, "raced": row.raced,
               "windows": row.raced or every.get(row.asked)}  # fmt: skip
        for domain in DOMAINS:
            one |= {f"{name}_{domain}": getattr(row, f"{name}_{domain}") for name in ("ppl", "spread")}
            if other := row.against.get(names.get(domain, "")):
                fields = (f"change_{domain}", f"low_{domain}", f"high_{domain}")
                one |= zip(fields, other.percent, strict=True)
        found.append(one)
    headline = ", ".join(f"{domain} = {name}" for domain, name in names.items())
    return Table(headline, columns, found, _legend(run, rows, compared), file="comparison")


def candidate_table(run: RunRecord, candidates: Sequence[records.Row], file: str = "") -> Table:
    """List dense model and candidates, a row a seed, with every metric."""
    columns = [
        Column("candidate", ("candidate",), words=True),
        Column("variant", ("variant",), words=True),
        Column("seed", ("seed",)),
        Column("asked %", ("ratio_asked",), format_percent),
        Column("actual %", ("ratio_actual",), format_percent),
        Column("params (M)", ("parameters",), format_millions),
        *metric_columns(run),
    ]
    found: list[Any] = sorted(candidates, key=lambda record: (number(record.get("ratio_asked")), record["candidate"]))
    if DENSE in run:
        found.insert(0, {"candidate": DENSE, "ratio_asked": 0.0, "ratio_actual": 0.0, **run[DENSE]})
    rows = [{"variant": DENSE, **record, **record.get("ppl", {})} for record in found]
    return Table("All candidates", columns, rows, file=file)


# --- words -------------------------------------------------------------------------------------------


def _about(run: RunRecord, rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """Say what was compared: model, ratios, variants, texts, and by which windows."""
    model = run.get("model", {})
    found = [row for row in rows if row.candidate != DENSE]
    names = list(dict.fromkeys(row.label for row in found))
    ratios = ", ".join(f"{100 * asked:g}" for asked in dict.fromkeys(row.asked for row in found))
    if "parameters" in model:
        parameters = f", {model['parameters']:,} parameters"
    else:
        parameters = ""
    return {
        "model": f"{model.get('name', '')}{parameters}".removeprefix(", "),
        "removed": f"{ratios} % of the prunable parameters" if found else "",
        "variants": f"{len(names):,}: {some(names, 12)}" if found else "",
        "texts": "; ".join(f"{metric['name']} ({DOMAINS[metric['domain']]})" for metric in metrics(run)),
        "protocol": " ".join(sentence.removeprefix("protocol: ") for sentence in _protocol(run)),
    }


def summary(run: RunRecord, lines: Sequence[ComparisonRow]) -> list[str]:
    """Say in words what the run found: the lowest perplexity of each ratio, who ties with it, what the cut model saves.

    A variant is called best only where all others were tested and can be told apart from it.
    """
    rows = [row for row in lines if row.candidate != DENSE]
    dense = next((row for row in lines if row.candidate == DENSE), None)
    sentences = structure_sentences(run) + ([] if rows else ["No candidate is finished yet."])
    domain = primary_domain(run)
    for ratio in dict.fromkeys(row.asked for row in rows):
        group = [row for row in rows if row.asked == ratio]
        why = untested(group) if len(group) > 1 else ""
        lead = _lead(group, domain, getattr(dense, f"ppl_{domain}", math.nan), figure_of(run))
        sentences.append(f"At {100 * ratio:g} % asked, {lead}" + (f" Nothing is tested: {why}." if why else ""))
    if best := run.get("best", {}):
        changes = ", ".join("{} {} to {} ({})".format(*row) for row in _cut_rows(run)[:2])
        sentences.append(f"The cut model ({best.get('candidate', 'unnamed')}) goes from dense to cut: {changes}.")
    return sentences


def _lead(group: Sequence[ComparisonRow], domain: str, dense: float, scale: Scale) -> str:
    """Say which row of a ratio has the lowest figure, and how it stands to the others and to the dense model."""
    figures = {row.label: ppl for row in group if math.isfinite(ppl := getattr(row, f"ppl_{domain}"))}
    if not figures:
        return f"no variant has a finite {scale.noun} {DOMAINS[domain]}."
    known = [row for row in group if row.label in figures]
    first, *others = sorted(known, key=lambda row: (row.raced > 0, figures[row.label], row.label))
    value = format_figure(figures[first.label], scale)
    if math.isfinite(dense):
        value += f" (dense {format_figure(dense, scale)})"
    if others and all(row.against and not (row.tied or row.best) for row in others) and not untested(group):
        lead = f"{first.named} is best {DOMAINS[domain]} with {scale.noun} {value}"
    else:
        lead = f"{first.named} has the lowest {scale.noun} {DOMAINS[domain]}, {value}"
    if any(row.tied for row in others):
        tied = [row.named for row in others if row.tied or row.best]
        return f"{lead}, and {plural(len(tied), 'other')} cannot be told apart from it: {some(tied)}."
    if others:
        second = others[0]
        most = figures[others[0].label]
        gap = 0.0
        if most:
            gap = 100 * (most - figures[first.label]) / abs(most)
        if gap >= 0.05:
            lead += f", {gap:,.1f} % below {second.named}"
        else:
            lead += f", level with {second.named}"
    return f"{lead}."


def _legend(run: RunRecord, rows: Sequence[ComparisonRow], compared: Sequence[str]) -> list[str]:
    """Say what the marks and columns mean, of what the verdicts are, and by what protocol the numbers."""
    race = run.get("race", [])
    noun = figure_of(run).noun
    seeds = max((row.seeds for row in rows), default=1)
    lines = [f"{BEST} lowest {noun} {DOMAINS[primary_domain(run)]} at its ratio"]
    if any(row.tied for row in rows):
        lines[0] += f"   {TIED} cannot be told apart from it: the interval of the difference holds 0"
    if compared:
        lines.append(f"{VERDICT}{_units(run)}")
        of = "these pruned models on such text, not of methods on other calibration text"
        if seeds > 1:
            of = f"methods over these {seeds} seeds: no interval is narrower than Student's of the seeds"
        lines.append(f"{share_evaluated(*race)}verdicts are of {of}")
    if any(row.raced for row in rows):
        lines.append(f"{ESTIMATED} from the windows by which it was surely worse than another, beside the dense model")
    if any(row.windows for row in rows) and (why := untested(rows)):
        lines.append(f"which others are as good is not tested: {why}")
    return [*lines, *[f"mean ± standard deviation over {seeds} seeds"] * (seeds > 1), *_protocol(run)]


def _units(run: RunRecord) -> str:
    """Say how many articles are the units of intervals, where they are."""
    many = [f"{len({*each})} {DOMAINS[metric['domain']]}" for metric in metrics(run)
            if len({*(each := run.get("articles", {}).get(metric["name"], []))}) >= FEWEST]  # fmt: skip
    if many:
        return f"; units are articles: {', '.join(many)}"
    return ""


def _protocol(run: RunRecord) -> list[str]:
    """Say by what the figures were measured, without which they compare with none of another table; as far as known."""
    config = run.get("config", {})
    model = run.get("model", {})
    evaluation = config.get("evaluation", {})
    calibration = config.get("calibration", {})
    losses = run.get("dense", {}).get("losses", {})
    if not (evaluation and calibration and losses and "prunable_parameters" in model):
        return []
    windows = " and ".join(f"{count:,}" for count in sorted({len(values) for values in losses.values()}))
    texts = calibration.get("scenarios", ())
    text = "each of " * (len(texts) > 1) + ", ".join(texts) or "all sets"
    seeds = run.get("seeds", {}).get("calibration", ())
    traced = "structures" in run
    kind = "examples" if traced else "windows"
    size, drawn = ("" if traced else _size(part, model) for part in (evaluation, calibration))
    drawn = f"{calibration.get('examples') or 'all'} {kind}{drawn}"
    named = ""
    if seeds:
        named = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
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


# --- figures -----------------------------------------------------------------------------------------


def _ratio_section(run: RunRecord, variants: Sequence[Variant], rows: Sequence[ComparisonRow]) -> list[Section]:
    """Draw perplexity against ratio, a figure a text, with the intervals of the differences from the dense model."""
    order = leading(rows, MOST)
    scale = figure_of(run)
    figures = []
    for place, metric in enumerate(metrics(run)):
        title = f"{metric['name']} ({DOMAINS[metric['domain']]})"
        name = "ratio" if place == 0 else f"ratio-{place + 1}"
        figures.append(ratio_figure(name, title, _ratio_curves(run, variants, metric["name"], order), scale))
    about = "Lower is better. Upright lines: 95 % intervals of the paired difference from the dense model."
    if any(map(is_baseline, order)):
        about += " Baselines are grey."
    more = len({row.label for row in rows if row.candidate != DENSE}) - len(order)
    if more > 0:
        about += f" {plural(more, 'more variant')} in the table."
    return section(f"{scale.noun.capitalize()} against ratio", *figures, about=about)


def _ratio_curves(run: RunRecord, variants: Sequence[Variant], metric: str, order: Sequence[str]) -> list[Curve]:
    """Make the curve of each variant on a metric in an order, from the unpruned model on, with its intervals."""
    scale = figure_of(run)
    dense = number(run.get(DENSE, {}).get("ppl", {}).get(metric))
    differences = differences_from_dense(run, variants, metric)
    base = scale.loss(dense)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    ends: dict[str, list[tuple[float, float, float]]] = {name: [] for name in order}
    for variant in variants:
        value = number(variant.get("ppl", {}).get(metric))
        name = variant["label"]
        ratio = number(variant.get("ratio_actual", variant.get("ratio_asked")))
        if name not in order or math.isnan(value):
            continue
        points[name].append((ratio, value))
        one = differences.get(variant["candidate"])
        if one and not math.isnan(one.low) and not math.isnan(one.high):
            ends[name].append((ratio, scale.value(base + one.low), scale.value(base + one.high)))
    start = [(0.0, dense)] if math.isfinite(dense) else []
    return [Curve(name, start + sorted(points[name]), sorted(ends[name])) for name in order if points[name]]


def _kept_section(run: RunRecord, variants: Sequence[Variant], rows: Sequence[ComparisonRow]) -> list[Section]:
    """Draw what the variants of each ratio keep, layer by layer; where that is the same of several, say so instead."""
    named = {variant["candidate"]: variant for variant in variants}
    blocks: list[Block | None] = []
    for asked in dict.fromkeys(row.asked for row in rows if row.candidate in named):
        chosen = [named[row.candidate] for row in rows if row.candidate in named and row.asked == asked]
        title = f"{100 * asked:g} % asked"
        alike = {json.dumps(each.get("kept"), sort_keys=True) for each in chosen}
        if len(chosen) > 1 and len(alike) == 1 and chosen[0].get("kept"):
            blocks += said(f"At {title}, all {len(chosen)} variants keep equally many units of each layer.")
        else:
            blocks.append(kept_figure(run, chosen[:MOST], f"kept-{100 * asked:g}", title))
    about = "Share of the units that stays: dark is 0, bright is all of them. Best variant first."
    return section("What is kept where", *blocks, about=about * any(isinstance(block, Figure) for block in blocks))


def kept_figure(run: RunRecord, candidates: Sequence[records.Row], name: str, title: str) -> Figure | None:
    """Draw the share of units that each candidate keeps in each layer; of a traced model, of each structure.

    Candidates that keep equally many everywhere are one line. A structure that all keep whole is named in the title.
    None where there is nothing to draw.
    """
    units = {each: total for each, total in run.get("model", {}).get("units", {}).items() if total}
    alike: dict[str, tuple[list[str], dict[str, list[int | float]]]] = {}
    for candidate in candidates:
        if kept := {each: counts for each, counts in candidate.get("kept", {}).items() if each in units and counts}:
            alike.setdefault(json.dumps(kept, sort_keys=True), ([], kept))[0].append(candidate["variant"])
    rows = {some(names, 1): kept for names, kept in alike.values()}
    if not rows:
        return None
    if "structures" in run:
        shares = [[kept[each][0] / units[each] if each in kept else math.nan for each in units]
                  for kept in rows.values()]  # fmt: skip
        panels = {"kept, by structure": np.array(shares)}
        across = ", ".join(units)
        return share_figure(name, title, panels, [*rows], "units kept", across)
    panels = {}
    for each, total in units.items():
        layers = max(len(kept.get(each, ())) for kept in rows.values())
        cells = [[*kept.get(each, ()), *[math.nan] * (layers - len(kept.get(each, ())))] for kept in rows.values()]
        if layers and np.nanmin(cells) < total:
            panels[f"{each} kept, by layer"] = np.array(cells, np.float64) / total
        elif layers:
            title += f", all units of {each} stay"
    if panels:
        return share_figure(name, title, panels, [*rows], "units kept")
    return None


def _divergence_sections(run: RunRecord) -> list[Section]:
    """Show what was chosen by the divergence from the unpruned model, and brought or cost what; else nothing."""
    sections = []
    if found := run.get("divergences", {}):
        about = (
            "Which units stay was trained or evolved under the exact budget, with all weights as they are, towards "
            "what the unpruned model predicts. Calibration text that was held out from it says which round counts."
        )
        lines = [
            [name, f"{values[0]:.4f}", f"{min(values):.4f}", f"{values.index(min(values))} of {len(values) - 1}"]
            for name, values in found.items()
        ]
        curves = {name: [*enumerate(values)] for name, values in found.items()}
        labelled = ("round over the calibration text", "KL, nats a token, held out")
        figure = learning_figure("divergence", "Divergence by round", curves, *labelled)
        header = ["candidate", "KL before (nats a token)", "at best", "in round"]
        table = text_table("Divergence before and after", header, lines)
        sections += section("How units were chosen by divergence", figure, table, about=about)
    if found := run.get("prices", {}):
        about = (
            "All layers that stay are alike, as plain models have it: how many layers, heads and channels was searched "
            "by the divergence from the unpruned model. Beside it, on the same held-out calibration text, what the "
            "search chose where each layer is free, of as many parameters."
        )
        lines = [
            [name, f"{free:.4f}", f"{alike:.4f}", f"{signed(100 * math.expm1(alike - free), 1)} %"]
            for name, (free, alike) in found.items()
        ]
        header = ["candidate", "KL, free layers (nats a token)", "layers alike", "perplexity for that"]
        sections += section("The price of layers that are alike", text_table("", header, lines), about=about)
    return sections


# --- the cut model -----------------------------------------------------------------------------------


def cut_tables(run: RunRecord) -> list[Block]:
    """Set the cut model beside the dense one, property by property, with what else was recorded; else nothing."""
    if not (best := run.get("best", {})):
        return []
    notes = []
    if "segments" in best:
        notes.append(f"Compiled as {plural(best['segments'], 'segment')} of neighbouring equal layers.")
    masked = best.get("ppl_masked", {})
    gaps = [abs(ppl - masked[name]) / max(abs(masked[name]), 1e-6) for name, ppl in best.get("ppl", {}).items()
            if name in masked]  # fmt: skip
    if gaps:
        noun = figure_of(run).noun.capitalize()
        notes.append(f"{noun} with masks instead of cuts differs by at most {max(gaps):.1e} (relative).")
    title = f"cut model: {best.get('candidate', 'none')}"
    return [text_table(title, ["", "dense", "cut", "change"], _cut_rows(run), notes=notes)]


def _cut_rows(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """List property, dense, cut and change; properties that were not recorded are left out."""
    best = run.get("best", {})
    dense = run.get("dense", {})
    scale = figure_of(run)
    times = []
    if "turns" in best:
        times = [("forward pass (ms)", *format_times(*best["turns"]))]
    pairs: list[tuple[str, float, float, Any]] = [
        ("parameters (M)", number(dense.get("parameters")), number(best.get("parameters")), format_millions),
        ("weights in memory (MiB)", number(best.get("dense_bytes")), number(best.get("bytes")), format_mebibytes),
    ]
    for metric in metrics(run):
        before, after = (number(record.get("ppl", {}).get(metric["name"])) for record in (dense, best))
        label = f"{metric['name']} ({metric['domain']})"
        pairs.append((label, before, after, lambda value: format_figure(value, scale)))
    rows = [
        (label, form(before), form(after), format_relative(before, after))
        for label, before, after, form in pairs
        if not math.isnan(after)
    ]
    return [*rows[:2], *times, *rows[2:]]
