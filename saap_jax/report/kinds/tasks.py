"""What `saap evaluate` shows and writes: perplexities and accuracies of models, as tables and as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from saap_jax.evaluation.paired import FEWEST
from saap_jax.evaluation.tasks.results import TaskResult, result_json
from saap_jax.report.records import plain


class Evaluated(NamedTuple):
    """One model: perplexities by metric name, and the results of tasks."""

    parameters: int
    ppl: dict[str, float]
    tasks: tuple[TaskResult, ...] = ()


def rich_perplexities(rows: Mapping[str, Evaluated]) -> Table:
    """Return the perplexities of models, a line each."""
    table = Table(title="perplexity", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("parameters", justify="right")
    for metric in next(iter(rows.values())).ppl:
        table.add_column(metric, justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row.parameters:,}", *(f"{value:.2f}" for value in row.ppl.values()))
    return table


def rich_tasks(rows: Mapping[str, Evaluated]) -> Table:
    """Return the results of tasks, a line a model and task: each metric in percent, with its standard error."""
    table = Table(
        title=f"zero-shot tasks, %, ± standard error (of {FEWEST} items or more)",
        title_justify="left",
        caption="acc_norm: of each choice, the log-likelihood a character",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("task", overflow="fold")
    table.add_column("items", justify="right")
    metrics = list(dict.fromkeys(metric for row in rows.values() for result in row.tasks for metric in result.values))
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, row in rows.items():
        for result in row.tasks:
            cells = [_cell(result, metric) for metric in metrics]
            table.add_row(name, result.task, f"{len(result.ids):,}", *cells)
        if len(row.tasks) > 1:
            means = [_mean_cell(row.tasks, metric) for metric in metrics]
            table.add_row(name, "mean of tasks", f"{sum(len(result.ids) for result in row.tasks):,}", *means)
    return table


def _cell(result: TaskResult, metric: str) -> str:
    if metric not in result.values:
        return "-"
    return _shown(result.mean(metric), _error(result, metric))


def _error(result: TaskResult, metric: str) -> float:
    """Return the standard error, NaN of so few items that it says nothing."""
    return result.standard_error(metric) if len(result.ids) >= FEWEST else math.nan


def _mean_cell(results: Sequence[TaskResult], metric: str) -> str:
    """Show the mean over tasks, each of which counts the same; nothing where one does not have the metric."""
    if any(metric not in result.values for result in results):
        return "-"
    errors = [_error(result, metric) for result in results]
    return _shown(sum(result.mean(metric) for result in results) / len(results), math.hypot(*errors) / len(errors))


def _shown(mean: float, error: float) -> str:
    return f"{100 * mean:.1f} ± {100 * error:.1f}" if math.isfinite(error) else f"{100 * mean:.1f}"


def evaluation_json(rows: Mapping[str, Evaluated]) -> bytes:
    """Return the evaluation as a JSON object; of tasks, metrics as shares with standard errors, and every item."""
    models: list[dict[str, Any]] = [
        {
            "model": name,
            "parameters": row.parameters,
            "ppl": row.ppl,
            "tasks": [result_json(result) for result in row.tasks],
        }
        for name, row in rows.items()
    ]
    return json.dumps(plain({"models": models}), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"
