"""What commands print that keep no run: `saap evaluate`, `ab` and `bench`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saap_jax.evaluation.differences import decimals_of
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import FEWEST, format_interval, smallest_p_value
from saap_jax.evaluation.scales import format_ppl
from saap_jax.evaluation.task_results import TaskResult
from saap_jax.report.blocks import Block, Table, Words, text_table
from saap_jax.report.formats import (
    format_count,
    format_mebibytes,
    format_millions,
    format_milliseconds,
    format_p,
)
from saap_jax.runs.outcomes import Comparison, Evaluated
from saap_jax.runtime.words import MINUS, signed

# --- evaluate ----------------------------------------------------------------------------------------


def evaluation_blocks(rows: Mapping[str, Evaluated]) -> list[Table]:
    """Return the tables of what was evaluated."""
    first = next(iter(rows.values()))
    return [*([perplexity_table(rows)] if first.ppl else []), *([accuracy_table(rows)] if first.tasks else [])]


def perplexity_table(rows: Mapping[str, Evaluated]) -> Table:
    """Return the perplexities of models, a line each."""
    header = ("model", "parameters", *next(iter(rows.values())).ppl)
    lines = [
        (name, f"{row.parameters:,}", *(f"{value:.2f}" for value in row.ppl.values())) for name, row in rows.items()
    ]
    return text_table("perplexity", header, lines)


def accuracy_table(rows: Mapping[str, Evaluated]) -> Table:
    """Return the results of tasks, a line a model and task: each metric in percent, with its standard error."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for result in row.tasks for metric in result.values))
    lines = []
    for name, row in rows.items():
        for result in row.tasks:
            lines.append((name, result.task, f"{len(result.ids):,}", *(_accuracy([result], each) for each in metrics)))
        if len(row.tasks) > 1:
            items = sum(len(result.ids) for result in row.tasks)
            lines.append((name, "mean of tasks", f"{items:,}", *(_accuracy(row.tasks, metric) for metric in metrics)))
    title = f"zero-shot tasks, %, ± standard error (of {FEWEST} items or more)"
    notes = ["acc_norm: of each choice, the log-likelihood a character"]
    return text_table(title, ("model", "task", "items", *metrics), lines, words=2, notes=notes)


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
    """Return A beside B: tables of texts and tasks, both in words with what their p-values are of, and the limits."""
    rows = (*comparison.metrics, *comparison.tasks)
    said = [f"{row.metric}: {row.difference.sentence}" for row in comparison.metrics]
    said += [f"{row.task}: {row.difference.sentence}" for row in comparison.tasks]
    said += [ALONE] if any(not math.isnan(row.difference.p_value) for row in rows) else []
    blocks: list[Block] = [text_comparison_table(comparison)] if comparison.metrics else []
    blocks += [task_table(comparison)] if comparison.tasks else []
    blocks += [Words(each, soft=False) for each in said]
    if comparison.checks:
        blocks += [check_table(comparison.checks), Words(verdict(comparison.checks), soft=False)]
    return blocks


def text_comparison_table(comparison: Comparison) -> Table:
    """Return A beside B, a line a metric."""
    lines = []
    for row in comparison.metrics:
        name = f"{row.metric} ({row.domain})" if row.domain else row.metric
        lines.append((name, *map(format_ppl, row.ppl), *_numbers(row.difference.percent, row.difference, comparison)))
    return _versus(comparison, ("metric", "ppl A", "ppl B", f"A {MINUS} B %"), lines)


def task_table(comparison: Comparison) -> Table:
    """Return the accuracies of A beside those of B, a line a task."""
    lines = []
    for row in comparison.tasks:
        each, name = row.difference, f"{row.task} ({row.metric}, {row.items:,} items)"
        numbers = _numbers((each.points, each.low, each.high), each, comparison)
        lines.append((name, *(f"{value:.1f}" for value in row.accuracy), *numbers))
    return _versus(comparison, ("task", "acc A %", "acc B %", f"A {MINUS} B points"), lines)


def _versus(comparison: Comparison, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    smallest = f"{smallest_p_value(comparison.resamples):.2g}"
    note = (
        f"95 % interval and two-sided p by the paired bootstrap; {comparison.resamples:,} resamples give no p below "
        f"{smallest}"
    )
    header = (*columns, "95 % interval", "A wins %", "p")
    return text_table(f"A: {comparison.a}\nB: {comparison.b}", header, lines, notes=[note])


def _numbers(ends: tuple[float, float, float], difference: Any, comparison: Comparison) -> tuple[str, ...]:
    value, low, high = ends
    digits = decimals_of(value)
    interval = format_interval(low, high, lambda end: signed(end, digits)) or "n/a"
    p = format_p(difference.p_value, difference.p_value <= smallest_p_value(comparison.resamples))
    return signed(value, digits), interval, f"{100 * difference.win_rate:.1f}", p


def check_table(checks: Sequence[Check]) -> Table:
    """Return the limits of A beside what was measured, a line a limit; what is broken is marked."""
    header = ("limit", "of", "at most", "measured", "")
    lines = [(each.name, each.what, each.limit, each.measured, "PASS" if each.passed else "FAIL") for each in checks]
    table = text_table("A against the limits", header, lines, words=len(header))
    marks = ["good" if each.passed else "bad" for each in checks]
    return table._replace(rows=[{**row, "mark": mark} for row, mark in zip(table.rows, marks, strict=True)])


# --- bench -------------------------------------------------------------------------------------------


def bench_blocks(result: dict[str, Any]) -> list[Block]:
    """Return the sizes of the models, a table of times a workload, and what the columns are."""
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in result["workloads"]:
        groups.setdefault((row["batch"], row["prompt"], row["new"]), []).append(row)
    header = ("model", "layers", "params (M)", "MMACs a token", "weights (MiB)")
    lines = [
        (
            row["model"],
            str(row["layers"]),
            *(format_millions(float(row[key])) for key in ("parameters", "macs_per_token")),
            format_mebibytes(float(row["weight_bytes"])),
        )
        for row in result["models"]
    ]
    devices = result["devices"]
    cores = f", {devices['cores']} cores" if devices["platform"] == "cpu" else ""
    where = f"{devices['count']} x {devices['kind']}{cores}"
    said = (
        f"median (smallest to largest) of {result['repeats']} measurements, models in turns, on {where}",
        f"x: times faster than {result['baseline']}, measured / predicted; prefill is predicted by operations,"
        " decode by bytes of weights and cache",
        "MACs a token: entries of all matrices, unembedding included; memory: weights, cache and temporaries of the"
        " larger program, as the compiler counts them",
    )
    sizes = text_table(f"size, {result['dtype']}", header, lines)
    return [sizes, *(_times(rows) for rows in groups.values()), *map(Words, said)]


def _times(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"batch {first['batch']}, {first['prompt']} prompt tokens, {first['new']} new ones"
    header = ("model", "prefill (ms)", "first (ms)", "tokens a second", "memory (MiB)", "prefill x", "decode x")
    lines = []
    for row in rows:
        memory = row["memory_bytes"]
        lines.append(
            (
                row["model"],
                _range(row["prefill_seconds"], format_milliseconds),
                format_milliseconds(row["first_token_seconds"]["median"]),
                _range(row["tokens_per_second"], format_rate) if "tokens_per_second" in row else "-",
                "n/a" if memory is None else format_mebibytes(float(memory)),
                format_speed_up(row["prefill_speed_up"]),
                format_speed_up(row["decode_speed_up"]) if "decode_speed_up" in row else "-",
            )
        )
    return text_table(title, header, lines)


def _range(values: dict[str, Any], form: Callable[[float], str]) -> str:
    if values["low"] == values["high"]:  # of one measurement
        return form(values["median"])
    return f"{form(values['median'])} ({form(values['low'])} to {form(values['high'])})"


def format_speed_up(values: dict[str, Any]) -> str:
    """Return measured and predicted speed-up.

    >>> format_speed_up({"median": 1.514, "low": 1.4, "high": 1.6, "predicted": 1.652})
    '1.51 / 1.65'
    """
    return f"{values['median']:.2f} / {values['predicted']:.2f}"


def format_rate(value: float) -> str:
    """Return tokens a second with three digits at least.

    >>> [format_rate(value) for value in (8.127, 24.66, 1534.2)]
    ['8.13', '24.7', '1,534']
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else format_count(value)
