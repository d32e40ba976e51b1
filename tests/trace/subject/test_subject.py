"""The commands on a traced model: scenarios, seeds, grids, steps on the way, resuming, and what each command finds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import linear_call

from saap_jax.api import select_units
from saap_jax.config.jobs import CompareConfig, FidelityConfig, PruneConfig, for_factory
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.jobs import compare, fidelity
from saap_jax.report.pages.fidelity import correlations
from saap_jax.runs.scores import read_changes
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.subject import subject_of
from tests.trace.subject.problems import (
    SAAP,
    calibrate,
    chosen,
    drawn_scores,
    masked_losses,
    problem_of,
    stacked,
    trained,
)

FACTORY = """
import dataclasses, jax
from tests.trace.subject.problems import trained

def part(examples, rows):
    return jax.tree.map(lambda leaf: leaf[rows], examples)

def problem():
    whole = trained("moe", 32)
    return dataclasses.replace(
        whole,
        calibration={"a": part(whole.calibration, slice(16)), "b": part(whole.calibration, slice(16, None))},
        held_out={"near": part(whole.held_out, slice(16)), "far": part(whole.held_out, slice(16, None))},
    )
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("factory") / "mine.py"
    path.write_text(FACTORY)
    return f"{path}:problem"


@pytest.fixture(scope="module")
def subject():
    return subject_of(trained("moe", 32))


@pytest.fixture(scope="module")
def config(factory, tmp_path_factory) -> CompareConfig:
    return for_factory(
        CompareConfig,
        factory,
        runs=str(tmp_path_factory.mktemp("runs")),
        methods=(f"{{random,gate_taylor,{SAAP}}} > {{uniform,global}}",),
        calibration=CalibrationConfig(scenarios=(), examples=8),
        seeds=(0, 1),
        ratios=(0.2, 0.4),
    )


@pytest.fixture(scope="module")
def run(config):
    return compare.compare(config)


def test_a_digest_is_of_all_that_a_figure_depends_on():
    """Of parameters, program and loss, of arrays that the last two hold, also inside a compiled part, and of the
    derivatives that they define, which are no part of their text."""
    x, y = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)

    def digests(scale=1.0, power=2, weight=1.0, inner=1.0, backward=1.0, tangent=1.0, second=1.0, transposed=1.0):
        params = {"up": jnp.full((3, 5), weight), "down": jnp.ones((5, 2))}
        held, own = jnp.full((2,), scale), jnp.full((2,), inner)

        @jax.custom_vjp
        def passed(x, number):
            return x, number

        @jax.custom_jvp
        def rounded(x):
            return jnp.round(x)

        @jax.custom_vjp
        def slope(x):
            return x

        slope.defvjp(lambda x: (x, None), lambda _, g: (second * g,))
        passed.defvjp(lambda x, number: ((x, number), None), lambda _, g: (backward * slope(g[0]), None))
        rounded.defjvp(lambda x, t: (rounded(*x), tangent * t[0]))
        twice = functools.partial(linear_call, lambda two, x: two * x, lambda two, g: transposed * two * g, 2.0)
        compiled = jax.jit(lambda outputs: rounded(twice(passed(outputs * own[None], 1)[0])))
        problem = Problem(
            function=lambda params, x: compiled(jax.nn.relu(x @ params["up"]) @ params["down"] * held[None]),
            params=params,
            loss=lambda outputs, targets: (jnp.abs(outputs - targets - held[None]) ** power).mean(),
            calibration=(x, y),
            held_out=(x, y),
        )
        return subject_of(problem, refused=True).digests()

    first = digests()
    assert digests() == first
    for changes, differ in (
        ({"scale": 2.0}, {"program", "loss"}),
        ({"power": 1}, {"loss"}),
        ({"weight": 2.0}, {"parameters"}),
        ({"inner": 2.0}, {"program"}),
        ({"backward": 2.0}, {"program"}),
        ({"tangent": 2.0}, {"program"}),
        ({"second": 2.0}, {"program"}),
        ({"transposed": 2.0}, {"program"}),
    ):
        other = digests(**changes)
        assert {name for name in first if other[name] != first[name]} == differ
    fewer, more = (subject_of(problem_of("nnx_decoder", 8), norms=norms).digests() for norms in (False, True))
    assert {name for name in fewer if fewer[name] != more[name]} == {"structures"}


@pytest.mark.slow
def test_every_combination_is_judged_by_its_own_masks(config, run, factory):
    rows = run.candidates()
    assert len(rows) == 3 * 2 * 2 * 2
    assert run.record["metrics"] == [{"name": "loss near", "domain": "in"}, {"name": "loss far", "domain": "out"}]
    own = subject_of(trained("moe", 32))
    arrays = run.load_arrays("keeps")
    for row in rows[::5]:
        keep = {name: arrays[f"{row['candidate']}/{name}"] for name in own.existing}
        assert own.removed(keep) / own.prunable == pytest.approx(row["ratio_actual"])
        assert row["ratio_actual"] >= row["ratio_asked"] - 1e-9
        losses = masked_losses(own, keep)
        np.testing.assert_allclose(row["losses"]["loss near"], losses[:16], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(row["losses"]["loss far"], losses[16:], rtol=1e-4, atol=1e-7)
        assert row["ppl"]["loss far"] == pytest.approx(losses[16:].mean(), rel=1e-4)
    page = (run.path / "report.html").read_text().lower()
    assert "loss against ratio" in page
    assert "perplexity" not in page


@pytest.mark.slow
def test_fidelity_of_the_oracle_to_itself_is_one(factory, tmp_path):
    config = for_factory(
        FidelityConfig, factory, runs=str(tmp_path), channels_per_layer=3, resamples=50,
        estimators=("ablation", "random"),
    )  # fmt: skip
    run = fidelity.judge(config)
    rows, (_, exact) = correlations(run), read_changes(run)
    found = {(row.estimator, row.scope): row.value for row in rows if row.measure == "spearman"}
    assert found["ablation", "pooled"] == pytest.approx(1)
    assert found["random", "pooled"] < 0.9, "negative control"
    assert {row.scope for row in rows} == {*exact, "pooled"}


@pytest.mark.slow
def test_scores_at_masks_are_those_of_the_cut_model(subject):
    """A model observed at masks is the cut one; of another keep-set it is not."""
    problem, scores = subject.problem, calibrate(subject, ["gate_taylor"]).scores("gate_taylor")
    keep = chosen(subject, scores, 0.3).keep
    cut = subject.cut(keep)
    smaller = subject_of(
        Problem(
            function=cut.function, params=cut.params, loss=problem.loss,
            calibration=problem.calibration, held_out=problem.held_out,
        ),
        refused=True,
    )  # fmt: skip
    found = calibrate(subject, ["gate_taylor", "taylor_element"], keep=keep)
    anew = calibrate(smaller, ["gate_taylor", "taylor_element"])
    plain = calibrate(subject, ["gate_taylor", "taylor_element"])
    compared = 0
    for name in set(smaller.existing) & set(subject.existing):
        for estimator in ("gate_taylor", "taylor_element"):
            left = np.asarray(found.scores(estimator)[name])[keep[name]]
            if left.size == np.size(anew.scores(estimator)[name]):
                wanted = np.ravel(anew.scores(estimator)[name])
                np.testing.assert_allclose(left, wanted, rtol=1e-3, atol=1e-7)
                assert not np.allclose(np.asarray(plain.scores(estimator)[name])[keep[name]], left, rtol=1e-2)
                compared += 1
    assert compared >= 2
    for name, kept in keep.items():
        assert np.isnan(np.asarray(found.scores("gate_taylor")[name])[~kept]).all()


@pytest.mark.slow
def test_batches_of_keep_sets_give_what_each_gives_alone(subject):
    random = np.random.default_rng(0)
    keeps = [subject.existing]
    for ratio in (0.1, 0.3, 0.5):
        scores = {name: random.lognormal(size=units.shape) for name, units in subject.existing.items()}
        keeps.append(chosen(subject, scores, ratio).keep)
    held_out = subject.problem.held_out
    found: dict = {}
    for group in subject.losses(held_out, keeps, batch_size=5, at_once=3):
        found |= group
    for number, keep in enumerate(keeps):
        np.testing.assert_allclose(found[number].means, masked_losses(subject, keep), rtol=1e-4, atol=1e-7)
    rest = [set(group) for group in subject.losses(held_out, keeps, batch_size=5, at_once=3, done={0, 1, 2})]
    assert rest == [{3}]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (CompareConfig, {"mesh": MeshConfig(tensor=2)}, "mesh.tensor: expected no model of a factory, .* got 2"),
        (PruneConfig, {"mesh": MeshConfig(rules=("vocab=",))}, "mesh.rules: expected no model of a factory, .*vocab="),
        (
            CompareConfig,
            {"model": ModelConfig(name="a:b", dtype="bfloat16")},
            "model.dtype: expected no model of a factory",
        ),
        (FidelityConfig, {"calibration": CalibrationConfig(bos="never")}, "calibration.bos: expected no model of a"),
        (PruneConfig, {"from_run": "runs/a"}, "from_run: expected no model of a factory, .* 'runs/a'"),
    ],
)
def test_what_is_not_for_traced_models_is_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        for_factory(kind, "mine.py:problem", **fields)
    for_factory(kind, "mine.py:problem")


def test_what_is_for_traced_models_alone_is_refused_elsewhere():
    subject = subject_of(stacked())
    for limit in ("protect=(0,)", "attention=0.1"):
        with pytest.raises(ValueError, match=f"within.{limit.split('=')[0]}: is for attention and MLP"):
            select_units(subject, drawn_scores(subject), 0.3, f"within({limit}) > uniform")
    with pytest.raises(ValueError, match="model.norms: expected a traced model, .* beside it"):
        ModelConfig(norms=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CalibrationConfig(scenarios=("night",)), "calibration.scenarios: expected some of calibration, .*night"),
        (CalibrationConfig(scenarios=(), examples=6), "calibration.examples: expected at most 5, those of calibration"),
        (EvaluationConfig(in_domain="x", out_of_domain=""), "evaluation.in_domain: expected some of held_out, .*'x'"),
        (EvaluationConfig(in_domain="", out_of_domain="", drawn=0), "expected at most . examples to draw, got 24"),
    ],
)
def test_examples_that_are_not_there_are_refused(config, message):
    own = subject_of(stacked())
    with pytest.raises(ValueError, match=message):
        own.texts(config) if isinstance(config, EvaluationConfig) else own.scenarios(config)


def test_sets_of_examples_have_names_and_one_shape():
    problem = stacked()
    named = dataclasses.replace(problem, calibration={"day": problem.calibration, "night": problem.held_out})
    assert [*named.scenarios] == ["day", "night"]
    wider = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf], 1), problem.held_out)
    with pytest.raises(ValueError, match=r"Problem.calibration\['night'\]: expected examples of the shapes"):
        dataclasses.replace(problem, calibration={"day": problem.calibration, "night": wider})
    with pytest.raises(ValueError, match="expected names of letters, digits"):
        dataclasses.replace(problem, held_out={"a/b": problem.held_out})
    with pytest.raises(ValueError, match="expected one set of examples at least, got none"):
        dataclasses.replace(problem, held_out={})
