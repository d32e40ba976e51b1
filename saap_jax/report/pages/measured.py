"""What `saap ab` prints."""

import math
from collections.abc import Sequence

from saap_jax.evaluation.differences import Difference, decimals_of
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import format_interval, smallest_p_value
from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.blocks import Block, Table, said, text_table
from saap_jax.report.formats import format_p
from saap_jax.runs.ab import Comparison
from saap_jax.runtime.words import MINUS, signed

ALONE = (
    "Each p is of this one comparison. The tables of a run adjust theirs for all variants that are compared with the "
    "best (Holm): of the same pair, theirs can be larger."
)
"""What the p-values of `saap ab` are of."""


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """Set A beside B: tables of texts and tasks, both in words with what their p-values are of, and the limits."""
    rows = (*comparison.metrics, *comparison.tasks)
    sentences = [f"{row.metric}: {row.difference.sentence}" for row in comparison.metrics]
    sentences += [f"{row.task}: {row.difference.sentence}" for row in comparison.tasks]
    sentences += [ALONE] if any(not math.isnan(row.difference.p_value) for row in rows) else []
    blocks: list[Block] = [*_comparison_tables(comparison), *said(*sentences)]
    if comparison.checks:
        blocks += [check_table(comparison.checks), *said(verdict(comparison.checks))]
    return blocks


def _comparison_tables(comparison: Comparison) -> list[Table]:
    """Set A beside B, a line a metric, and a line a task."""
    smallest = smallest_p_value(comparison.resamples)

    def numbers(difference: Difference) -> tuple[str, ...]:
        value, low, high = difference.percent
        digits = decimals_of(value)
        interval = format_interval(low, high, lambda end: signed(end, digits)) or "n/a"
        p = format_p(difference.p_value, difference.p_value <= smallest)
        return signed(value, digits), interval, f"{100 * difference.win_rate:.1f}", p

    texts = [
        (f"{row.metric} ({row.domain})" if row.domain else row.metric, *map(format_ppl, row.ppl),
         *numbers(row.difference))
        for row in comparison.metrics
    ]  # fmt: skip
    tasks = [
        (f"{row.task} ({row.metric}, {row.items:,} items)", *map("{:.1f}".format, row.accuracy),
         *numbers(row.difference))
        for row in comparison.tasks
    ]  # fmt: skip
    note = f"95 % interval and two-sided p by the paired bootstrap; {comparison.resamples:,} resamples give no p below"
    about, title = f"{note} {smallest:.2g}", f"A: {comparison.a}\nB: {comparison.b}"
    heads = (("metric", "ppl A", "ppl B", f"A {MINUS} B %"), ("task", "acc A %", "acc B %", f"A {MINUS} B points"))
    return [
        text_table(title, (*head, "95 % interval", "A wins %", "p"), lines, notes=[about])
        for head, lines in zip(heads, (texts, tasks), strict=True)
        if lines
    ]


def check_table(checks: Sequence[Check]) -> Table:
    """Set the limits of A beside what was measured, a line a limit; what is broken is marked."""
    header = ("limit", "of", "at most", "measured", "")
    lines = [(each.name, each.what, each.limit, each.measured, "PASS" if each.passed else "FAIL") for each in checks]
    table = text_table("A against the limits", header, lines, words=len(header))
    marks = ["good" if each.passed else "bad" for each in checks]
    return table._replace(rows=[{**row, "mark": mark} for row, mark in zip(table.rows, marks, strict=True)])
