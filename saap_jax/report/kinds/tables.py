"""Tables of a run: the candidates beside the dense model, and the cut model beside the dense one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from saap_jax.report.page.csv_text import csv_text
from saap_jax.report.rows import DENSE, LEVEL, Record, Row, comparison_rows, first_metric, metrics, number, untested

BEST, TIED = "*", "≈"
"""Marks of the best of a ratio, and of what cannot be told apart from it."""


class CutRow(NamedTuple):
    """One property of the cut model beside the dense one, formatted."""

    label: str
    dense: str
    cut: str
    change: str


def headline(run: Record) -> str:
    """Say which metrics the columns in and out stand for.

    >>> headline({"metrics": [{"name": "ppl@128 a", "domain": "in"}, {"name": "ppl@128 b", "domain": "out"}]})
    'ppl@128: in = a, out = b'
    """
    names = {domain: name for domain in ("in", "out") if (name := first_metric(run, domain))}
    kinds = {name.partition(" ")[0] for name in names.values()}
    if len(kinds) == 1 and all(" " in name for name in names.values()):
        names = {domain: name.partition(" ")[2] for domain, name in names.items()}
        prefix = f"{kinds.pop()}: "
    else:
        prefix = ""
    return prefix + ", ".join(f"{domain} = {name}" for domain, name in names.items())


def comparison_cells(run: Record, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the formatted cells of the comparison; the best of each ratio carries a mark."""
    shown = [domain for domain in ("in", "out") if first_metric(run, domain)]
    header = ["variant", "asked %", "actual %", "params (M)", *(f"ppl {domain}" for domain in shown)]
    cells = []
    for row in rows:
        ppl = [format_spread(getattr(row, f"ppl_{d}"), getattr(row, f"spread_{d}")) for d in shown]
        asked = "-" if row.candidate == DENSE else format_percent(row.asked)
        label = f"{row.label} {BEST if row.best else TIED}" if row.best or row.tied else row.label
        cells.append([label, asked, format_percent(row.actual), format_millions(row.parameters), *ppl])
    return header, cells


def legend(run: Record, rows: Sequence[Row]) -> str:
    """Say what the marks mean, and over how many seeds the numbers are."""
    domain = "out of" if first_metric(run, "out") else "in"
    said = f"{BEST} lowest perplexity {domain} domain at its ratio"
    if any(row.tied for row in rows):
        said += f"   {TIED} cannot be told apart from it (paired bootstrap, Holm, {100 * LEVEL:g} %)"
    if any(row.windows for row in rows) and (why := untested(rows)):
        said += f"\nwhich others are as good is not tested: {why}"
    seeds = max((row.seeds for row in rows), default=1)
    return f"{said}\nmean ± standard deviation over {seeds} seeds" if seeds > 1 else said


def rich_table(run: Record, candidates: Sequence[Record]) -> Table:
    """Return the comparison for a terminal of 100 columns."""
    rows = comparison_rows(run, candidates)
    table = Table(
        title=Text(headline(run), style="italic"),
        caption=Text(legend(run, rows)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    header, cells = comparison_cells(run, rows)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*map(Text, line), style="bold" if row.best else None)
    return table


def markdown_table(run: Record, candidates: Sequence[Record]) -> str:
    """Return the comparison as Markdown, headline and legend included."""
    rows = comparison_rows(run, candidates)
    header, cells = comparison_cells(run, rows)
    rule = [":--", *["--:"] * (len(header) - 1)]
    lines = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in [header, rule, *cells]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = legend(run, rows).replace("*", "\\*").replace("\n", "  \n")
    return f"{headline(run)}\n\n{table}\n\n{said}\n"


def csv_table(run: Record, candidates: Sequence[Record]) -> str:
    """Return dense model and candidates as CSV, one line a seed: every metric, fractions, full precision."""
    names = [metric["name"] for metric in metrics(run)]
    keys = ["candidate", "variant", "seed", "estimator", "allocation", "ratio_asked", "ratio_actual", "parameters"]
    records = sorted(candidates, key=lambda record: (number(record.get("ratio_asked")), record["candidate"]))
    if "dense" in run:
        records = [{"candidate": DENSE, "ratio_asked": 0.0, "ratio_actual": 0.0, **run["dense"]}, *records]
    rows = ([*map(record.get, keys), *map(record.get("ppl", {}).get, names)] for record in records)
    return csv_text([*keys, *names], rows)


def cut_rows(run: Record) -> list[CutRow]:
    """Return the cut model of a run (`best`) beside the dense one, property by property; empty if there is none.

    Properties that were not recorded are left out. Tokens a second need `forward_tokens`, the tokens of one timed
    forward pass.
    """
    if not run.get("best"):
        return []
    best, dense = run["best"], run.get("dense", {})
    tokens = number(best.get("forward_tokens"))
    seconds = tuple(number(best.get(key)) for key in ("dense_forward_seconds", "forward_seconds"))
    pairs = [
        ("parameters (M)", number(dense.get("parameters")), number(best.get("parameters")), format_millions),
        ("weights (MiB)", number(best.get("dense_bytes")), number(best.get("bytes")), format_mebibytes),
        ("forward pass (ms)", *seconds, format_milliseconds),
        ("tokens a second", *(tokens / each if each else math.nan for each in seconds), format_count),
    ]
    for metric in metrics(run):
        before, after = (record.get("ppl", {}).get(metric["name"]) for record in (dense, best))
        pairs.append((f"{metric['name']} ({metric['domain']})", number(before), number(after), format_ppl))
    return [
        CutRow(label, form(before), form(after), format_change(before, after))
        for label, before, after, form in pairs
        if not math.isnan(after)
    ]


def rich_cut_table(run: Record) -> Table:
    """Return the cut model beside the dense one for a terminal of 100 columns."""
    title = f"cut model: {run.get('best', {}).get('candidate', 'none')}"
    table = Table(title=Text(title, style="italic"), box=box.SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(CutRow._fields):
        table.add_column("" if index == 0 else name, justify="left" if index == 0 else "right")
    for row in cut_rows(run):
        table.add_row(*map(Text, row))
    return table


def format_ppl(value: float) -> str:
    """Return a perplexity in at most seven characters.

    >>> [format_ppl(value) for value in (12.345, 99_999.0, 123_456.0, 9.96e307, math.inf, math.nan)]
    ['12.35', '99999', '1.2e5', '1e308', 'inf', 'n/a']
    """
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "inf"
    if value < 99_999.5:
        return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_percent(value: float) -> str:
    """Return a fraction as percent, without the sign."""
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"


def format_millions(value: float) -> str:
    """Return a count in millions."""
    return "n/a" if math.isnan(value) else f"{value / 1e6:.1f}" if value >= 1e7 else f"{value / 1e6:.3f}"


def format_mebibytes(value: float) -> str:
    """Return bytes in MiB."""
    return "n/a" if math.isnan(value) else f"{value / 2**20:,.1f}"


def format_milliseconds(value: float) -> str:
    """Return seconds in milliseconds."""
    return "n/a" if math.isnan(value) else f"{1e3 * value:,.1f}"


def format_spread(value: float, spread: float) -> str:
    """Return a perplexity, with its standard deviation where there is one.

    >>> format_spread(58.171, 0.83), format_spread(58.171, math.nan)
    ('58.17 ± 0.83', '58.17')
    """
    return format_ppl(value) + (f" ± {format_ppl(spread)}" if math.isfinite(spread) else "")


def format_count(value: float) -> str:
    """Return a count with separators."""
    return "n/a" if math.isnan(value) else f"{value:,.0f}"


def format_change(before: float, after: float) -> str:
    """Return the relative change.

    >>> format_change(100.0, 80.0), format_change(2.0, 5000.0)
    ('-20.0 %', 'x 2500')
    """
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "n/a"
    return f"x {after / before:.4g}" if after >= 10 * before else f"{100 * (after / before - 1):+.1f} %"
