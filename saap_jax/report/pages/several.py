"""Several runs side by side: who is best at each ratio in which run, on one drawing, and where the runs differ."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.blocks import Block, Column, Row, Section, Table, View, Words, section, text_table
from saap_jax.report.figures import Curve, ratio_figure
from saap_jax.report.formats import TIED, Number, format_percent, format_spread, format_usd
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
    drawn = {curve.name for curve in itertools.chain.from_iterable(curves.values())}
    alone = [view.name for view in views if view.rows and view.name not in drawn]
    if alone:
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
    metric = first_metric(view.run, domain)
    if not view.rows or not metric:
        return ""
    text = metric
    # the windows on record, since a text may have fewer than were asked for
    losses = view.run.get("dense", {}).get("losses", {})
    windows = len(losses.get(metric) or ()) or view.run.get("config", {}).get("evaluation", {}).get("windows")
    if windows:
        text += f", {plural(windows, 'window')}"
    digest = view.run.get("inputs", {}).get(f"evaluation text of {metric!r}")
    if digest:
        text += f" ({digest[:8]})"
    return text


def results_table(views: Sequence[View]) -> Table:
    """List the rows of all comparisons, each with its run."""
    rows: list[Row] = []
    for view in views:
        about = {"run": view.name, "kind": view.kind, "model": view.model}
        texts = {f"text_{domain}": first_metric(view.run, domain) for domain in ("in", "out")}
        rows += [{**about, **texts, **row} for row in view.rows]
    fields = dict.fromkeys(itertools.chain.from_iterable(rows))
    fields.pop("mark", None)  # the colour of a row
    return Table("Results", [Column(field, (field,)) for field in fields], rows)


def _best_blocks(views: Sequence[View]) -> list[Block]:
    """List the best variant of every run and ratio, and say what the columns mean; nothing without any."""
    rows = [*itertools.chain.from_iterable(map(_best_rows, views))]
    if not rows:
        return []
    texts = list(dict.fromkeys(row["text"] for row in rows))
    # perplexities or mean losses; of runs of both kinds, both words
    scales = [row["scale"] for row in rows]
    noun = " or ".join(dict.fromkeys(scale.noun for scale in scales))
    short = " or ".join(dict.fromkeys(scale.short for scale in scales))
    about = (
        f"The variant of the lowest {noun} of each run and ratio; {TIED}: how many others cannot be told apart from it "
        f"(- where that was not tested). {noun.capitalize()} is of "
    )
    columns = [
        Column("run", ("run",), words=True),
        Column("lowest", ("variant",), words=True),
        Column("asked %", ("ratio_asked",), format_percent),
        Column(short, ("ppl", "spread", "scale"), format_spread),
        Column("dense", ("dense", "scale"), format_figure),
        Column("× dense", ("times",), "{:.3g}".format),
        Column(TIED, ("ties",), "{:,}".format),
    ]
    if len(texts) == 1:
        about += f"{texts[0]}."
    else:
        about += "a text of each run's own: compare within a text and its windows alone."
        columns.insert(2, Column("text", ("text",), words=True))
    return [Words(about), Table("Best variants", columns, rows)]


def _best_rows(view: View) -> list[Row]:
    """Make a row of the best variant of each ratio of a run, on the text by which the best is chosen."""
    domain = primary_domain(view.run)
    dense = next((row[f"ppl_{domain}"] for row in view.rows if row["candidate"] == DENSE), math.nan)
    best: dict[float, Row] = {}
    for row in view.rows:
        if row["best"]:
            best.setdefault(row["ratio_asked"], row)  # the first of several with the same figure
    found = []
    for asked, row in best.items():
        others = [each for each in view.rows if each["ratio_asked"] == asked and each is not row]
        ties = None
        if any(not math.isnan(each.get(f"low_{domain}", math.nan)) for each in others):
            ties = sum(each["tied"] or each["best"] for each in others)
        ppl = row[f"ppl_{domain}"]
        times = None
        if dense > 0:
            times = ppl / dense
        one = {
            "run": view.name,
            "variant": row["variant"],
            "text": evaluated(view, domain),
            "ratio_asked": asked,
            "ppl": ppl,
            "scale": figure_of(view.run),
            "spread": row[f"spread_{domain}"],
            "dense": dense,
            "times": times,
            "ties": ties,
        }
        found.append(one)
    return found


def _run_table(views: Sequence[View]) -> Table:
    """List the runs: what each was made of, how long it took, what it cost."""
    lines = []
    for view in views:
        rows = [row for row in view.rows if row["candidate"] != DENSE]
        seconds = seconds_of(view.run)
        cost = view.run.get("cost", {})
        words = [
            view.kind,
            view.model.rstrip("/").rpartition("/")[2],
            evaluated(view, primary_domain(view.run)),
            view.status,
        ]
        numbers = [
            _written(len({row["variant"] for row in rows}) or None, "{:,}".format),
            _written(max((row["seeds"] for row in rows), default=None), "{:,}".format),
            _written(seconds, "{:,.0f}".format),
            _written(cost.get("usd"), format_usd),
        ]
        lines.append([view.name, *(each or "-" for each in words), *numbers])
    header = ["run", "kind", "model", "text", "status", "variants", "seeds", "seconds", "cost"]
    return text_table("All runs", header, lines, words=5)


def _written(value: Number | None, form: Callable[[Any], str]) -> str:
    """Write a number, a dash where there is none."""
    if value is None:
        return "-"
    return form(value)


def joint_curves(views: Sequence[View]) -> dict[str, list[Curve]]:
    """Make `{text: a curve a run}` of the best variant of each ratio, of the texts that at least two runs share.

    A text is what `evaluated` says: the same source with other windows is another one.
    """
    found: dict[str, list[Curve]] = {}
    for view in views:
        for domain in ("in", "out"):
            text = evaluated(view, domain)
            rows = [row for row in view.rows if row["best"] or row["candidate"] == DENSE]
            points = sorted((row["ratio_actual"], row[f"ppl_{domain}"]) for row in rows)
            points = [(ratio, ppl) for ratio, ppl in points if not math.isnan(ppl)]
            # the unpruned model alone is no curve
            if text and any(ratio > 0 for ratio, _ in points):
                found.setdefault(text, []).append(Curve(view.name, points))
    return {text: lines for text, lines in found.items() if len(lines) > 1}


def _differences(views: Sequence[View]) -> list[Block]:
    """List the fields of the configurations that differ, a line a run; nothing where none differs.

    What was evaluated in fact comes first, since a configuration may ask for more windows than a text has.
    """
    fields = [*map(_fields, views)]
    keys = [key for key in dict.fromkeys(itertools.chain.from_iterable(fields)) if key not in ("name", "runs", "")]
    differing = [key for key in keys if len({each.get(key) for each in fields}) > 1]
    if not differing:
        return []
    differing.sort(key=lambda key: not key.startswith("evaluat"))
    shown = differing[:_FIELDS]
    lines = []
    for view, each in zip(views, fields, strict=True):
        lines.append([view.name, *(_cut(each.get(key, "-")) for key in shown)])
    about = "Fields that are not the same in all runs; - where a run has no such field."
    more = len(differing) - _FIELDS
    if more > 0:
        about += f" {plural(more, 'more field')} differ."
    return [Words(about), text_table("Differing fields", ["run", *shown], lines, words=len(shown) + 1)]


def _fields(view: View) -> dict[str, str]:
    """List what a run was evaluated on and the leaves of its configuration, as text."""
    found = {}
    for domain in ("out", "in"):
        text = evaluated(view, domain)
        if text:
            found[f"evaluated {DOMAINS[domain]}"] = text
    for key, value in flatten(plain(view.run.get("config", {}))).items():
        found[key] = value.strip('"')
    return found


def _cut(text: str) -> str:
    """Leave out the end of a text that is too long for a cell."""
    if len(text) <= _LETTERS:
        return text
    return f"{text[: _LETTERS - 1]}…"
