"""What commands print that keep no run: `saap evaluate`, `ab` and `bench`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saap_jax.evaluation.differences import Difference, decimals_of
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import FEWEST, format_interval, smallest_p_value
from saap_jax.evaluation.scales import format_ppl
from saap_jax.evaluation.task_results import TaskResult
from saap_jax.report.blocks import Block, Table, Words, said, text_table
from saap_jax.report.formats import format_count, format_mebibytes, format_millions, format_milliseconds, format_p
from saap_jax.runs.ab import Comparison, Evaluated
from saap_jax.runtime.words import MINUS, signed

# --- evaluate ----------------------------------------------------------------------------------------


def evaluation_blocks(rows: Mapping[str, Evaluated]) -> list[Table]:
    """Show what was evaluated: perplexities, a line a model; metrics of tasks in percent, a line a model and task."""
    first, tables = next(iter(rows.values())), []
    if first.ppl:
        lines = [(name, f"{row.parameters:,}", *map("{:.2f}".format, row.ppl.values())) for name, row in rows.items()]
        tables.append(text_table("perplexity", ("model", "parameters", *first.ppl), lines))
    if first.tasks:
        metrics = dict.fromkeys(metric for row in rows.values() for result in row.tasks for metric in result.values)
        groups = [(name, result.task, (result,)) for name, row in rows.items() for result in row.tasks]
        groups += [(name, "mean of tasks", row.tasks) for name, row in rows.items() if len(row.tasks) > 1]
        order = list(rows)
        groups.sort(key=lambda group: order.index(group[0]))
        lines = [
            (name, task, f"{sum(len(each.ids) for each in found):,}", *(_accuracy(found, metric) for metric in metrics))
            for name, task, found in groups
        ]
        title = f"zero-shot tasks, %, ± standard error (of {FEWEST} items or more)"
        notes = ["acc_norm: of each choice, the log-likelihood a character"]
        tables.append(text_table(title, ("model", "task", "items", *metrics), lines, words=2, notes=notes))
    return tables


def _accuracy(results: Sequence[TaskResult], metric: str) -> str:
    """Show the mean over tasks, each of which counts the same; nothing where one does not have the metric."""
    if any(metric not in result.values for result in results):
        return "-"
    mean = sum(result.mean(metric) for result in results) / len(results)
    errors = [result.standard_error(metric) if len(result.ids) >= FEWEST else math.nan for result in results]
    error = math.hypot(*errors) / len(errors)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


# --- ab ----------------------------------------------------------------------------------------------

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


# --- bench -------------------------------------------------------------------------------------------


def bench_blocks(result: dict[str, Any]) -> list[Block]:
    """Show the sizes of the models, a table of times a workload, and what the columns are."""
    header = ("model", "layers", "params (M)", "MMACs a token", "weights (MiB)")
    lines = [
        (row["model"], str(row["layers"]), format_millions(row["parameters"]), format_millions(row["macs_per_token"]),
         format_mebibytes(row["weight_bytes"]))
        for row in result["models"]
    ]  # fmt: skip
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in result["workloads"]:
        title = f"batch {row['batch']}, {row['prompt']} prompt tokens, {row['new']} new ones"
        memory, decoded = row["memory_bytes"], "tokens_per_second" in row
        groups.setdefault(title, []).append(
            (
                row["model"],
                _range(row["prefill_seconds"], format_milliseconds),
                format_milliseconds(row["first_token_seconds"]["median"]),
                _range(row["tokens_per_second"], format_rate) if decoded else "-",
                "n/a" if memory is None else format_mebibytes(memory),
                "{median:.2f} / {predicted:.2f}".format(**row["prefill_speed_up"]),
                "{median:.2f} / {predicted:.2f}".format(**row["decode_speed_up"]) if decoded else "-",
            )
        )
    columns = ("model", "prefill (ms)", "first (ms)", "tokens a second", "memory (MiB)", "prefill x", "decode x")
    devices = result["devices"]
    cores = f", {devices['cores']} cores" if devices["platform"] == "cpu" else ""
    where = f"{devices['count']} x {devices['kind']}{cores}"
    return [
        text_table(f"size, {result['dtype']}", header, lines),
        *(text_table(title, columns, rows) for title, rows in groups.items()),
        Words(f"median (smallest to largest) of {result['repeats']} measurements, models in turns, on {where}"),
        Words(
            f"x: times faster than {result['baseline']}, measured / predicted; prefill is predicted by operations,"
            " decode by bytes of weights and cache"
        ),
        Words(
            "MACs a token: entries of all matrices, unembedding included; memory: weights, cache and temporaries of the"
            " larger program, as the compiler counts them"
        ),
    ]


def _range(values: dict[str, Any], form: Callable[[float], str]) -> str:
    if values["low"] == values["high"]:  # of one measurement
        return form(values["median"])
    return f"{form(values['median'])} ({form(values['low'])} to {form(values['high'])})"


def format_rate(value: float) -> str:
    """Write tokens a second with three digits at least.

    >>> [format_rate(value) for value in (8.127, 24.66, 1534.2)]
    ['8.13', '24.7', '1,534']
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else format_count(value)
