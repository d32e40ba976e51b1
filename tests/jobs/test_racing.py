"""A race on a tiny model: it agrees with the whole evaluation, takes fewer windows, and goes on after a kill."""

import dataclasses
import math

import numpy as np
import pytest

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import EvaluationConfig
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


def test_those_who_are_surely_worse_are_evaluated_on_fewer_windows(run):
    races = run.record["race"]
    assert any(race["evaluated"] < race["budget"] * race["keep_sets"] for race in races)
    for race in races:
        assert all((race["p_values"][name] > 0.05) == (name in race["left"]) for name in race["windows"])
        assert all(race["windows"][name] == max(race["windows"].values()) for name in race["left"])
        assert set(race["windows"].values()) <= set(looks_of(40, 8))


def test_whole_rows_are_those_of_a_whole_evaluation(run, whole):
    known = {row["candidate"]: row for row in whole.candidates()}
    rows = {row["candidate"]: row for row in run.candidates()}
    assert rows.keys() == known.keys()
    assert any("windows" in row for row in rows.values())
    for name, row in rows.items():
        assert row["keep"] == known[name]["keep"]
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
        assert {row.label for row in group if row.tied or row.best} == set(race["left"])
    judged = [(row, row.against[OUT]) for row in rows if OUT in row.against]
    races = {race["ratio"]: race["p_values"] for race in run.record["race"]}
    assert judged
    assert all(one.p_value == races[row.asked][row.label] for row, one in judged)


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
