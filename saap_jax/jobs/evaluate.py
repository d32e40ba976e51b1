"""What `saap evaluate` runs: perplexity of models on texts, and their accuracy on tasks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.api import perplexity
from saap_jax.config.use import EvaluateConfig
from saap_jax.data.windows import evaluation_windows
from saap_jax.evaluation.likelihood import Progress
from saap_jax.evaluation.perplexity import metric_name
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import format_ppl
from saap_jax.evaluation.task_results import TaskResult, result_json
from saap_jax.evaluation.tasks import find_tasks, run_named
from saap_jax.llama.attention import attending
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.report.blocks import Table, text_table
from saap_jax.runtime.files import check_target, encoded, write_atomically
from saap_jax.runtime.mesh import layout_of_job
from saap_jax.runtime.progress import Track, quiet
from saap_jax.structures.discovery import count_parameters


class Evaluated(NamedTuple):
    """One model: perplexities by metric name, and the results of tasks."""

    parameters: int
    ppl: dict[str, float]
    tasks: tuple[TaskResult, ...] = ()


def evaluate(config: EvaluateConfig, *, track: Track = quiet) -> dict[str, Evaluated]:
    """Measure the perplexity of every model on every text, and run it on tasks; one model is in memory at a time.

    The results are written to `config.json` if it is named: of tasks, metrics as shares with standard errors, and every
    item.
    """
    check_target("json", config.json)
    layout = layout_of_job(config.mesh, batch_size=config.batch_size)
    rows = {}
    tasks = find_tasks(config)
    lengths = {}
    if config.sources:
        lengths = {"length": config.length}
    with attending(config.attention):
        how: Any = {"limit": config.windows or None, "bos": config.bos, "drawn": config.drawn}
        for name in track("evaluate models", config.models, len(config.models)):
            model = load_model(name, config.dtype, layout=layout, lengths=lengths)
            tokenizer = load_tokenizer(name)
            ppl = {}
            for source in config.sources:
                windows = evaluation_windows(source, tokenizer, config.length, **how)
                ppl[metric_name(config.length, source)] = perplexity(model, windows, batch_size=config.batch_size)
            results = run_named(model, tokenizer, tasks, batch_size=config.batch_size, progress=scoring(track, name))
            rows[name] = Evaluated(count_parameters(model), ppl, results)
    if config.json:
        models = [
            {"model": name, "parameters": row.parameters, "ppl": row.ppl, "tasks": [*map(result_json, row.tasks)]}
            for name, row in rows.items()
        ]
        write_atomically(Path(config.json), encoded({"models": models}, indent=1) + b"\n")
    return rows


def scoring(track: Track, name: str) -> Progress:
    """Show the progress of a model's tasks."""
    return lambda batches: track(f"score tasks of {name}", batches, len(batches))


def shown(config: EvaluateConfig, rows: dict[str, Evaluated]) -> list[Table]:
    """Show perplexities, a line a model, and metrics of tasks in percent, a line a model and task."""
    first = next(iter(rows.values()))
    tables = []
    if first.ppl:
        lines = [(name, f"{row.parameters:,}", *map(format_ppl, row.ppl.values())) for name, row in rows.items()]
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
