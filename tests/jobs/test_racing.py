"""A race on a tiny model: it agrees with the whole evaluation, takes fewer windows, and goes on after a kill."""

import dataclasses
import math

import numpy as np
import pytest

from saap_jax.config.jobs import CompareConfig, FrontierConfig, SensitivityConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.contrib.frontier import command as frontier
from saap_jax.contrib.frontier.page import frontier_findings
from saap_jax.contrib.sensitivity import command as sensitivity
from saap_jax.contrib.sensitivity.page import sensitivity_findings
from saap_jax.contrib.sensitivity.profiles import changes_of
from saap_jax.jobs import compare
from saap_jax.jobs.racing import looks_of
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import comparison_rows
from tests.jobs.conftest import tiny

pytestmark = pytest.mark.slow

OUT = "ppl@16 builtin:descriptions"


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    methods = ("{magnitude,gate_taylor,random,wanda}", "{magnitude,wanda} > uniform > bias")
    evaluation = EvaluationConfig(windows=40, length=16, batch_size=8)
    options = {"name": "raced", "methods": methods, "ratios": (0.2, 0.6), "race": True, "evaluation": evaluation}
    return tiny(CompareConfig, tiny_model_directory, tmp_path_factory.mktemp("runs"), examples=5, **options)


@pytest.fixture(scope="module")
def run(config) -> RunDirectory:
    return compare.compare(config)


@pytest.fixture(scope="module")
def whole(config) -> RunDirectory:
    """The same without a race."""
    return compare.compare(dataclasses.replace(config, race=False, name="whole"))


def test_the_lowest_of_all_is_among_those_that_are_left(run, whole):
    assert [race["ratio"] for race in run.record["race"]] == [0.2, 0.6]
    for race in run.record["race"]:
        rows = [row for row in whole.candidates() if row["ratio_asked"] == race["ratio"]]
        lowest = min(rows, key=lambda row: row["ppl"][OUT])
        assert lowest["variant"] in race["left"]
        assert race["ending"] in ("alone", "tied", "spent")
        assert race["metric"] == OUT


def test_windows_are_the_units_of_a_race_and_of_its_table(run, whole):
    assert run.record["articles"] == {}
    assert whole.record["articles"], "control"


def test_those_who_are_surely_worse_are_evaluated_on_fewer_windows(run):
    races = run.record["race"]
    assert any(race["evaluated"] < race["budget"] * race["keep_sets"] for race in races)
    for race in races:
        assert all(race["windows"][name] == max(race["windows"].values()) for name in race["left"])
        assert set(race["windows"].values()) <= set(looks_of(40, 8))


def test_whole_rows_are_those_of_a_whole_evaluation(run, whole):
    known = {row["candidate"]: row for row in whole.candidates()}
    rows = {row["candidate"]: row for row in run.candidates()}
    assert rows.keys() == known.keys()
    assert any("windows" in row for row in rows.values())
    for name, row in rows.items():
        assert (row["keep"], row["parameters"]) == (known[name]["keep"], known[name]["parameters"])
        if "windows" in row:
            assert "losses" not in row
            assert row["windows"] < 40
            continue
        for metric, losses in row["losses"].items():
            np.testing.assert_allclose(losses, known[name]["losses"][metric], rtol=2e-5)
            assert row["ppl"][metric] == pytest.approx(math.exp(np.mean(losses)), rel=1e-9)


def test_an_estimate_is_the_difference_from_the_dense_model_on_the_same_windows(run, whole):
    dense = np.array(run.record["dense"]["losses"][OUT])
    order = np.random.default_rng(0).permutation(40)
    known = {row["candidate"]: np.array(row["losses"][OUT]) for row in whole.candidates()}
    for row in run.candidates():
        if "windows" in row:
            at = order[: row["windows"]]
            expected = math.exp(dense.mean() + np.mean(known[row["candidate"]][at] - dense[at]))
            assert row["ppl"][OUT] == pytest.approx(expected, rel=1e-5)


def test_the_best_is_one_of_those_that_are_left(run):
    rows = comparison_rows(run.record, run.candidates())
    for race in run.record["race"]:
        group = [row for row in rows if row.asked == race["ratio"]]
        assert [row.label for row in group[: len(race["left"])] if row.label not in race["left"]] == []
        assert [row.best for row in group] == [True] + [False] * (len(group) - 1)
        assert race["ending"] != "spent" or {row.label for row in group if row.tied or row.best} >= set(race["left"])
        took = {row.label: row.against[OUT].windows for row in group if not row.best}
        whole = {*race["left"], *(label for label in took if "bias" in label)}  # a repaired model is evaluated at once
        assert took == {label: 40 if label in whole else race["windows"][label] for label in took}
        sure = {row.label: row.against[OUT].sure for row in group if not row.best}
        assert all(row.tied == (row.label in race["left"] and not sure[row.label]) for row in group if not row.best)


def test_whoever_is_left_has_all_windows_whenever_the_race_ends(config, tmp_path):
    """One variant races against none; several may be told apart, or be as good as each other, at the first look."""
    for name, options in {
        "alone": {"methods": ("wanda",)},
        "early": {"race_margin": 5.0},
    }.items():
        changed = dataclasses.replace(config, name=name, runs=str(tmp_path), **options)
        run = compare.compare(changed)
        rows = {row["candidate"]: row for row in run.candidates()}
        for race in run.record["race"]:
            assert race["ending"] != "spent"
            assert max(race["windows"].values()) < race["budget"] == 40
            left = [row for row in rows.values() if row["variant"] in race["left"]]
            assert left
            assert all(len(losses) == 40 for row in left for losses in row["losses"].values())
        again = compare.compare(changed)
        assert again.candidates() == run.candidates()


# --- the other commands ----------------------------------------------------------------------------


def raced_and_whole(command, kind, model, runs, **options):
    """Run a command in a race and without one; their rows by candidate."""
    evaluation = EvaluationConfig(windows=48, length=16, batch_size=8)
    config = tiny(kind, model, runs, examples=5, evaluation=evaluation, race=True, **options)
    raced, whole = (command(dataclasses.replace(config, race=race, name=f"race-{race}")) for race in (True, False))
    again = command(dataclasses.replace(config, name="again"))  # of the cache
    assert [row | {"seconds": 0} for row in again.candidates()] == [r | {"seconds": 0} for r in raced.candidates()]
    rows = [{row["candidate"]: row for row in run.candidates()} for run in (raced, whole)]
    took = raced.record["raced"]
    assert took["evaluated"] < took["budget"] * took["keep_sets"]
    assert any("windows" in row for row in rows[0].values())
    for name in rows[0].keys() & rows[1].keys():
        row, losses = rows[0][name], rows[1][name]["losses"]
        for metric, values in row.get("losses", row.get("seen")).items():
            known = [number for number, value in enumerate(values) if value is not None]
            assert len(known) == row.get("windows", 48)
            np.testing.assert_allclose([values[k] for k in known], [losses[metric][k] for k in known], rtol=2e-5)
    return raced, whole


def test_a_point_of_a_curve_races_with_the_limit(tiny_model_directory, tmp_path):
    options = {"methods": ("gate_fisher > global", "wanda > global"), "ratios": (0.1, 0.4, 0.7), "tolerance": 0.05}
    raced, whole = raced_and_whole(
        frontier.frontier, FrontierConfig, tiny_model_directory, tmp_path, max_ppl_increase="2%", **options
    )
    found, expected = (run.record["frontier"] for run in (raced, whole))
    assert found["limit"] == pytest.approx(expected["limit"])
    rows = {row["candidate"]: row for row in raced.candidates()}
    for line, other in zip(found["lines"], expected["lines"], strict=True):
        assert (line["variant"], line["ratio"], line["breaks_at"]) == tuple(
            other[name] for name in ("variant", "ratio", "breaks_at")
        )
        assert "windows" not in rows.get(line["candidate"], {}), "what is found has all windows"
    for row in rows.values():
        sure = next(each for each in whole.candidates() if each["candidate"] == row["candidate"])
        assert (row["ppl"][OUT] <= found["limit"]) == (sure["ppl"][OUT] <= found["limit"])
    assert "% of the windows were evaluated" in str(frontier_findings(raced))


def test_a_place_races_with_the_unpruned_model(tiny_model_directory, tmp_path):
    """Its interval is that of the windows it took: wider where it left early, and about the change on all windows."""
    raced, whole = raced_and_whole(
        sensitivity.sensitivity, SensitivityConfig, tiny_model_directory, tmp_path, fractions=(0.3, 1.0), ratio=0.15,
        method="gate_fisher > within(attention=0.0) > uniform",
    )  # fmt: skip
    changes, expected = (
        {each[:3]: each for each in changes_of(run.record, run.candidates())} for run in (raced, whole)
    )
    assert changes.keys() == expected.keys()
    rows = {(row["layer"], row["structure"], row["asked"]): row for row in raced.candidates() if "layer" in row}
    dense = np.array(raced.record["dense"]["losses"][OUT])
    for place, row in rows.items():
        change = changes[place]
        if "windows" in row:
            values = [(own, other) for own, other in zip(row["seen"][OUT], dense, strict=True) if own is not None]
            assert change.nats == pytest.approx(np.mean([own - other for own, other in values]))
            assert change.low < change.percent < change.high
            assert change.high - change.low > expected[place].high - expected[place].low
            assert (change.nats > 0) == (expected[place].nats > 0)
        else:
            assert change.nats == pytest.approx(expected[place].nats, abs=1e-6)
    assert "% of the windows were evaluated" in str(sensitivity_findings(raced))
