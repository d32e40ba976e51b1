"""What `saap ab` finds: A beside B on every text and task, in tables, in words, and as JSON."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from saap_jax.evaluation.differences import Check, Difference, decimals_of, verdict
from saap_jax.evaluation.resample import LEVEL, format_interval
from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.blocks import Block, said, text_table
from saap_jax.report.formats import VERDICT, format_change
from saap_jax.runtime.files import plain
from saap_jax.runtime.words import MINUS, plural

_COLOURED = {"PASS": "good", "FAIL": "bad"}
"""What is said of a limit -> mark of its row."""


class Compared(NamedTuple):
    """A beside B on one text or task."""

    name: str
    """The task, or the perplexity: `ppl@128 builtin:reference`."""
    about: str
    """Of a task its metric, such as `acc`; of a text "in" or "out" of the calibration domain of a run, else empty."""
    size: int
    """Windows, or items."""
    values: tuple[float, float]
    """Perplexities, of several seeds exp of the mean loss of all; or accuracies in percent."""
    difference: Difference


class Comparison(NamedTuple):
    """A beside B on every text and task."""

    a: str
    b: str
    seeds: int
    """Seeds that were compared in pairs; 1 for single models."""
    others: int
    """How many others a model was compared with, for which intervals are corrected."""
    metrics: tuple[Compared, ...]
    tasks: tuple[Compared, ...] = ()
    """The last one is of all tasks: its accuracies are the means of theirs."""
    checks: tuple[Check, ...] = ()
    """A against the limits that were given."""

    @property
    def held(self) -> bool:
        """Tell whether no limit is broken."""
        return all(check.passed for check in self.checks)


def comparison_json(comparison: Comparison) -> bytes:
    """Write the comparison as a JSON object; differences in nats a token and in percent, each with its interval, of
    tasks in points, and the limits that there are.
    """

    def row(one: Compared, names: Sequence[str], **differences: Sequence[float]) -> dict[str, Any]:
        values = (one.name, one.about or None, one.size, *one.values)
        ends = {name: dict(zip(("value", "low", "high"), each, strict=True)) for name, each in differences.items()}
        verdicts = {name: getattr(one.difference, name) for name in ("win_rate", "sure", "sentence")}
        return dict(zip(names, values, strict=True)) | ends | verdicts

    of_text = ("metric", "domain", "windows", "ppl_a", "ppl_b")
    of_task = ("task", "metric", "items", "accuracy_a", "accuracy_b")
    content: dict[str, Any] = {
        "a": comparison.a,
        "b": comparison.b,
        "seeds": comparison.seeds,
        "level": 1 - LEVEL,
        "corrected_for": comparison.others,
        "metrics": [
            row(one, of_text, percent=one.difference.percent, nats=one.difference[:3]) for one in comparison.metrics
        ],
        "tasks": [row(one, of_task, points=one.difference[:3]) for one in comparison.tasks],
    }
    if comparison.checks:
        limits = [check._asdict() for check in comparison.checks]
        content |= {"limits": limits, "held": comparison.held, "verdict": verdict(comparison.checks)}
    return json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """Set A beside B: tables of texts and tasks, both in words, and the limits beside what was measured, what is broken
    marked."""

    def line(one: Compared, name: str, form: Any) -> tuple[str, ...]:
        """Write A, B and their difference; the ends of its interval have as many digits as its middle."""
        value, low, high = one.difference.percent
        digits = decimals_of(value)
        interval = format_interval(low, high, lambda end: format_change(end, digits)) or "n/a"
        return (
            name,
            *map(form, one.values),
            format_change(value, digits),
            interval,
            f"{100 * one.difference.win_rate:.1f}",
        )

    texts = []
    for one in comparison.metrics:
        name = one.name
        if one.about:
            name += f" ({one.about})"
        texts.append(line(one, name, format_ppl))
    tasks = [line(one, f"{one.name} ({one.about}, {one.size:,} items)", "{:.1f}".format) for one in comparison.tasks]
    about = f"{VERDICT}: {plural(comparison.others, 'other')}"
    title = f"A: {comparison.a}\nB: {comparison.b}"
    heads = (("metric", "ppl A", "ppl B", f"A {MINUS} B %"), ("task", "acc A %", "acc B %", f"A {MINUS} B points"))
    blocks: list[Block] = [
        text_table(title, (*head, "95 % interval", "A wins %"), lines, notes=[about])
        for head, lines in zip(heads, (texts, tasks), strict=True)
        if lines
    ]
    blocks += said(*(f"{one.name}: {one.difference.sentence}" for one in (*comparison.metrics, *comparison.tasks)))
    if comparison.checks:
        header = ("limit", "of", "at most", "measured", "")
        lines = []
        for check in comparison.checks:
            word = "FAIL"
            if check.passed:
                word = "PASS"
            lines.append((*check[:4], word))
        table = text_table("A against the limits", header, lines, words=len(header))
        # by its mark a row is coloured; no column shows it
        marked = [{**row, "mark": _COLOURED[line[-1]]} for row, line in zip(table.rows, lines, strict=True)]
        blocks += [table._replace(rows=marked), *said(verdict(comparison.checks))]
    return blocks
