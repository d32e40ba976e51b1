"""What `saap ab` and `saap gate` find: tables, JSON, JUnit XML."""

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any, NamedTuple

from saap_jax.evaluation.differences import AccuracyDifference, Difference, decimals_of
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import smallest_p_value
from saap_jax.report.page.blocks import Block, Cell, Line, Table, Words, text_table
from saap_jax.report.page.formats import format_ppl
from saap_jax.runs.directory import plain

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


ALONE = (
    "Each p is of this one comparison. The tables of a run adjust theirs for all variants that are compared with the "
    "best (Holm): of the same pair, theirs can be larger."
)
"""What the p-values of `saap ab` are of."""


class Compared(NamedTuple):
    """One metric of A and B."""

    metric: str
    """Name of the perplexity: `ppl@128 builtin:reference`."""
    domain: str
    """ "in" or "out" of the calibration domain of a run; empty where there is none."""
    windows: int
    ppl: tuple[float, float]
    """Perplexities of A and B; of several seeds, exp of the mean loss of all."""
    difference: Difference


class ComparedTask(NamedTuple):
    """One task of A and B, or all of them together."""

    task: str
    metric: str
    """`acc`, for instance."""
    items: int
    accuracy: tuple[float, float]
    """Of A and B, in percent; over all tasks, the mean of theirs."""
    difference: AccuracyDifference


class Comparison(NamedTuple):
    """A beside B on every text and task."""

    a: str
    b: str
    seeds: int
    """Seeds that were compared in pairs; 1 for single models."""
    resamples: int
    metrics: tuple[Compared, ...]
    tasks: tuple[ComparedTask, ...] = ()


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """Return A beside B: a table of texts, one of tasks, and both in words."""
    tables = [comparison_table(comparison)] if comparison.metrics else []
    tables += [task_table(comparison)] if comparison.tasks else []
    return [*tables, *(Words(said, soft=False) for said in sentences(comparison))]


def comparison_table(comparison: Comparison) -> Table:
    """Return A beside B, a line a metric."""
    lines = []
    for row in comparison.metrics:
        name = f"{row.metric} ({row.domain})" if row.domain else row.metric
        lines.append((name, *map(format_ppl, row.ppl), *_numbers(row.difference, comparison.resamples)))
    return _table(comparison, ("metric", "ppl A", "ppl B", "A - B %"), lines)


def task_table(comparison: Comparison) -> Table:
    """Return the accuracies of A beside those of B, a line a task."""
    lines = []
    for row in comparison.tasks:
        each = row.difference
        digits = decimals_of(each.points)
        numbers = (
            *(f"{value:.1f}" for value in row.accuracy),
            f"{each.points:+.{digits}f}",
            _interval(each.low, each.high, digits),
            f"{100 * each.win_rate:.1f}",
            _p_value(each.p_value, comparison.resamples),
        )
        lines.append((f"{row.task} ({row.metric}, {row.items:,} items)", *numbers))
    return _table(comparison, ("task", "acc A %", "acc B %", "A - B points"), lines)


def _table(comparison: Comparison, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    smallest = f"{smallest_p_value(comparison.resamples):.2g}"
    note = (
        f"95 % interval and two-sided p by the paired bootstrap; {comparison.resamples:,} resamples give no p below "
        f"{smallest}"
    )
    header = (*columns, "95 % interval", "A wins %", "p")
    return text_table(f"A: {comparison.a}\nB: {comparison.b}", header, lines, notes=[note])


def _numbers(difference: Difference, resamples: int) -> tuple[str, str, str, str]:
    value, low, high = difference.percent
    digits = decimals_of(value)
    p = _p_value(difference.p_value, resamples)
    return f"{value:+.{digits}f}", _interval(low, high, digits), f"{100 * difference.win_rate:.1f}", p


def _interval(low: float, high: float, digits: int) -> str:
    return "n/a" if math.isnan(low) or math.isnan(high) else f"{low:+.{digits}f} to {high:+.{digits}f}"


def _p_value(p: float, resamples: int) -> str:
    smallest = smallest_p_value(resamples)
    return "n/a" if math.isnan(p) else f"<= {p:.2g}" if p <= smallest < 1 else f"{p:.2g}"


def sentences(comparison: Comparison) -> list[str]:
    """Return what each metric and task says, in words, and what their p-values are of."""
    texts = [f"{row.metric}: {row.difference.sentence}" for row in comparison.metrics]
    texts += [f"{row.task}: {row.difference.sentence}" for row in comparison.tasks]
    tested = [row for row in (*comparison.metrics, *comparison.tasks) if not math.isnan(row.difference.p_value)]
    return texts + ([ALONE] if tested else [])


def comparison_json(comparison: Comparison) -> bytes:
    """Return the comparison as a JSON object; differences in nats a token and in percent, each with its interval, and
    of tasks in points.
    """
    content: dict[str, Any] = {
        "a": comparison.a,
        "b": comparison.b,
        "seeds": comparison.seeds,
        "level": 0.95,
        "resamples": comparison.resamples,
        "smallest_p_value": smallest_p_value(comparison.resamples),
        "p_value_of": "one comparison, not adjusted for others",
        "metrics": [_metric_json(row) for row in comparison.metrics],
        "tasks": [_task_json(row) for row in comparison.tasks],
    }
    return json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _metric_json(row: Compared) -> dict[str, Any]:
    difference = row.difference
    return {
        "metric": row.metric,
        "domain": row.domain or None,
        "windows": row.windows,
        "ppl_a": row.ppl[0],
        "ppl_b": row.ppl[1],
        "percent": dict(zip(("value", "low", "high"), difference.percent, strict=True)),
        "nats": {"value": difference.value, "low": difference.low, "high": difference.high},
        "win_rate": difference.win_rate,
        "p_value": difference.p_value,
        "sure": difference.sure,
        "sentence": difference.sentence,
    }


def _task_json(row: ComparedTask) -> dict[str, Any]:
    difference = row.difference
    return {
        "task": row.task,
        "metric": row.metric,
        "items": row.items,
        "accuracy_a": row.accuracy[0],
        "accuracy_b": row.accuracy[1],
        "points": {"value": difference.points, "low": difference.low, "high": difference.high},
        "win_rate": difference.win_rate,
        "p_value": difference.p_value,
        "sure": difference.sure,
        "sentence": difference.sentence,
    }


def check_table(model: str, baseline: str, checks: Sequence[Check]) -> Table:
    """Return the limits beside what was measured, a line a limit."""
    lines = []
    for check in checks:
        cells = map(Cell, (check.name, check.what, check.limit, check.measured))
        lines.append(Line([*cells, Cell("PASS" if check.passed else "FAIL", verdict=check.passed)]))
    header = ("limit", "of", "at most", "measured", "")
    return Table(f"model: {model}\nbaseline: {baseline}", header, lines, words=len(header))


def junit(model: str, baseline: str, checks: Sequence[Check]) -> bytes:
    """Return the outcome as JUnit XML: one suite, a test case a limit, a failure a broken one."""
    counts = {"tests": str(len(checks)), "failures": str(sum(not check.passed for check in checks)), "errors": "0"}
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", {"name": "saap gate", **counts, "skipped": "0"})
    properties = ET.SubElement(suite, "properties")
    for name, value in (("model", model), ("baseline", baseline)):
        ET.SubElement(properties, "property", {"name": name, "value": _legal(value)})
    for check in checks:
        name = _legal(f"{check.name} ({check.what})")
        case = ET.SubElement(suite, "testcase", {"classname": "saap.gate", "name": name})
        text = _legal(f"at most {check.limit}, measured {check.measured}")
        if check.passed:
            ET.SubElement(case, "system-out").text = text
        else:
            failure = ET.SubElement(case, "failure", {"type": "limit", "message": f"{check.name}: {text}"})
            failure.text = text
    ET.SubElement(suite, "system-out").text = _legal(verdict(checks))
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"


def _legal(text: str) -> str:
    """Replace characters that no XML may hold, not even escaped."""
    return _ILLEGAL.sub("\ufffd", text)
