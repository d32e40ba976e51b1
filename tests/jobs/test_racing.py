"""A race on a tiny model: it agrees with the whole evaluation, takes fewer windows, and goes on after a kill."""

import dataclasses
import math

import numpy as np
import pytest

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.jobs import candidates, compare
from saap_jax.jobs.racing import looks_of
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import against_best, comparison_rows, merged

pytestmark = pytest.mark.slow

OUT = "ppl@16 builtin:descriptions"


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    return CompareConfig(
        name="raced",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=5, length=16, batch_size=2),
        methods=("{magnitude,gate_taylor,random,wanda}", "{magnitude,wanda} > uniform > bias"),
        evaluation=EvaluationConfig(windows=40, length=16, batch_size=8),
        ratios=(0.2, 0.6),
        runs=str(tmp_path_factory.mktemp("runs")),
        race=True,
    )


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


def test_the_p_values_that_are_shown_are_those_of_the_race(run):
    candidates = run.candidates()
    shown = against_best(run.record, merged(candidates), comparison_rows(run.record, candidates))
    races = {race["ratio"]: race["p_values"] for race in run.record["race"]}
    judged = [one for one in shown if one.metric == OUT]
    assert judged
    assert all(one.p_value == races[one.asked][one.label] for one in judged)


def test_the_page_says_what_the_verdict_is_of(run):
    page = (run.path / "report.html").read_text()
    assert "of the windows were evaluated; the verdict is of these keep-sets on such text" in page
    assert "t-tests valid at any time" in page


@pytest.mark.parametrize("moment", [0, 3, 7])
def test_a_killed_race_goes_on_to_the_same_end(config, run, tmp_path, monkeypatch, moment):
    """To the last bit of what is measured; what was evaluated is not evaluated again."""
    other, keep = dataclasses.replace(config, runs=str(tmp_path)), candidates.Cache.keep
    kept: list[str] = []

    def dying(self, key, value):
        if len(kept) == moment:
            raise KeyboardInterrupt
        kept.append(key)
        keep(self, key, value)

    monkeypatch.setattr(candidates.Cache, "keep", dying)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(other)
    again: list[str] = []
    monkeypatch.setattr(candidates.Cache, "keep", lambda self, key, value: (again.append(key), keep(self, key, value)))
    finished = compare.compare(other)
    assert not set(again) & set(kept)
    assert finished.record["race"] == run.record["race"]
    same = [{key: value for key, value in row.items() if key != "seconds"} for row in finished.candidates()]
    assert same == [{key: value for key, value in row.items() if key != "seconds"} for row in run.candidates()]


def test_several_seeds_run_together(config, tmp_path):
    other = dataclasses.replace(
        config, runs=str(tmp_path), methods=("{magnitude,gate_taylor,random,wanda}",), seeds=(0, 1), ratios=(0.6,),
        name="seeds",
        evaluation=dataclasses.replace(config.evaluation, windows=16),
    )  # fmt: skip
    run = compare.compare(other)
    (race,) = run.record["race"]
    assert set(race["windows"]) == {"magnitude", "gate_taylor", "random", "wanda"}
    assert "of the means over these 2 calibration seeds" in (run.path / "report.html").read_text()


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


def test_too_few_windows_and_margins_that_are_none_are_refused(config, tmp_path):
    few = dataclasses.replace(config.evaluation, windows=7)
    with pytest.raises(ValueError, match="evaluation.windows: expected at least 8 for a race, got 7"):
        compare.compare(dataclasses.replace(config, evaluation=few, runs=str(tmp_path)))
    with pytest.raises(ValueError, match="race_margin: expected a number of at least 0, got -1"):
        dataclasses.replace(config, race_margin=-1.0)
