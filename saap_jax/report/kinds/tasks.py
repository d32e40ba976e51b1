"""What `saap evaluate` shows and writes: perplexities and accuracies of models, as tables and as JSON."""

import math
from collections.abc import Mapping, Sequence

from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.tasks.results import TaskResult
from saap_jax.report.page.blocks import Table, text_table
from saap_jax.runs.outcomes import Evaluated


def evaluation_blocks(rows: Mapping[str, Evaluated]) -> list[Table]:
    """Return the tables of what was evaluated."""
    first = next(iter(rows.values()))
    return [*([perplexity_table(rows)] if first.ppl else []), *([task_table(rows)] if first.tasks else [])]


def perplexity_table(rows: Mapping[str, Evaluated]) -> Table:
    """Return the perplexities of models, a line each."""
    header = ("model", "parameters", *next(iter(rows.values())).ppl)
    lines = [
        (name, f"{row.parameters:,}", *(f"{value:.2f}" for value in row.ppl.values())) for name, row in rows.items()
    ]
    return text_table("perplexity", header, lines)


def task_table(rows: Mapping[str, Evaluated]) -> Table:
    """Return the results of tasks, a line a model and task: each metric in percent, with its standard error."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for result in row.tasks for metric in result.values))
    lines = []
    for name, row in rows.items():
        for result in row.tasks:
            lines.append((name, result.task, f"{len(result.ids):,}", *(_cell(result, metric) for metric in metrics)))
        if len(row.tasks) > 1:
            items = sum(len(result.ids) for result in row.tasks)
            lines.append((name, "mean of tasks", f"{items:,}", *(_mean_cell(row.tasks, metric) for metric in metrics)))
    return text_table(
        f"zero-shot tasks, %, ± standard error (of {FEWEST} items or more)",
        ("model", "task", "items", *metrics),
        lines,
        words=2,
        notes=["acc_norm: of each choice, the log-likelihood a character"],
    )


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
