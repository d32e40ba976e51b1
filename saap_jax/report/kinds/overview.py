"""Several runs side by side: who is best at each ratio in which run, on one drawing, and where the runs differ."""

import math
from collections.abc import Sequence
from typing import Any

from saap_jax.evaluation.scales import Scale, format_figure, scale_of
from saap_jax.report.figures.ratio import Curve, ratio_panels, ratio_plot
from saap_jax.report.kinds.against import Against
from saap_jax.report.kinds.common import seconds_of
from saap_jax.report.kinds.variants import DOMAINS, figure_of
from saap_jax.report.page.blocks import (
    Block,
    Cell,
    Data,
    Line,
    Number,
    Picture,
    Pictures,
    Plot,
    RunView,
    Section,
    Table,
    Words,
)
from saap_jax.report.page.csv_text import without_nan
from saap_jax.report.page.formats import TIED, format_percent, format_spread, format_usd
from saap_jax.runs.directory import flatten, plain
from saap_jax.runs.standing import DENSE, ComparisonRow, first_metric
from saap_jax.runtime.words import plural

_TEXTS, _FIELDS, _LETTERS = 4, 12, 60
"""Drawings, differing fields of the configuration, and letters of a value that are shown at most."""

CSV_HEADER = (
    "run", "kind", "model", "variant", "seeds", "ratio_asked", "ratio_actual", "parameters", "metric", "domain", "ppl",
    "spread", "best", "percent_from_best", "low", "high", "win_rate", "p_adjusted", "tied",
)  # fmt: skip


def overview_sections(views: Sequence[RunView]) -> list[Section]:
    """Return what the runs have in common and where they differ; nothing for a single run."""
    if len(views) < 2:
        return []
    sections = [Section("overview", "Overview", [*best_blocks(views), run_table(views)])]
    if drawn := joint_pictures(views):
        figure = " or ".join(dict.fromkeys(scale_of(text).noun for text in joint_curves(views)))
        said = (
            "The best variant of each ratio, a line a run, from its unpruned model on. Logarithmic axis; lower is "
            "better. Texts that two runs share, window for window, "
            f"at most {_TEXTS}; runs of other texts, or of other windows, are not on one drawing."
        )
        order = drawn_runs(views)
        if alone := [view.name for view in views if view.compared and view.name not in order]:
            said += f" No other run was evaluated on the same as {', '.join(alone)}."
        together = Pictures(drawn, order, joint_panels(views))
        sections.append(Section("frontiers", f"Best {figure} against ratio", [Words(said), together]))
    if table := differences(views):
        sections.append(Section("differences", "Where the configurations differ", table))
    return sections


def evaluated(view: RunView, domain: str) -> str:
    """Return on what a run was evaluated: text, tokens a window, windows, and where it is on record the text's digest.

    Only what is the same on two runs may be compared between them. Empty where there is no such text.
    """
    compared = view.compared
    metric = first_metric(compared.run, domain) if compared else None
    if compared is None or not metric:
        return ""
    losses = compared.run.get("dense", {}).get("losses", {})
    windows = len(losses.get(metric) or ()) or view.run.get("config", {}).get("evaluation", {}).get("windows")
    digest = view.run.get("inputs", {}).get(f"evaluation text of {metric!r}", "")
    said = f"{metric}, {plural(windows, 'window')}" if windows else metric
    return f"{said} ({digest[:8]})" if digest else said


def best_blocks(views: Sequence[RunView]) -> list[Block]:
    """Return the best variant of every run and ratio as a table, and what its columns mean; nothing without any."""
    lines, texts = [], []
    scales: dict[Scale, None] = {}
    for view in views:
        domain, text = primary(view)
        scale = figure_of(view.run)
        dense = _dense(view)
        texts += [text] if text else []
        for row in best_rows(view):
            ppl, spread = getattr(row, f"ppl_{domain}"), getattr(row, f"spread_{domain}")
            cells = [Cell(view.name, link=view.id), Cell(row.label), Cell(text)]
            cells.append(Cell(format_percent(row.asked), 100 * row.asked))
            cells += [_number(ppl, format_spread(ppl, spread, scale)), _number(dense, format_figure(dense, scale))]
            times = ppl / dense if dense > 0 else math.nan
            cells += [_number(times, f"{times:.3g}"), Cell(_ties(view, row))]
            lines.append(Line(cells))
            scales[scale] = None
    if not lines:
        return []
    alike = len(set(texts)) == 1
    figure, short = (" or ".join(names) for names in zip(*((scale.noun, scale.short) for scale in scales), strict=True))
    said = f"The variant of the lowest {figure} of each run and ratio; {TIED}: how many others cannot be told apart "
    said += f"from it (- where that was not tested). {figure.capitalize()} is of "
    said += f"{texts[0]}." if alike else "a text of each run's own: compare within a text and its windows alone."
    header = ["run", "lowest", "text", "asked %", short, "dense", "× dense", TIED]
    if alike:
        header, lines = _without_text(header), [line._replace(cells=_without_text(line.cells)) for line in lines]
    return [Words(said), Table("Best variants", header, lines, words=2 if alike else 3, sortable=True)]


def _without_text(cells: Sequence[Any]) -> list[Any]:
    return [*cells[:2], *cells[3:]]


def _ties(view: RunView, best: ComparisonRow) -> str:
    """Return how many variants of a ratio are tied with the best of it, a dash where nothing was tested."""
    others = [row for row in (view.compared.rows if view.compared else ()) if row.asked == best.asked and not row.best]
    return f"{sum(row.tied for row in others):,}" if any(row.p_value == row.p_value for row in others) else "-"


def run_table(views: Sequence[RunView]) -> Table:
    """Return a line a run: what it was made of, how long it took, what it cost."""
    lines = []
    for view in views:
        rows = [row for row in view.compared.rows if row.candidate != DENSE] if view.compared else []
        variants, seeds = len({row.label for row in rows}), max((row.seeds for row in rows), default=0)
        seconds, usd = seconds_of(view.run), view.run["cost"].get("usd") if "cost" in view.run else None
        words = (view.kind, view.model.rstrip("/").rpartition("/")[2] or "-", primary(view)[1] or "-", view.status)
        cells = [Cell(view.name, link=view.id), *map(Cell, words)]
        cells += [_number(variants or math.nan, f"{variants:,}"), _number(seeds or math.nan, f"{seeds:,}")]
        cells.append(_number(math.nan if seconds is None else seconds, f"{seconds or 0:,.0f}"))
        cells.append(_number(math.nan if usd is None else usd, format_usd(usd or 0.0)))
        lines.append(Line(cells))
    header = ["run", "kind", "model", "text", "status", "variants", "seeds", "seconds", "cost"]
    return Table("All runs", header, lines, words=5, sortable=True)


def primary(view: RunView) -> tuple[str, str]:
    """Return the domain and the text by which a comparison's best is chosen, see `evaluated`; empty of other kinds."""
    if view.compared is None:
        return "out", ""
    domain = "out" if first_metric(view.compared.run, "out") else "in"
    return domain, evaluated(view, domain)


def best_rows(view: RunView) -> list[ComparisonRow]:
    """Return the best row of each ratio of a comparison."""
    best: dict[float, ComparisonRow] = {}
    for row in view.compared.rows if view.compared else ():
        if row.best:
            best.setdefault(row.asked, row)
    return list(best.values())


def _dense(view: RunView) -> float:
    rows = view.compared.rows if view.compared else ()
    return next((getattr(row, f"ppl_{primary(view)[0]}") for row in rows if row.candidate == DENSE), math.nan)


def _number(value: Number, text: str) -> Cell:
    return Cell("-" if math.isnan(value) else text, value)


def joint_pictures(views: Sequence[RunView]) -> list[Picture]:
    """Return the best of each ratio of all runs, a figure a text that at least two runs share, see `evaluated`."""
    order = drawn_runs(views)
    plots = {}
    for text, lines in joint_curves(views).items():
        scale = scale_of(text)
        plots[text] = ratio_plot(f"Best {scale.noun} against ratio: {text}", lines, order, scale=scale)
    return [Picture(text, plot) for text, plot in plots.items() if plot][:_TEXTS]


def joint_panels(views: Sequence[RunView]) -> list[Plot]:
    """Return the same figures for papers."""
    order = drawn_runs(views)
    return [
        plot
        for place, (text, lines) in enumerate(joint_curves(views).items(), start=1)
        for plot in ratio_panels(f"runs-frontier-{place}", [(text, lines)], order, scale_of(text))
    ]


def drawn_runs(views: Sequence[RunView]) -> list[str]:
    """Return the names of the runs that share a text with another one, in their order."""
    names = {curve.name for lines in joint_curves(views).values() for curve in lines}
    return [view.name for view in views if view.name in names]


def joint_curves(views: Sequence[RunView]) -> dict[str, list[Curve]]:
    """Return `{text: a curve a run}` of the best variant of each ratio, of the texts that at least two runs share.

    A text is what `evaluated` says: the same source with other windows is another one.
    """
    found: dict[str, list[Curve]] = {}
    for view in views:
        compared = view.compared
        if compared is None:
            continue
        for domain in ("in", "out"):
            text = evaluated(view, domain)
            rows = [row for row in compared.rows if row.best or row.candidate == DENSE]
            points = sorted((row.actual, getattr(row, f"ppl_{domain}")) for row in rows)
            points = [(ratio, ppl) for ratio, ppl in points if ppl > 0]  # no NaN
            if text and any(ratio > 0 for ratio, _ in points):
                found.setdefault(text, []).append(Curve(view.name, points))
    return {text: lines for text, lines in found.items() if len(lines) > 1}


def differences(views: Sequence[RunView]) -> list[Block]:
    """Return the fields of the configurations that differ, a line a run, those of the evaluation first.

    What was evaluated in fact comes before them, since a configuration may ask for more windows than a text has.
    Nothing where none differs.
    """
    leaves = [
        {f"evaluated {DOMAINS[domain]}": text for domain in ("out", "in") if (text := evaluated(view, domain))}
        | flatten(plain(view.run.get("config", {})))
        for view in views
    ]
    keys = [key for key in dict.fromkeys(key for each in leaves for key in each) if key not in ("name", "runs", "")]
    differing = [key for key in keys if len({each.get(key) for each in leaves}) > 1]
    differing.sort(key=lambda key: not key.startswith("evaluat"))
    if not differing:
        return []
    shown = differing[:_FIELDS]
    lines = [
        Line([Cell(view.name), *(Cell(_short(each.get(key, "-"))) for key in shown)])
        for view, each in zip(views, leaves, strict=True)
    ]
    more = f" {plural(len(differing) - _FIELDS, 'more field')} differ." if len(differing) > _FIELDS else ""
    said = "Fields that are not the same in all runs; - where a run has no such field." + more
    return [Words(said), Table("Differing fields", ["run", *shown], lines, words=len(shown) + 1)]


def report_data(views: Sequence[RunView]) -> Data:
    """Return the comparisons of all runs, a line a run, variant, ratio and text, in full precision.

    An empty cell is what was not recorded, and what has no meaning: the dense model and the best are not compared.
    """
    lines = []
    for view in views:
        compared = view.compared
        if compared is None:
            continue
        against = {(one.candidate, one.domain): one for one in reversed(compared.against)}
        for row in compared.rows:
            for domain in ("in", "out"):
                if not (metric := first_metric(compared.run, domain)):
                    continue
                one = against.get((row.candidate, domain))
                versus = (
                    (*one.difference.percent, one.difference.win_rate, one.p_value, _tied(one)) if one else ("",) * 6
                )
                about = (view.name, view.kind, view.model, row.label, row.seeds, row.asked, row.actual, row.parameters)
                values = (
                    metric,
                    domain,
                    getattr(row, f"ppl_{domain}"),
                    getattr(row, f"spread_{domain}"),
                    int(row.best),
                )
                lines.append(without_nan((*about, *values, *versus)))
    return Data("CSV of all comparisons, full precision", "report.csv", CSV_HEADER, lines)


def _tied(one: Against) -> int | str:
    return "" if math.isnan(one.p_value) else int(one.tied)


def _short(text: str) -> str:
    text = text.strip('"')
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
