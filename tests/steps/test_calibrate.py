"""From text to scores: scenarios apart and together, what a run keeps, and scoring it without a second pass."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import saap_jax
from saap_jax.config.jobs import PruneConfig, ScoreConfig
from saap_jax.config.method import CalibrationConfig, ModelConfig
from saap_jax.data.windows import Windows
from saap_jax.jobs import prune
from saap_jax.jobs.score import calibration_of, score_run, scores_of
from saap_jax.runs import scores as kept_module
from saap_jax.runs.scores import read_scores
from saap_jax.steps.allocation.allocation import choose
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.limits import Within
from saap_jax.steps.score.stability import fluctuation_of, reduce_scenarios, standardised
from saap_jax.subjects.llama import LlamaSubject, scenarios_of
from saap_jax.types import STRUCTURES

SCENARIOS = ("code=builtin:reference", "prose=builtin:descriptions")
NAMES = ("gate_taylor", "wanda", "gate_taylor+wanda")


@pytest.fixture(scope="module")
def score_config(tiny_model_directory, tmp_path_factory) -> ScoreConfig:
    return ScoreConfig(
        name="kept",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(scenarios=SCENARIOS, examples=3, length=16, batch_size=2),
        estimators=("taylor_element_second", "gate_taylor", "activation_frequency"),
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def kept(score_config):
    return score_run(score_config)


@pytest.fixture(scope="module")
def session(score_config):
    model = saap_jax.load_model(score_config.model.name)
    tokenizer = saap_jax.load_tokenizer(score_config.model.name)
    return model, scenarios_of(score_config.calibration, tokenizer)


@pytest.fixture(scope="module")
def both(session):
    model, windows = session
    return saap_jax.score_units(model, windows, NAMES, stability=True, batch_size=2)


def assert_scores_equal(first, second):
    for name in STRUCTURES:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.slow
def test_scenarios_are_scored_apart_and_reduced_when_asked(session, both):
    model, windows = session
    assert list(both.scenarios) == ["code", "prose"]
    assert list(both.fusions["prose"]) == ["gate_taylor+wanda"]
    for scenario, text in windows.items():
        alone = saap_jax.score_units(model, text, NAMES, batch_size=2)
        for name in NAMES:
            assert_scores_equal(both.scenarios[scenario][name], alone.scores(name))
    for name in NAMES:
        apart = {scenario: scores[name] for scenario, scores in both.scenarios.items()}
        assert not np.allclose(apart["code"]["mlp"], apart["prose"]["mlp"])
        for reduction in ("mean", "max", "min_rank"):
            assert_scores_equal(both.scores(name, reduction), reduce_scenarios(apart, reduction))


@pytest.mark.slow
def test_stability_is_over_the_examples_of_all_scenarios_or_over_scenarios(session, both):
    model, windows = session
    joined = saap_jax.data.windows.Windows(*(np.concatenate(parts) for parts in zip(*windows.values(), strict=True)))
    together = saap_jax.score_units(model, joined, NAMES, stability=True, batch_size=2)
    for name in STRUCTURES:
        np.testing.assert_allclose(
            both.indicator("wanda")[name], together.indicator("wanda")[name], rtol=2e-3, atol=2e-3
        )
    apart = [both.scenarios[scenario]["wanda"] for scenario in windows]
    varies = fluctuation_of({n: np.stack([s[n] for s in apart]) for n in STRUCTURES})
    by_hand = {name: standardised(values) for name, values in varies.items()}
    over_scenarios = both.indicator("wanda", "scenarios")
    assert_scores_equal(over_scenarios, by_hand)
    assert not np.allclose(over_scenarios["mlp"], both.indicator("wanda")["mlp"], atol=0.1)


@pytest.mark.parametrize(
    "scope", ["structure", *(pytest.param(each, marks=pytest.mark.slow) for each in ("global", "layer"))]
)
def test_what_has_to_be_stable_is_the_importance_itself_of_each_example(session, scope):
    """A fusion's by the σ of all examples, though each example alone would have others; not that of gate gradients."""
    model, windows = session
    text, members = windows["prose"], ("taylor_vector(within=channel)", "taylor_element")
    fused = f"fused({', '.join(members)}, attention=fused, scope={scope})"
    scored = saap_jax.score_units(model, text, [fused, "gate_taylor"], stability=True, batch_size=3)
    one = [saap_jax.score_units(model, Windows(*(part[at : at + 1] for part in text)), [*members, fused])
           for at in range(len(text.tokens))]  # fmt: skip
    fusion = scored.fusions["calibration"][fused]
    together, apart = {}, {}
    for name in STRUCTURES:
        layers = len(one[0].scores(fused)[name])
        scopes = {"structure": [name] * layers, "global": ["global"] * layers}
        places = scopes.get(scope, [f"{name}/{layer}" for layer in range(layers)])
        weights = {m: np.array([fusion.weights[m][each] for each in places])[:, None] for m in members}
        together[name] = np.stack([sum(weights[m] * each.scores(m)[name] for m in members) for each in one])
        apart[name] = np.stack([each.scores(fused)[name] for each in one])
        expected = standardised(together[name].std(0) / together[name].mean(0))
        np.testing.assert_allclose(scored.indicator(fused)[name], expected, rtol=2e-3, atol=2e-3)
    other = standardised(apart["mlp"].std(0) / apart["mlp"].mean(0))
    assert np.abs(scored.indicator(fused)["mlp"] - other).max() > 0.05, "control: the σ of each example"
    gates = scored.indicator("gate_taylor")["mlp"]
    assert np.abs(scored.indicator(fused)["mlp"] - gates).max() > 0.1, "control: gate gradients"


def test_steps_say_how_scenarios_are_reduced_and_what_is_to_be_stable(session, both):
    model, windows = session
    steps = ["scenarios(mean)", "scenarios(max)", "scenarios(min_rank)"]
    steps += ["stable(1.0)", "stable(1.0, over=scenarios)"]
    kept = {
        step: saap_jax.select_units(model, both, 0.4, f"{step} > global", estimator="gate_taylor").keep
        for step in steps
    }
    assert len({tuple(keep["mlp"].ravel()) for keep in kept.values()}) >= 4, "the options change what is kept"
    assert_scores_equal(
        kept["stable(1.0, over=scenarios)"],
        saap_jax.run_chain(
            model, "gate_taylor > stable(1.0, over=scenarios) > global", windows, 0.4, batch_size=2
        ).keep,
    )
    alone = both._replace(scenarios={"code": both.scenarios["code"]})
    with pytest.raises(ValueError, match="scenarios expects two or more calibration scenarios"):
        saap_jax.select_units(model, alone, 0.4, "stable(over=scenarios) > global", estimator="gate_taylor")


@pytest.mark.slow
def test_kept_statistics_score_any_formula_without_a_pass(score_config, kept, session, tmp_path, monkeypatch):
    run, _ = kept
    model, windows = session
    fused = "fused(estimators=(gate_taylor, taylor_element), method=learned)"
    names = ("fisher", "taylor_element(reduction='max')", "gate_fisher", fused)
    fresh = saap_jax.score_units(model, windows, names, batch_size=2)
    monkeypatch.setattr("saap_jax.subjects.llama.observe", lambda *_, **__: pytest.fail("observed again"))
    monkeypatch.setattr("saap_jax.llama.files.tokenizer.load_tokenizer", lambda *_: pytest.fail("looked for text"))
    config = dataclasses.replace(
        score_config,
        name="again",
        runs=str(tmp_path),
        from_run=str(run.path),
        estimators=names,
    )
    again, calibrated = score_run(config)
    assert again.record["scenarios"] == run.record["scenarios"] == {"code": [3, 16], "prose": [3, 16]}
    for scenario, expected in fresh.scenarios.items():
        for name in names:
            for structure in STRUCTURES:  # one pass more observes one statistic more: another program, other rounding
                values = calibrated.scenarios[scenario][name][structure]
                np.testing.assert_allclose(values, expected[name][structure], rtol=1e-4, atol=1e-9)
    assert not np.allclose(calibrated.scores("fisher")["mlp"], calibrated.scores("gate_fisher")["mlp"])


@pytest.mark.slow
def test_statistics_that_are_not_there_are_named(score_config, kept, tmp_path):
    small = dataclasses.replace(score_config, name="small", runs=str(tmp_path), keep_statistics="small")
    run, _ = score_run(small)
    sizes = [sum(path.stat().st_size for path in (r.path / "statistics").iterdir()) for r in (run, kept[0])]
    assert sizes[0] < sizes[1]
    again = dataclasses.replace(
        score_config,
        name="again",
        runs=str(tmp_path),
        from_run=str(run.path),
        estimators=("fisher",),
    )
    message = r"from_run: .*small kept neither scores of fisher nor .* --keep-statistics all"
    with pytest.raises(ValueError, match=message):
        score_run(again)
    assert not (tmp_path / "again" / "scores.npz").exists()
    ok, _ = score_run(dataclasses.replace(again, estimators=("gate_fisher",)))
    assert ok.finished
    assert "left_out" not in ok.record, "all that were named are there"
    none = dataclasses.replace(score_config, name="none", runs=str(tmp_path), keep_statistics="none")
    run, _ = score_run(none)
    assert not (run.path / "statistics").exists()
    with pytest.raises(FileNotFoundError, match="run `saap score` with --keep-statistics all"):
        score_run(dataclasses.replace(again, name="b", from_run=str(run.path)))
    with pytest.raises(ValueError, match="observed the model .*tiny, got smollm2-135m"):
        score_run(dataclasses.replace(again, name="c", model=ModelConfig()))
    other = dataclasses.replace(again.model, dtype="bfloat16")
    with pytest.raises(ValueError, match="small observed another model than is there now, or of"):
        score_run(dataclasses.replace(again, name="d", model=other, estimators=("gate_fisher",)))


@pytest.mark.slow
def test_kept_scores_of_a_file_are_served_by_the_same_code_alone(score_config, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from saap_jax.estimation.registry import make_estimator\n\ndef own():\n    return make_estimator('fisher')\n"
    )
    options = {"runs": str(tmp_path), "estimators": (f"{file}:own",)}
    run, made = score_run(dataclasses.replace(score_config, name="small", keep_statistics="small", **options))
    again = ScoreConfig(
        name="again", model=score_config.model, from_run=str(run.path), mesh=score_config.mesh, **options
    )
    for scenario, scores in score_run(again)[1].scenarios.items():
        assert_scores_equal(scores[f"{file}:own"], made.scenarios[scenario][f"{file}:own"])
    file.write_text(file.read_text().replace("fisher", "taylor_element"))
    with pytest.raises(ValueError, match=r"small kept neither scores of .*own nor the statistics that it needs"):
        score_run(dataclasses.replace(again, name="other"))


OWN = """
import jax
import jax.numpy as jnp
from saap_jax.estimation.base import Estimator, Statistic
from saap_jax.estimation.base import like_units, mean_over

PUSH = Statistic(
    name="push",
    init=lambda model, plan: like_units(model),
    source="gates",
    contribute=lambda gates: jax.tree.map(lambda gradient: jnp.sum(gradient**4, axis=0), gates),
    accumulation=mean_over("examples"),
)
"""
FORMULA = """
from own_statistic import PUSH, Estimator

def pushed():
    return Estimator(needs=frozenset({PUSH}), score=lambda statistics, params: statistics.of(PUSH))
"""


@pytest.mark.slow
def test_a_changed_statistic_of_a_file_is_not_served(score_config, tmp_path):
    """What a run observed by another statistic of the same name is not what a formula asks for."""
    (statistic := tmp_path / "own_statistic.py").write_text(OWN)
    (file := tmp_path / "pushed.py").write_text(FORMULA)
    options = {"model": score_config.model, "mesh": score_config.mesh, "runs": str(tmp_path)}
    names = (f"{file}:pushed", "gate_fisher")
    run, made = score_run(dataclasses.replace(score_config, name="kept", estimators=names, **options))
    again = ScoreConfig(name="again", from_run=str(run.path), estimators=names, **options)
    file.write_text(FORMULA.replace("statistics.of(PUSH)", "{n: 2 * s for n, s in statistics.of(PUSH).items()}"))
    served = score_run(again)[1].scenarios
    for scenario, scores in made.scenarios.items():
        twice = {name: 2 * values for name, values in scores[names[0]].items()}
        assert_scores_equal(served[scenario][names[0]], twice)  # control: a new formula
    statistic.write_text(OWN.replace("gradient**4", "gradient**6"))
    with pytest.raises(
        ValueError, match=r"kept neither scores of .*pushed nor .*\(push\), by the code that there is now"
    ):
        score_run(dataclasses.replace(again, name="other"))
    assert score_run(dataclasses.replace(again, name="rest", estimators=names[1:]))[0].finished, (
        "control: of the package"
    )


@pytest.mark.slow
def test_small_statistics_serve_what_they_can(score_config, tmp_path):
    """The usual estimators and `fused`: of members whose statistics are gone, the scores on record are fused."""
    names = ("gate_fisher", "taylor_element", "wanda")
    options = {"runs": str(tmp_path), "keep_statistics": "small"}
    own = dataclasses.replace(score_config, name="own", estimators=names, **options)
    fresh = dataclasses.replace(own, name="fresh", estimators=("fused",))
    run, expected = score_run(own)[0], score_run(fresh)[1]
    again, found = score_run(
        ScoreConfig(name="again", model=own.model, runs=own.runs, from_run=str(run.path), mesh=own.mesh)
    )
    usual = ScoreConfig().estimators
    assert again.record["left_out"] == ["taylor_vector"]
    assert found.estimators == [name for name in usual if name != "taylor_vector"]
    for scenario, scores in read_scores(run).scenarios.items():
        assert_scores_equal(found.scenarios[scenario]["taylor_element"], scores["taylor_element"])
    subject = LlamaSubject(saap_jax.load_model(own.model.name))
    fused = kept_module.rescored(str(run.path), subject, scores_of(["fused"]))
    for scenario, scores in expected.scenarios.items():
        for structure in STRUCTURES:
            np.testing.assert_allclose(
                fused.scenarios[scenario]["fused"][structure], scores["fused"][structure], rtol=1e-4
            )
    pruned = prune.prune(
        PruneConfig(out=str(tmp_path / "cut"), from_run=str(run.path), model=own.model, ratio=0.3, method="fused")
    )
    assert pruned.selection.actual >= 0.3


@pytest.mark.slow
def test_a_killed_score_run_observes_only_what_is_missing(score_config, kept, tmp_path, monkeypatch):
    expected = kept[1]
    config = dataclasses.replace(score_config, runs=str(tmp_path))
    seen = []
    observe = kept_module.score_examples

    def observe_first(*arguments, **options):
        if options["statistics"] is None:
            seen.append(arguments[3].scenario)
        if arguments[3].scenario == "prose" and len(seen) == 2:
            raise KeyboardInterrupt
        return observe(*arguments, **options)

    monkeypatch.setattr(kept_module, "score_examples", observe_first)
    with pytest.raises(KeyboardInterrupt):
        score_run(config)
    _, calibrated = score_run(config)
    assert seen == ["code", "prose", "prose"]
    for scenario, scores in expected.scenarios.items():
        for name in scores:
            assert_scores_equal(scores[name], calibrated.scenarios[scenario][name])


@pytest.mark.slow
def test_prune_by_the_text_and_the_scores_of_a_run(score_config, kept, tmp_path, monkeypatch):
    options = {"model": score_config.model, "calibration": score_config.calibration, "runs": str(tmp_path)}
    fresh, reused, other = (
        prune.prune(PruneConfig(out=str(tmp_path / name), ratio=0.4, **more, **options)).selection.keep
        for name, more in {
            "fresh": {"method": "fisher"},
            "reused": {"method": "fisher", "from_run": str(kept[0].path)},
            "other": {"method": "random"},
        }.items()
    )
    assert_scores_equal(fresh, reused)
    assert any((other[name] != fresh[name]).any() for name in STRUCTURES), "control"
    monkeypatch.setattr("saap_jax.subjects.llama.observe", lambda *_, **__: pytest.fail("observed again"))
    monkeypatch.chdir(kept[0].path)
    known = PruneConfig(
        out=str(tmp_path / "known"), ratio=0.4, method="gate_taylor", from_run=".", judge=False, **options
    )
    chosen = choose(LlamaSubject(saap_jax.load_model(score_config.model.name)), kept[1].scores("gate_taylor"), 0.4,
                    Uniform(), Within())  # fmt: skip
    assert_scores_equal(prune.prune(known).selection.keep, chosen.keep)


def test_a_calibration_of_other_fields_is_refused(score_config, kept, tmp_path):
    shutil.copytree(kept[0].path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["config"]["calibration"]["words"] = 3
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    asked = PruneConfig(model=score_config.model, from_run=str(kept[0].path), ratio=0.2)
    assert calibration_of(asked) == score_config.calibration
    with pytest.raises(ValueError, match=r"run\.json: expected the fields of a calibration.*'words'"):
        calibration_of(dataclasses.replace(asked, from_run=str(tmp_path / "run")))


def test_text_that_changed_since_a_run_observed_it_is_refused(score_config, kept, tmp_path):
    shutil.copytree(kept[0].path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["inputs"]["calibration text 'prose' of seed 0"] = "another"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    out = tmp_path / "cut"
    asked = PruneConfig(out=str(out), model=score_config.model, from_run=str(tmp_path / "run"), ratio=0.2)
    with pytest.raises(ValueError, match="run observed another calibration text 'prose' of seed 0 than is there now"):
        prune.prune(asked)
    assert not out.exists()


def test_a_finished_run_is_not_scored_again(score_config, kept, monkeypatch):
    monkeypatch.setattr("saap_jax.jobs.job.open_subject", lambda *_: pytest.fail("loaded a model for a finished run"))
    _, calibrated = score_run(score_config)
    assert_scores_equal(calibrated.scores("gate_taylor"), kept[1].scores("gate_taylor"))
