"""Tables of a run: the candidates beside the dense model, and the cut model beside the dense one."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

DENSE = "dense"
"""Label of the row of the unpruned model."""

Record = dict[str, Any]
"""`run.json`, or one line of `metrics.jsonl`."""


class Row(NamedTuple):
    """One line of the comparison; a number that was not recorded is NaN."""

    candidate: str
    """Name of the candidate, unique, or "dense"."""
    label: str
    """The candidate without its ratio, or "dense"."""
    asked: float
    """Fraction of the prunable parameters that was asked to go."""
    actual: float
    parameters: float
    ppl_in: float
    """Perplexity on the first metric of the calibration domain."""
    ppl_out: float
    """Perplexity on the first metric of another domain."""
    seconds: float
    best: bool
    """True for the lowest perplexity among candidates of the same asked ratio, out of domain where there is one."""


class CutRow(NamedTuple):
    """One property of the cut model beside the dense one, formatted."""

    label: str
    dense: str
    cut: str
    change: str


def metrics(run: Record) -> list[Record]:
    """Return the metrics of a run, each with `name` and `domain` ("in" or "out"), in the order of the record."""
    if "metrics" in run:
        return run["metrics"]
    names = list(run.get("dense", {}).get("ppl", {}))
    return [{"name": name, "domain": "in" if index == 0 else "out"} for index, name in enumerate(names)]


def first_metric(run: Record, domain: str) -> str | None:
    """Return the name of the first metric of a domain ("in" or "out"), None if the run has none."""
    return next((metric["name"] for metric in metrics(run) if metric["domain"] == domain), None)


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


def labels(candidates: Sequence[Record]) -> list[str]:
    """Return the name of each candidate without its ratio, with its allocation where these differ."""
    several = len({candidate.get("allocation") for candidate in candidates}) > 1
    found = []
    for candidate in candidates:
        label = candidate["candidate"].rpartition("@")[0] or candidate["candidate"]
        allocation = str(candidate.get("allocation"))
        found.append(f"{label} ({allocation})" if several and allocation not in label else label)
    return found


def comparison_rows(run: Record, candidates: Sequence[Record]) -> list[Row]:
    """Return the dense model and then the candidates by asked ratio and perplexity (out of domain, else in domain).

    Perplexities that are not finite come last within their ratio, and are never the best.
    """
    name_in, name_out = first_metric(run, "in"), first_metric(run, "out")
    rows = []
    for label, candidate in zip(labels(candidates), candidates, strict=True):
        ppl = candidate.get("ppl", {})
        numbers = (candidate.get(key) for key in ("ratio_asked", "ratio_actual", "parameters"))
        numbers = (*numbers, ppl.get(name_in), ppl.get(name_out), candidate.get("seconds"))
        rows.append(Row(candidate["candidate"], label, *map(_number, numbers), best=False))

    def quality(row: Row) -> float:
        ppl = row.ppl_in if name_out is None else row.ppl_out
        return ppl if math.isfinite(ppl) else math.inf

    rows.sort(key=lambda row: (row.asked, quality(row), row.label))
    lowest: dict[float, float] = {}
    for row in rows:
        lowest.setdefault(row.asked, quality(row))
    rows = [row._replace(best=math.isfinite(quality(row)) and quality(row) == lowest[row.asked]) for row in rows]
    if "dense" in run:
        ppl = run["dense"].get("ppl", {})
        numbers = (run["dense"].get("parameters"), ppl.get(name_in), ppl.get(name_out), run["dense"].get("seconds"))
        rows.insert(0, Row(DENSE, DENSE, 0.0, 0.0, *map(_number, numbers), best=False))
    return rows


def comparison_cells(run: Record, candidates: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the formatted cells of the comparison; the best of each ratio carries a star."""
    header = ["estimator", "asked %", "actual %", "params (M)"]
    shown = [domain for domain in ("in", "out") if first_metric(run, domain)]
    cells = []
    for row in comparison_rows(run, candidates):
        ppl = [format_ppl({"in": row.ppl_in, "out": row.ppl_out}[domain]) for domain in shown]
        asked = "-" if row.candidate == DENSE else format_percent(row.asked)
        label = f"{row.label} *" if row.best else row.label
        actual, parameters = format_percent(row.actual), format_millions(row.parameters)
        cells.append([label, asked, actual, parameters, *ppl, format_seconds(row.seconds)])
    return [*header, *(f"ppl {domain}" for domain in shown), "seconds"], cells


def legend(run: Record) -> str:
    """Say what the star means."""
    return f"* lowest perplexity {'out of' if first_metric(run, 'out') else 'in'} domain at its ratio"


def rich_table(run: Record, candidates: Sequence[Record]) -> Table:
    """Return the comparison for a terminal of 100 columns."""
    table = Table(
        title=Text(headline(run), style="italic"),
        caption=Text(legend(run)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    header, cells = comparison_cells(run, candidates)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row, line in zip(comparison_rows(run, candidates), cells, strict=True):
        table.add_row(*map(Text, line), style="bold" if row.best else None)
    return table


def markdown_table(run: Record, candidates: Sequence[Record]) -> str:
    """Return the comparison as Markdown, headline and legend included."""
    header, cells = comparison_cells(run, candidates)
    rule = [":--", *["--:"] * (len(header) - 1)]
    lines = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in [header, rule, *cells]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{headline(run)}\n\n{table}\n\n\\{legend(run)}\n"


def csv_table(run: Record, candidates: Sequence[Record]) -> str:
    """Return dense model and candidates as CSV: every metric, fractions instead of percent, full precision."""
    names = [metric["name"] for metric in metrics(run)]
    keys = ["candidate", "estimator", "allocation", "ratio_asked", "ratio_actual", "parameters"]
    records = sorted(candidates, key=lambda candidate: _number(candidate.get("ratio_asked")))
    if "dense" in run:
        records = [{"candidate": DENSE, "ratio_asked": 0.0, "ratio_actual": 0.0, **run["dense"]}, *records]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, *names, "seconds"])
    for record in records:
        ppl = record.get("ppl", {})
        writer.writerow([*(record.get(key) for key in keys), *map(ppl.get, names), record.get("seconds")])
    return text.getvalue()


def cut_rows(run: Record) -> list[CutRow]:
    """Return the cut model of a run (`best`) beside the dense one, property by property; empty if there is none.

    Properties that were not recorded are left out. Tokens a second need `forward_tokens`, the tokens of one timed
    forward pass.
    """
    if not run.get("best"):
        return []
    best, dense = run["best"], run.get("dense", {})
    tokens = _number(best.get("forward_tokens"))
    seconds = tuple(_number(best.get(key)) for key in ("dense_forward_seconds", "forward_seconds"))
    pairs = [
        ("parameters (M)", _number(dense.get("parameters")), _number(best.get("parameters")), format_millions),
        ("weights (MiB)", _number(best.get("dense_bytes")), _number(best.get("bytes")), format_mebibytes),
        ("forward pass (ms)", *seconds, format_milliseconds),
        ("tokens a second", *(tokens / each if each else math.nan for each in seconds), format_count),
    ]
    for metric in metrics(run):
        before, after = (record.get("ppl", {}).get(metric["name"]) for record in (dense, best))
        pairs.append((f"{metric['name']} ({metric['domain']})", _number(before), _number(after), format_ppl))
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


def format_seconds(value: float) -> str:
    """Return seconds."""
    return "n/a" if math.isnan(value) else f"{value:,.1f}"


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


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
