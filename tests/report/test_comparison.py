"""What `ab` shows and writes: rows, and JSON that parses."""

import json
import math

import numpy as np
import pytest

from saap_jax.evaluation.differences import check_difference, paired_difference, paired_tasks
from saap_jax.report.blocks import Table, Words
from saap_jax.report.comparison import Compared, Comparison, comparison_blocks, comparison_json
from tests.report.shown import printed


def sentences(comparison: Comparison) -> list[str]:
    return [block.text for block in comparison_blocks(comparison) if isinstance(block, Words)]


def tables(comparison: Comparison) -> list[Table]:
    return [block for block in comparison_blocks(comparison) if isinstance(block, Table)]


@pytest.fixture
def comparison() -> Comparison:
    b = np.random.default_rng(0).normal(3, 1, (1, 24))
    c = b.copy()
    c[0, 0] = math.inf
    rows = [
        Compared("ppl@128 builtin:reference", "in", 24, (30.0, 20.0), paired_difference(b + 0.4, b)),
        Compared("ppl@128 builtin:descriptions", "out", 24, (20.0, 20.0), paired_difference(b, b)),
        Compared("ppl@128 text:x[/]y.txt", "", 24, (math.inf, 20.0), paired_difference(c, b)),
        Compared("ppl@128 text:z.txt", "", 24, (math.inf, math.inf), paired_difference(c, c)),
    ]
    return Comparison("runs/x:wanda [a]@0.2", "runs/x:dense", 1, 7, tuple(rows))


def test_table_and_sentences(comparison):
    text = printed(*tables(comparison))
    assert max(map(len, text.splitlines())) <= 100
    for part in ("wanda [a]@0.2", "+49.2", "+49.2 to +49.2", "corrected for how many were compared: 7 others", "inf"):
        assert part in text
    assert "x[/]y" in text.replace("\n", "")
    assert "nan" not in text
    first, second, third, _ = sentences(comparison)
    assert first == "ppl@128 builtin:reference: A has a higher perplexity than B by 49.2 % (49.2 to 49.2 %)"
    assert second.endswith("the difference is exactly 0")
    assert third.endswith("not finite")


def test_of_few_windows_and_items_there_is_no_interval_and_no_verdict():
    b = np.random.default_rng(0).normal(3, 1, (1, 2))
    rows = (Compared("ppl@8 text:x", "", 2, (30.0, 20.0), paired_difference(b + 0.4, b)),)
    right = np.array([True, True, False])
    difference = paired_tasks({"boolq": right[None]}, {"boolq": ~right[None]})["boolq"]
    tasks = (Compared("boolq", "acc", 3, (66.7, 0.0), difference),)
    comparison = Comparison("a", "b", 1, 1, rows, tasks)
    for table, wanted in zip(tables(comparison), ("+49.2", "+33.3"), strict=True):
        text = printed(table)
        assert wanted in text
        assert "n/a" in text
        assert "nan" not in text
        assert " to +" not in text
    found = json.loads(comparison_json(comparison))
    assert not any(row["sure"] for row in (*found["metrics"], *found["tasks"]))
    assert all("who is better is not known" in said for said in sentences(comparison))
    assert len(sentences(comparison)) == 2
    for check, what in ((check_difference("m", rows[0].difference, 5.0), "windows; here are 2"),
                        (check_difference("t", tasks[0].difference, 5.0), "items; here are 3")):  # fmt: skip
        assert check.measured.endswith(f"without an interval, which takes 8 {what}")


def test_json(comparison):
    found = json.loads(comparison_json(comparison))
    assert found["a"] == comparison.a
    assert found["corrected_for"] == 7
    first, second, third, _ = found["metrics"]
    assert first["percent"]["value"] == pytest.approx(100 * math.expm1(0.4))
    assert first["sure"]
    assert (second["nats"]["value"], second["win_rate"], second["sure"]) == (0, 0.5, False)
    assert (third["ppl_a"], third["sure"], third["domain"]) == ("Infinity", False, None)
