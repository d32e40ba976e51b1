"""What `saap ab` finds: tables of texts, tasks and limits, and all of them in words."""

import math
from collections.abc import Sequence

from saap_jax.evaluation.differences import Difference, decimals_of
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import smallest_p_value
from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.page.blocks import Block, Cell, Line, Table, Words, text_table
from saap_jax.runs.outcomes import Comparison
from saap_jax.runtime.words import MINUS, signed

ALONE = (
    "Each p is of this one comparison. The tables of a run adjust theirs for all variants that are compared with the "
    "best (Holm): of the same pair, theirs can be larger."
)
"""What the p-values of `saap ab` are of."""


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """Return A beside B: a table of texts, one of tasks, one of limits, and all in words."""
    blocks: list[Block] = [comparison_table(comparison)] if comparison.metrics else []
    blocks += [task_table(comparison)] if comparison.tasks else []
    blocks += [Words(said, soft=False) for said in sentences(comparison)]
    if comparison.checks:
        blocks += [check_table(comparison.checks), Words(verdict(comparison.checks), soft=False)]
    return blocks


def comparison_table(comparison: Comparison) -> Table:
    """Return A beside B, a line a metric."""
    lines = []
    for row in comparison.metrics:
        name = f"{row.metric} ({row.domain})" if row.domain else row.metric
        lines.append((name, *map(format_ppl, row.ppl), *_numbers(row.difference, comparison.resamples)))
    return _table(comparison, ("metric", "ppl A", "ppl B", f"A {MINUS} B %"), lines)


def task_table(comparison: Comparison) -> Table:
    """Return the accuracies of A beside those of B, a line a task."""
    lines = []
    for row in comparison.tasks:
        each = row.difference
        digits = decimals_of(each.points)
        numbers = (
            *(f"{value:.1f}" for value in row.accuracy),
            signed(each.points, digits),
            _interval(each.low, each.high, digits),
            f"{100 * each.win_rate:.1f}",
            _p_value(each.p_value, comparison.resamples),
        )
        lines.append((f"{row.task} ({row.metric}, {row.items:,} items)", *numbers))
    return _table(comparison, ("task", "acc A %", "acc B %", f"A {MINUS} B points"), lines)


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
    return signed(value, digits), _interval(low, high, digits), f"{100 * difference.win_rate:.1f}", p


def _interval(low: float, high: float, digits: int) -> str:
    return "n/a" if math.isnan(low) or math.isnan(high) else f"{signed(low, digits)} to {signed(high, digits)}"


def _p_value(p: float, resamples: int) -> str:
    smallest = smallest_p_value(resamples)
    return "n/a" if math.isnan(p) else f"≤ {p:.2g}" if p <= smallest < 1 else f"{p:.2g}"


def sentences(comparison: Comparison) -> list[str]:
    """Return what each metric and task says, in words, and what their p-values are of."""
    texts = [f"{row.metric}: {row.difference.sentence}" for row in comparison.metrics]
    texts += [f"{row.task}: {row.difference.sentence}" for row in comparison.tasks]
    tested = [row for row in (*comparison.metrics, *comparison.tasks) if not math.isnan(row.difference.p_value)]
    return texts + ([ALONE] if tested else [])


def check_table(checks: Sequence[Check]) -> Table:
    """Return the limits of A beside what was measured, a line a limit."""
    lines = []
    for check in checks:
        cells = map(Cell, (check.name, check.what, check.limit, check.measured))
        lines.append(Line([*cells, Cell("PASS" if check.passed else "FAIL", verdict=check.passed)]))
    header = ("limit", "of", "at most", "measured", "")
    return Table("A against the limits", header, lines, words=len(header))
