"""What places cost: with what each is compared, and which cost as much."""

import numpy as np
import pytest

from saap_jax.contrib import suggestions
from saap_jax.contrib.sensitivity.page import extreme_table, marks_of
from saap_jax.contrib.sensitivity.profiles import as_costly, changes_of
from saap_jax.report.formats import BEST, TIED

METRIC, WINDOWS, COSTS = "loss held_out", 24, (1.0, 0.5, 0.1, 0.01)


def run_of(names, traced: bool):
    """Return the record and the lines of a run in which each place has a cost of its own, up to noise."""
    rng = np.random.default_rng(0)
    dense = rng.normal(3, 0.3, WINDOWS)
    record = {
        "config": {"judged": "out", "ratio": 0.5, "estimator": "wanda"},
        "metrics": [{"name": METRIC, "domain": "out"}],
        "dense": {"losses": {METRIC: dense.tolist()}, "ppl": {METRIC: float(dense.mean())}},
    }
    rows = [
        {
            "structure": name, "layer": layer, "asked": 0.5, "actual": 0.5, "removed": 100,
            "losses": {METRIC: (dense + cost + rng.normal(0, 0.01, WINDOWS)).tolist()},
        } | ({"among": "all"} if traced else {})
        for (name, layer), cost in zip(names, COSTS, strict=True)
    ]  # fmt: skip
    return record, rows


@pytest.mark.parametrize("traced", [True, False])
def test_places_are_told_apart_by_what_they_are_compared_with(traced):
    """Structures of a traced model among each other, layers of a structure of ours."""
    names = [(f"layers/{place}", 0) for place in range(4)] if traced else [("mlp", place) for place in range(4)]
    record, rows = run_of(names, traced)
    changes = sorted(changes_of(record, rows), key=lambda change: -change.nats)
    assert [change.relative for change in changes] == pytest.approx(np.array(COSTS) / np.mean(COSTS), rel=0.2)
    assert all(each.sure for each in as_costly(record, rows, changes[0], changes[1:]))
    assert TIED not in marks_of(record, rows, changes).values()
    notes = " ".join(extreme_table(record, rows).notes)
    assert f"beside that of {'all structures' if traced else 'all layers of the structure'} together" in notes


def test_places_that_cost_the_same_are_tied():
    record, rows = run_of([("a", 0), ("b", 0), ("c", 0), ("d", 0)], traced=True)
    for row in rows[1:]:
        row["losses"] = {METRIC: (np.array(rows[0]["losses"][METRIC]) + 1e-3 * np.sin(np.arange(WINDOWS))).tolist()}
    changes = changes_of(record, rows)
    assert all(each.tied for each in as_costly(record, rows, changes[0], changes[1:]))


def test_articles_are_the_units_where_a_run_knows_them():
    """In all that is said of places and of what was tried, as `saap ab` says it of the same."""
    record, rows = run_of([("mlp", place) for place in range(4)], traced=False)
    by_window, record["trials"] = changes_of(record, rows), [{}]
    record["articles"] = {METRIC: [window // 2 for window in range(WINDOWS)]}
    changes = changes_of(record, rows)
    assert all(one.low != other.low for one, other in zip(changes, by_window, strict=True))
    assert {each.windows for each in as_costly(record, rows, changes[0], changes[1:])} == {WINDOWS // 2}
    assert suggestions._difference(record, *rows[:2]).windows == WINDOWS // 2


def test_places_are_marked_where_there_are_no_intervals_and_no_average():
    record, rows = run_of([("mlp", place) for place in range(4)], traced=False)
    for losses in (record["dense"]["losses"], *(row["losses"] for row in rows)):
        losses[METRIC] = losses[METRIC][:5]
    for row, sign in zip(rows, (1, -1, 1, -4), strict=True):
        row["losses"][METRIC] = (np.array(record["dense"]["losses"][METRIC]) + sign).tolist()
    assert all(np.isnan([change.low, change.relative]).all() for change in changes_of(record, rows))
    table = extreme_table(record, rows)
    assert [row["sign"] for row in table.rows] == [BEST, "", "", BEST]


def test_a_loss_that_is_no_number_leaves_the_others_in_their_order():
    record, rows = run_of([("mlp", place) for place in range(4)], traced=False)
    for row, cost in zip(rows, (0.01, np.nan, 1.0, 0.5), strict=True):
        row["losses"] = {METRIC: (np.array(record["dense"]["losses"][METRIC]) + cost).tolist()}
    table = extreme_table(record, rows)
    assert [row["layer"] for row in table.rows] == [1, 2, 3, 0]
    assert not [cell for cell in table.cells(table.rows[0]) if "nan" in cell]


def test_percent_of_a_race_are_of_the_whole_text():
    """The interval about the value: both are beside the unpruned model's loss on all windows."""
    record, rows = run_of([("a", 0), ("b", 0), ("c", 0), ("d", 0)], traced=True)
    dense = np.array(record["dense"]["losses"][METRIC])
    few = np.argsort(dense)[:12]
    losses = np.full(WINDOWS, None)
    losses[few] = np.array(rows[0].pop("losses")[METRIC])[few]
    rows[0] |= {"windows": 12, "seen": {METRIC: losses.tolist()}}
    change = next(each for each in changes_of(record, rows) if each.structure == "a")
    assert change.low < change.percent < change.high
    assert change.percent == pytest.approx(100 * change.nats / dense.mean())
    assert change.percent == pytest.approx((change.low + change.high) / 2)
