"""Learned units in comparisons and in `saap prune`: the same by both, judged as any others, taken up again."""

import dataclasses

import numpy as np
import pytest
from saap_jax.config.search import LearnConfig, SearchConfig
from saap_jax.selection import choose

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.jobs import compare
from saap_jax.jobs import prune as pruning
from saap_jax.report.blocks import Figure, Table
from saap_jax.report.figures.draw import painted
from saap_jax.report.pages.compare import divergence_sections
from saap_jax.surgery.divergence import Divergence

pytestmark = pytest.mark.slow

SEARCH = SearchConfig(allocation="global", learn=LearnConfig(steps=6, rate=0.2))


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    return CompareConfig(
        name="learned",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=8, length=16, batch_size=2),
        estimation=EstimationConfig(estimators=("wanda",)),
        search=SEARCH,
        evaluation=EvaluationConfig(windows=4, length=16, batch_size=2),
        ratios=(0.4,),
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def run(config):
    return compare.compare(config)


def test_prune_and_compare_learn_the_same(config, run, tmp_path):
    words = {"model": config.model, "calibration": config.calibration, "estimator": "wanda", "ratio": 0.4}
    learnt = pruning.prune(PruneConfig(search=SEARCH, out=str(tmp_path / "a"), **words))
    before = pruning.prune(
        PruneConfig(search=dataclasses.replace(SEARCH, learn=LearnConfig()), out=str(tmp_path / "b"), **words)
    )
    with np.load(run.path / "keeps.npz") as keeps:
        for name, kept in learnt.selection.keep.items():
            np.testing.assert_array_equal(keeps[f"wanda@0.4/{name}"], kept)
    assert any((learnt.selection.keep[name] != kept).any() for name, kept in before.selection.keep.items())
    assert min(learnt.selection.divergences) < learnt.selection.divergences[0]
    assert len(learnt.selection.divergences) == 1 + 2  # rounds of three parts, one of four being held out
    said = dict(pruning.summary_rows(learnt))
    assert any("before and after units were chosen by it" in name for name in said)
    assert not any("before and after units were chosen by it" in name for name, _ in pruning.summary_rows(before))


def test_killed_while_it_learns_it_goes_on_from_the_last_round(config, run, tmp_path, monkeypatch):
    """Of two ratios the first is not learnt again, and of the second only the round that was not done."""
    asked, slope = [], Divergence.gradient

    def killed(self, gates, part):
        asked.append(part)
        if len(asked) == 11:
            raise KeyboardInterrupt
        return slope(self, gates, part)

    monkeypatch.setattr(Divergence, "gradient", killed)
    both = dataclasses.replace(config, ratios=(0.2, 0.4), runs=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(both)
    again = compare.compare(both)
    assert len(asked) == 11 + 3
    with np.load(again.path / "keeps.npz") as resumed, np.load(run.path / "keeps.npz") as whole:
        for name in whole:
            np.testing.assert_array_equal(resumed[name], whole[name])
    assert again.record["divergences"]["wanda@0.4"] == run.record["divergences"]["wanda@0.4"]
    assert set(again.record["divergences"]) == {"wanda@0.2", "wanda@0.4"}


def test_the_report_shows_each_round(run):
    """As the record holds it: before, at best and in which round, with the figure; and nothing where none was."""
    (curve,) = run.record["divergences"].values()
    assert len(curve) == 1 + 2
    (section,) = divergence_sections(run.record)
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    (line,) = map(table.cells, table.rows)
    best = min(range(3), key=curve.__getitem__)
    assert line == ["wanda@0.4", f"{curve[0]:.4f}", f"{curve[best]:.4f}", f"{best} of 2"]
    (figure,) = [block for block in section.blocks if isinstance(block, Figure)]
    (axes,) = painted(figure).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), curve)
    assert section.title in (run.path / "report.html").read_text()
    assert not divergence_sections({**run.record, "divergences": {}})


def test_taken_up_again_nothing_is_learnt_twice(config, run, tmp_path, monkeypatch):
    other = dataclasses.replace(config, runs=str(tmp_path))
    monkeypatch.setattr(compare, "best_candidate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(other)
    monkeypatch.undo()
    monkeypatch.setattr(choose, "learned", lambda *_, **__: pytest.fail("learnt again"))
    again = compare.compare(other)
    assert [row["ppl"] for row in again.candidates()] == [row["ppl"] for row in run.candidates()]
    assert again.record["divergences"] == run.record["divergences"]
