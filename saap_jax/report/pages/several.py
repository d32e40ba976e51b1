"""Several runs side by side: who is best at each ratio in which run, on one drawing, and where the runs differ."""

import math
from collections.abc import Sequence
from typing import Any

from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.blocks import Block, Column, Row, Section, Table, View, Words, section, text_table
from saap_jax.report.figures import Curve, ratio_figure
from saap_jax.report.formats import TIED, format_percent, format_spread, format_usd
from saap_jax.report.pages.common import DOMAINS, figure_of, seconds_of
from saap_jax.runs.directory import flatten
from saap_jax.runs.standing import DENSE, first_metric, primary_domain
from saap_jax.runtime.files import plain
from saap_jax.runtime.words import plural

_TEXTS = 4
_FIELDS = 12
_LETTERS = 60
"""Drawings, differing fields of the configuration, and letters of a value that are shown at most."""


def overview_sections(views: Sequence[View]) -> list[Section]:
    """Say what the runs have in common and where they differ; nothing for a single run."""
    if len(views) < 2:
        return []
    curves = joint_curves(views)
    figures = [
        ratio_figure(f"runs-ratio-{place}", text, lines, scale_of(text))
        for place, (text, lines) in enumerate([*curves.items()][:_TEXTS], start=1)
    ]
    noun = " or ".join(dict.fromkeys(scale_of(text).noun for text in curves))
    about = (
        "The best variant of each ratio, a line a run, from its unpruned model on; lower is better. Texts that two "
        f"runs share, window for window, at most {_TEXTS}; other runs are not on one drawing."
    )
    drawn = {curve.name for lines in curves.values() for curve in lines}
    if alone := [view.name for view in views if view.rows and view.name not in drawn]:
        about += f" No other run was evaluated on the same as {', '.join(alone)}."
    return [
        Section("Overview", [*_best_blocks(views), _run_table(views)]),
        *section(f"Best {noun} against ratio", *figures, about=about),
        *section("Where the configurations differ", *_differences(views)),
    ]


def evaluated(view: View, domain: str) -> str:
    """Say on what a run was evaluated: text, tokens a window, windows, and where it is on record the text's digest.

    Only what is the same on two runs may be compared between them. Empty where there is no such text.
    """
    metric = first_metric(view.run, domain) if view.rows else None
    if not metric:
        return ""
    losses = view.run.get("dense", {}).get("losses", {})
    windows = len(losses.get(metric) or ()) or view.run.get("config", {}).get("evaluation", {}).get("windows")
    digest = view.run.get("inputs", {}).get(f"evaluation text of {metric!r}", "")
    text = f"{metric}, {plural(windows, 'window')}" if windows else metric
    return f"{text} ({digest[:8]})" if digest else text


def results_table(views: Sequence[View]) -> Table:
    """List the rows of all comparisons, each with its run."""
    rows: list[Row] = []
    for view in views:
        about = {"run": view.name, "kind": view.kind, "model": view.model}
        texts = {f"text_{domain}": first_metric(view.run, domain) for domain in ("in", "out")}
        rows += [{**about, **texts, **row} for row in view.rows]
    fields = dict.fromkeys(field for row in rows for field in row if field != "mark")
    return Table("Results", [Column(field, (field,)) for field in fields], rows)


def _best_blocks(views: Sequence[View]) -> list[Block]:
    """List the best variant of every run and ratio, and say what the columns mean; nothing without any."""
    rows: list[dict[str, Any]] = []
    for view in views:
        domain = primary_domain(view.run)
        dense = next((row[f"ppl_{domain}"] for row in view.rows if row["candidate"] == DENSE), math.nan)
        best = {row["ratio_asked"]: row for row in reversed(view.rows) if row["best"]}
        for asked, row in reversed(best.items()):
            others = [each for each in view.rows if each["ratio_asked"] == asked and each is not row]
            tested = any(not math.isnan(each.get(f"low_{domain}", math.nan)) for each in others)
            ppl = row[f"ppl_{domain}"]
            rows.append({"run": view.name, "variant": row["variant"], "text": evaluated(view, domain),
                         "ratio_asked": asked, "ppl": ppl, "scale": figure_of(view.run),
                         "spread": row[f"spread_{domain}"], "dense": dense,
                         "times": ppl / dense if dense > 0 else None,
                         "ties": sum(each["tied"] or each["best"] for each in others) if tested else None})  # fmt: skip
    if not rows:
        return []
    texts = list(dict.fromkeys(row["text"] for row in rows))
    noun, short = (" or ".join(dict.fromkeys(getattr(row["scale"], of) for row in rows)) for of in ("noun", "short"))
    about = (
        f"The variant of the lowest {noun} of each run and ratio; {TIED}: how many others cannot be told apart from it "
        f"(- where that was not tested). {noun.capitalize()} is of "
    )
    several = "a text of each run's own: compare within a text and its windows alone."

    columns = [
        Column("run", ("run",), words=True),
        Column("lowest", ("variant",), words=True),
        *([Column("text", ("text",), words=True)] if len(texts) > 1 else []),
        Column("asked %", ("ratio_asked",), format_percent),
        Column(short, ("ppl", "spread", "scale"), format_spread),
        Column("dense", ("dense", "scale"), format_figure),
        Column("× dense", ("times",), "{:.3g}".format),
        Column(TIED, ("ties",), "{:,}".format),
    ]
    return [Words(about + (f"{texts[0]}." if len(texts) == 1 else several)), Table("Best variants", columns, rows)]


def _run_table(views: Sequence[View]) -> Table:
    """List the runs: what each was made of, how long it took, what it cost."""
    lines = []
    for view in views:
        rows = [row for row in view.rows if row["candidate"] != DENSE]
        variants = len({row["variant"] for row in rows})
        seeds = max((row["seeds"] for row in rows), default=0)
        seconds = seconds_of(view.run)
        usd = view.run["cost"].get("usd") if "cost" in view.run else None
        text = evaluated(view, primary_domain(view.run))
        words = [view.kind, view.model.rstrip("/").rpartition("/")[2], text, view.status]
        numbers = [f"{variants:,}" if variants else "", f"{seeds:,}" if seeds else ""]
        numbers += ["" if seconds is None else f"{seconds:,.0f}", "" if usd is None else format_usd(usd)]
        lines.append([view.name, *(each or "-" for each in (*words, *numbers))])
    header = ["run", "kind", "model", "text", "status", "variants", "seeds", "seconds", "cost"]
    return text_table("All runs", header, lines, words=5)


def joint_curves(views: Sequence[View]) -> dict[str, list[Curve]]:
    """Make `{text: a curve a run}` of the best variant of each ratio, of the texts that at least two runs share.

    A text is what `evaluated` says: the same source with other windows is another one.
    """
    found: dict[str, list[Curve]] = {}
    for view in views:
        for domain in ("in", "out"):
            text = evaluated(view, domain)
            rows = [r for r in view.rows if r["best"] or r["candidate"] == DENSE]
            points = sorted((row["ratio_actual"], row[f"ppl_{domain}"]) for row in rows)
            points = [(ratio, ppl) for ratio, ppl in points if not math.isnan(ppl)]
            if text and any(ratio > 0 for ratio, _ in points):
                found.setdefault(text, []).append(Curve(view.name, points))
    return {text: lines for text, lines in found.items() if len(lines) > 1}


def _differences(views: Sequence[View]) -> list[Block]:
    """List the fields of the configurations that differ, a line a run; nothing where none differs.

    What was evaluated in fact comes first, since a configuration may ask for more windows than a text has.
    """
    fields = [
        {f"evaluated {DOMAINS[domain]}": text for domain in ("out", "in") if (text := evaluated(view, domain))}
        | {key: value.strip('"') for key, value in flatten(plain(view.run.get("config", {}))).items()}
        for view in views
    ]
    keys = [key for key in dict.fromkeys(key for each in fields for key in each) if key not in ("name", "runs", "")]
    differing = [key for key in keys if len({each.get(key) for each in fields}) > 1]
    differing.sort(key=lambda key: not key.startswith("evaluat"))
    shown = differing[:_FIELDS]
    more = len(differing) - _FIELDS
    lines = []
    for view, each in zip(views, fields, strict=True):
        texts = [each.get(key, "-") for key in shown]
        lines.append([view.name, *(x if len(x) <= _LETTERS else f"{x[: _LETTERS - 1]}…" for x in texts)])
    about = "Fields that are not the same in all runs; - where a run has no such field."
    about += f" {plural(more, 'more field')} differ." if more > 0 else ""
    table = text_table("Differing fields", ["run", *shown], lines, words=len(shown) + 1)
    return [Words(about), table] if differing else []
