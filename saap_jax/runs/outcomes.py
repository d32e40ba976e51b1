"""What `saap evaluate`, `ab` and `gate` find, and what they write of it: JSON, JUnit XML."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saap_jax.evaluation.differences import AccuracyDifference, Difference
from saap_jax.evaluation.limits import Check, verdict
from saap_jax.evaluation.resample import smallest_p_value
from saap_jax.evaluation.tasks.results import TaskResult, result_json
from saap_jax.runs.directory import plain

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


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
