"""What `saap evaluate` and `ab` find, and what they write of it as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saap_jax.evaluation.differences import AccuracyDifference, Difference
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import smallest_p_value
from saap_jax.evaluation.task_results import TaskResult, result_json
from saap_jax.runtime.files import plain


class Evaluated(NamedTuple):
    """One model: perplexities by metric name, and the results of tasks."""

    parameters: int
    ppl: dict[str, float]
    tasks: tuple[TaskResult, ...] = ()


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
    checks: tuple[Check, ...] = ()
    """A against the limits that were given."""

    @property
    def held(self) -> bool:
        """Tell whether no limit is broken."""
        return all(check.passed for check in self.checks)


def evaluation_json(rows: Mapping[str, Evaluated]) -> bytes:
    """Write the evaluation as a JSON object; of tasks, metrics as shares with standard errors, and every item."""
    models = [
        {"model": name, "parameters": row.parameters, "ppl": row.ppl, "tasks": [*map(result_json, row.tasks)]}
        for name, row in rows.items()
    ]
    return _encoded({"models": models})


def comparison_json(comparison: Comparison) -> bytes:
    """Write the comparison as a JSON object; differences in nats a token and in percent, each with its interval, of
    tasks in points, and the limits that there are.
    """

    def said(row: Compared | ComparedTask, **differences: Sequence[float]) -> dict[str, Any]:
        ends = {name: dict(zip(("value", "low", "high"), each, strict=True)) for name, each in differences.items()}
        return ends | {name: getattr(row.difference, name) for name in ("win_rate", "p_value", "sure", "sentence")}

    content: dict[str, Any] = {
        "a": comparison.a,
        "b": comparison.b,
        "seeds": comparison.seeds,
        "level": 0.95,
        "resamples": comparison.resamples,
        "smallest_p_value": smallest_p_value(comparison.resamples),
        "p_value_of": "one comparison, not adjusted for others",
        "metrics": [
            {"metric": row.metric, "domain": row.domain or None, "windows": row.windows, "ppl_a": row.ppl[0],
             "ppl_b": row.ppl[1], **said(row, percent=row.difference.percent, nats=row.difference[:3])}
            for row in comparison.metrics
        ],
        "tasks": [
            {"task": row.task, "metric": row.metric, "items": row.items, "accuracy_a": row.accuracy[0],
             "accuracy_b": row.accuracy[1], **said(row, points=row.difference[:3])}
            for row in comparison.tasks
        ],
    }  # fmt: skip
    if comparison.checks:
        limits = [check._asdict() for check in comparison.checks]
        content |= {"limits": limits, "held": comparison.held, "verdict": verdict(comparison.checks)}
    return _encoded(content)


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"
