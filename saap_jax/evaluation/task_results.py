"""What came of zero-shot tasks, local ones and those of lm-evaluation-harness."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class TaskResult(NamedTuple):
    """Outcomes of one task; `values` has a list as long as `ids` for each metric."""

    task: str
    """Its name, as it was asked for."""
    source: str
    """Where its items came from: a file, or "lm-eval 0.4.13"."""
    ids: tuple[str, ...]
    values: Mapping[str, Float[np.ndarray, "items"]]
    """{metric: value of each item}: 1 and 0 of `acc`, `acc_norm` and `exact_match`."""
    log_likelihoods: tuple[tuple[float, ...], ...] = ()
    """Of each choice of each item, in nats; none for tasks of other kinds."""

    def mean(self, metric: str) -> float:
        """The mean over the items: for `acc`, the accuracy."""
        return float(np.mean(self.values[metric]))

    def standard_error(self, metric: str) -> float:
        """The standard error of the mean, s / sqrt(n) with s² over n - 1; NaN for one item.

        Source: `mean_stderr` of lm-evaluation-harness.
        """
        values = self.values[metric]
        if len(values) > 1:
            return float(np.std(values, ddof=1) / math.sqrt(len(values)))
        return math.nan


METRICS = ("acc", "exact_match")
"""Metrics of which one model's is compared with another's, in the order of preference; all are 0 or 1 an item."""


def compared_metric(result: TaskResult, metric: str = "auto") -> str:
    """Choose the metric by which two models are compared: the one asked for, or of `auto` the first of `METRICS`.

    Raises:
        ValueError: the task does not have it, or its values are not 0 and 1.
    """
    wanted = METRICS if metric == "auto" else (metric,)
    for name in wanted:
        found = [key for key in result.values if key == name or key.startswith(f"{name},")]
        if found and set(np.unique(result.values[found[0]])) <= {0.0, 1.0}:
            return found[0]
    raise ValueError(
        f"task {result.task}: expected {' or '.join(wanted)} of 0 or 1 an item, it has {', '.join(result.values)}"
    )


def result_json(result: TaskResult) -> dict[str, Any]:
    """Write a result as JSON values: metrics with standard errors, and every item."""
    metrics = {
        name: {"value": result.mean(name), "standard_error": result.standard_error(name)} for name in result.values
    }
    items: list[dict[str, Any]] = []
    for number, name in enumerate(result.ids):
        item: dict[str, Any] = {"id": name, **{key: float(each[number]) for key, each in result.values.items()}}
        if result.log_likelihoods:
            item["log_likelihoods"] = list(result.log_likelihoods[number])
        items.append(item)
    return {"task": result.task, "source": result.source, "metrics": metrics, "items": items}
