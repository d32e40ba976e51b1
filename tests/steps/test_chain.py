"""Chains are read as they are written, printed as they are read, and what is no chain is refused in one line."""

import dataclasses
import importlib.metadata
import re

import pytest

import saap_jax
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.allocation.allocations import Global, Uniform
from saap_jax.steps.base import PLUGINS, STEPS, Step, TextSize, step
from saap_jax.steps.chain import chain, expand, limits_of, parse, steps_of
from saap_jax.steps.limits import Within
from saap_jax.steps.refinement.evolve import Evolve
from saap_jax.steps.refinement.learn import Learn
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.steps.score.score import Fused, Normalize, Score
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.syntax import written
from tests.helpers import random_model, spec_of

MINE = """
import dataclasses

from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.base import Estimator
from saap_jax.steps.repair.output import Bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class Half(Bias):
    share: float = 0.5


def twice(*, times: int = 2) -> Estimator:
    return Estimator(frozenset({GATE_GRADIENT}), lambda statistics, weights: {})
"""


@pytest.fixture(autouse=True)
def known():
    """Forget afterwards what was registered."""
    before = dict(STEPS)
    yield
    STEPS.clear()
    STEPS.update(before)


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("wanda > uniform", (Score("wanda"), Uniform())),
        ("wanda,uniform", (Score("wanda"), Uniform())),
        (" wanda>uniform( floor = True )>none ", (Score("wanda"), Uniform(floor=True))),
        ("a+b/c > global(score)".replace("a+b/c", "wanda+fisher/obs"), (Score("wanda+fisher/obs"), Global(by="score"))),
        ("taylor_element(reduction=max) > global", (Score("taylor_element(reduction=max)"), Global())),
        ("wanda > within(protect=(0.13, -1))", (Score("wanda"), Within(protect=(0.13, -1)), Uniform())),
        ("wanda > within(min_keep={attention: 0, mlp: 2})",
         (Score("wanda"), Within(min_keep={"attention": 0, "mlp": 2}), Uniform())),
        ("fused(wanda, fisher, scope=global) > normalize > global",
         (Fused(("wanda", "fisher"), scope="global"), Normalize(), Global())),
        ("fused(estimators=(wanda, taylor_element(reduction='max')))",
         (Fused(("wanda", "taylor_element(reduction='max')")), Uniform())),
        ("wanda > uniform > evolve(3, 4, (2, 1), (1, 2), 1/8)",
         (Score("wanda"), Uniform(), Evolve(3, 4, (2, 1), (1, 2), 0.125))),
        ("wanda > uniform > learn(6, rule=sigmoid) > least_squares(damping=None)",
         (Score("wanda"), Uniform(), Learn(6, rule="sigmoid"), LeastSquares())),
        ("within(depth=True) > wanda > global", (Within(depth=True), Score("wanda"), Global())),
    ],
)  # fmt: skip
def test_what_a_text_stands_for(text, steps):
    found = parse(text)
    assert found.steps == steps
    assert parse(found.written).steps == steps, "what is written in full is read as the same"
    assert chain(*steps).steps == steps


@pytest.mark.parametrize(
    ("text", "allocation", "at"),
    [("wanda", "uniform", 1), ("wanda > least_squares", "uniform", 1), ("wanda > within(min_keep=0)", "uniform", 2),
     ("fused > stable > bias", "uniform", 2), ("wanda > rounds(0.2)", "uniform", 1), ("wanda > learn(3)", "uniform", 1),
     ("wanda > log > bias", "log", 1), ("wanda > learn(3) > within(min_keep=0) > learn(3)", "uniform", 1)],
)  # fmt: skip
def test_uniform_follows_where_no_allocation_does(text, allocation, at):
    assert parse(text).steps[at].name == allocation


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["{wanda,fisher} > {uniform,global} > {none,bias}"],
         ["wanda > uniform", "wanda > uniform > bias", "wanda > global", "wanda > global > bias", "fisher > uniform",
          "fisher > uniform > bias", "fisher > global", "fisher > global > bias"]),
        (["{wanda > {uniform,log},fisher}"], ["wanda > uniform", "wanda > log", "fisher"]),
        (["wanda > learn(steps=(0, 72))"], ["wanda > learn(steps=0)", "wanda > learn"]),
        (["wanda > learn((2, 3), rate=(0.1, 0.2))"],
         ["wanda > learn(steps=2, rate=0.1)", "wanda > learn(steps=2, rate=0.2)", "wanda > learn(steps=3, rate=0.1)",
          "wanda > learn(steps=3, rate=0.2)"]),
        (["wanda > within(min_keep={attention: 0, mlp: 1})"], ["wanda > within(min_keep={attention: 0, mlp: 1})"]),
        (["wanda > within(protect=(0, 1))"], ["wanda > within(protect=(0, 1))"]),
        (["mine = wanda > bias", "flap", "wanda", "wanda"], ["mine", "flap", "wanda"]),
        (["{flap,saap} > scales"], ["flap > scales", "saap > scales"]),
    ],
)  # fmt: skip
def test_braces_and_tuples_of_values_stand_for_each(texts, names):
    assert [each.name for each in expand(texts)] == names


def test_what_a_chain_tells_of_itself():
    made = parse("mine = fused > within(min_keep=0) > within(protect=(0,)) > uniform > learn(3) > bias")
    assert (str(made), made.repairs, made.choosing, made.scores) == ("mine", True, 5, (Fused(),))
    assert made.written == "fused > within(min_keep=0) > within(protect=(0,)) > uniform > learn(steps=3) > bias"
    assert limits_of(made) == Within(min_keep=0, protect=(0,))
    again = parse(f"{made.written} > within(protect=()) > learn(3)")
    assert limits_of(again) == Within(min_keep=0), "what is as usual holds too, where it is said"
    assert limits_of(parse(again.written)) == limits_of(again)
    assert parse("flap").written == parse(RECIPES["flap"].chain).written
    assert not parse("wanda > uniform").repairs
    assert [each.written for each in steps_of("uniform > none > bias")] == ["uniform", "bias"]
    assert saap_jax.chain("wanda", Uniform(floor=True), "bias").name == "wanda > uniform(floor=True) > bias"


@pytest.mark.parametrize(
    "value", [0.1, -3, True, None, "wanda", "global", "None", "a b", (), (1,), ("x", 0.5), {"m": 2}]
)
def test_values_are_read_as_they_are_written(value):
    @step("takes")
    @dataclasses.dataclass(frozen=True)
    class Takes(Step):
        kind = "repair"
        value: object = 0
        more: tuple[int | float | str, ...] = ()

        def __call__(self, state, on):
            return state

    made = Takes(more=value) if isinstance(value, tuple) else Takes(value=value)
    assert steps_of(made.written) == [made]
    assert written(value) in made.written or value == ()


def test_a_step_and_an_estimator_of_a_file(file):
    made = parse(f"{file}:twice(times=3) > uniform > {file}:Half(share=0.25)")
    score, _, half = made.steps
    assert (score.written, half.share, half.name) == (f"{file}:twice(times=3)", 0.25, "Half")
    assert made.written == f"{file}:twice(times=3) > uniform > {file}:Half(share=0.25)"
    assert parse(made.written).steps == made.steps
    assert "Half" not in STEPS, "by its file alone"


def test_plug_ins_are_found_by_name(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Plugged(Uniform):
        """Share alike."""

    points = {"plugged": lambda: Plugged, "broken": lambda: 1 / 0}

    def entry_points(group, name):
        point = type("Point", (), {"load": staticmethod(points.get(name)), "value": "lab:steps"})
        return [point] if group == PLUGINS and name in points else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert parse("wanda > plugged").steps[1] == Plugged()
    with pytest.raises(ValueError, match="step 'broken': the plug-in lab:steps cannot be loaded: ZeroDivisionError"):
        parse("wanda > broken")


def test_names_of_steps_are_their_own():
    for name, said in (("a b", "expected an identifier, got 'a b'"), ("uniform", "'uniform' exists already")):
        with pytest.raises(ValueError, match=said):
            step(name)(type("Other", (Step,), {}))
    assert step("uniform")(Uniform) is Uniform


OPTIONS = {
    "within(attention=1.5)": "within.attention: expected a number in [0, 1], got 1.5",
    "within(attention_from=0.2)": "within.attention_from: expected attention beside it, got 0.2 alone",
    "within(multiple_of=0)": "within.multiple_of: expected at least 1, got 0",
    "within(max_ratio={mlp: 2})": "within.max_ratio: expected a number in [0, 1], got 2",
    "within(whole_layers=True)": "within.whole_layers: expected depth beside it",
    "within(protect=(1.5,))": "within.protect: expected numbers of layers, or shares of them in (-1, 1), got 1.5",
    "within(protect=(-1.2,))": "shares of them in (-1, 1), got -1.2",
    "stable(x)": "stable.weight: expected float, got 'x'",
    "softmax(0.0)": "softmax.temperature: expected a number above 0, got 0",
    "learn(rate=0.0)": "learn.rate: expected a number above 0, got 0",
    "learn(-1)": "learn.steps: expected at least 0, got -1",
    "learn(language_loss=-0.5)": "learn.language_loss: expected a number of at least 0, got -0.5",
    "evolve(survivors=(4, 2))": "evolve.survivors: expected ever fewer of 16 offspring, 1 at last, got 4 2",
    "evolve(survivors=(20, 1))": "evolve.survivors: expected ever fewer of 16 offspring, 1 at last, got 20 1",
    "evolve(survivors=())": "evolve.survivors: expected ever fewer of 16 offspring, 1 at last, got none",
    "evolve(microbatches=(0, 2))": "for each of survivors, which are 2, got 0 2",
    "evolve(-1)": "evolve.generations: expected at least 0, got -1",
    "evolve(quantum=2.0)": "evolve.quantum: expected a number in [0, 1], got 2.0",
    "shape(2.0)": "shape.layers: expected a number in [0, 1], got 2",
    "least_squares(damping=0.0)": "least_squares.damping: expected a number above 0, got 0.0",
    "least_squares(damping=x)": "least_squares.damping: expected float | None, got 'x'",
    "least_squares(noise=0)": "least_squares.noise: expected a number above 0, got 0",
    "least_squares(tokens=some)": "least_squares.tokens: expected one of scaled, equal, got 'some'",
    "bias(propagate=some)": "bias.propagate: expected one of dense, pruned, got 'some'",
    "least_squares(blend=1.5)": "least_squares.blend: expected a number in [0, 1], got 1.5",
    "scales(0)": "scales.steps: expected at least 1",
    "scales(rate=0.0)": "scales.rate: expected a number above 0",
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected steps with > between them"),
        ("wanda > > bias", "expected steps with > between them and brackets in pairs"),
        ("wanda > learn(3", "brackets in pairs"),
        ("wanda > {uniform,log", "brackets in pairs"),
        ("uniform > wanda", "chain 'uniform > wanda': expected a score first, such as wanda, got uniform"),
        ("within(min_keep=0)", "expected a score first, such as wanda, got nothing"),
        ("wanda uniform", "expected NAME or NAME(option=value, …), and > between steps, got 'wanda uniform'"),
        ("wanda > fisher > uniform", "then other steps, got wanda, which changes nothing there"),
        ("wanda > least_squares > global", "then other steps, got global, which changes nothing there"),
        ("wanda > within(protect=(0,)) > uniform > within(min_keep=2) > bias", "got within(min_keep=2), which changes"),
        ("best_of(wanda, fisher) > global", "then other steps, got global, which changes nothing there"),
        ("wanda > unifrm", "unknown step 'unifrm'; did you mean 'uniform'?"),
        ("wnda", "unknown step 'wnda'; did you mean 'wanda'?"),
        ("wanda+magnitud", "unknown estimator 'magnitud'"),
        ("slicegpt", "slicegpt cannot be run: it rotates"),
        ("wanda > learn(stps=3)", "unknown option 'stps'; learn takes steps, rate, rule, language_loss; did you mean"),
        ("wanda > uniform(True, True, 1)", "uniform takes 2 options without a name, got 3"),
        ("wanda > least_squares(0.1)", "least_squares takes 0 options without a name, got 1"),
        ("wanda > learn(steps=)", "expected NAME or NAME(option=value, …)"),
        ("wanda > rounds(1/0)", "expected NAME or NAME(option=value, …)"),
        ("wanda > within(protect=(-a,))", "expected NAME or NAME(option=value, …)"),
        ("wanda > within(min_keep={{mlp: 1}: 2})", "expected NAME or NAME(option=value, …)"),
        ("wanda > rounds(**{'every': 0.2})", "expected NAME or NAME(option=value, …)"),
        ("wanda > rounds(0.1, every=0.2)", "expected each option of rounds once, got one twice"),
        ("wanda > learn(steps=())", "learn.steps: expected int, got ()"),
        ("wanda > learn(steps=few)", "learn.steps: expected int, got 'few'"),
        ("wanda > learn(rate='0.1')", "learn.rate: expected float, got '0.1'"),
        ("wanda > learn(rule=hard)", "learn.rule: expected one of momentum, sigmoid, soft, got 'hard'"),
        ("wanda > uniform(floor=1)", "uniform.floor: expected bool, got 1"),
        ("wanda > uniform > magnitude > evolve", "got magnitude, which changes nothing there"),
        ("wanda > stable > scenarios(max)", "got stable, which changes nothing there"),
        ("wanda > within(protect=(1.0,))", "within.protect: expected numbers of layers, or shares of them in (-1, 1)"),
        ("wanda > within(protect=0)", "within.protect: expected tuple[int | float, ...], got 0"),
        ("wanda > within(protect=(first,))", "within.protect: expected tuple[int | float, ...], got ('first',)"),
        ("wanda > within(min_keep={mlp: x})", "within.min_keep: expected int | dict[str, int], got {'mlp': 'x'}"),
        ("wanda > layerwise(best)", "layerwise.rule: expected one of wanda, obs, obs_swaps, leverage, got 'best'"),
        ("wanda > layerwise > scales > bias(propagate=dense)", "layerwise: expected a repair with propagate=pruned"),
        ("wanda > uniform > rounds(0.1) > evolve(1)", "expected no rounds beside evolve: it reads the scores"),
        ("wanda > uniform > shape > rounds", "expected no rounds beside shape: it reads the scores"),
        ("nowhere.py:Half", "expected a Python file, found none at nowhere.py"),
        *((f"wanda > {step}", said) for step, said in OPTIONS.items()),
        ("fused(wanda)", "fused: expected two or more estimators, each once, got wanda"),
        ("fused(wanda, magnitude, wanda)", "each once, got wanda, magnitude, wanda"),
        ("fused(method=x)", "fused.method: expected one of closed_form, learned, sampling, got 'x'"),
        (
            "fused(attention='wanda+fisher')",
            "fused.attention: expected one estimator, or fused for the same, got wanda+fisher",
        ),
        ("fused(scope=x)", "fused.scope: expected one of global, structure, layer, got 'x'"),
        ("block_ablation(granularity='unit')", "granularity: expected one of sub_block, layer, got 'unit'"),
        ("perturbation(masks=1)", "estimator 'perturbation': masks: expected at least 2, got 1"),
        ("block_ablation(examples=0)", "estimator 'block_ablation': examples: expected at least 1, got 0"),
        ("perturbation(ridge=0.0)", "'perturbation': ridge: expected a number above 0, got 0.0"),
        ("ablation(x=1)", "unknown hyper-parameter 'x'; it takes examples"),
        ("wanda+wanda", "is named twice"),
        ("wanda/magnitude+magnitude", "is named twice"),
        ("{wanda,fisher} > uniform", "chain: expected one, got 2 of"),
        ("mine = {wanda,fisher}", "chain: expected each name once, got 'mine' for several chains"),
    ],
)
def test_what_is_no_chain_is_one_line(text, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        parse(text)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="chain: expected one value an option, got 'learn"):
        chain("wanda", "learn(steps=(0, 3))")


@pytest.mark.parametrize("texts", [("fast = wanda > uniform", "fast"), ("flap", "flap = wanda")])
def test_a_name_does_not_stand_for_two_methods(texts):
    with pytest.raises(ValueError, match="chain: expected each name once, got 'f"):
        expand(texts)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("wanda > uniform", 0.0),
        ("wanda > uniform > least_squares", 3.0),
        ("wanda > uniform > least_squares > scales(8)", 3 + (2.6 * 8 + 8 / 3) / 4 + 0.25),
        ("wanda > uniform > least_squares > rounds(0.1)", 2 * 3 + 4.0),
        ("best_of(wanda > uniform > bias, wanda, magnitude > uniform > layerwise(wanda))", 3 + 3 + 3.0),
        ("wanda > uniform > evolve(2, 8, (2, 1), (1, 4))", 2 * (8 + 3 * 4) / 4),
        ("wanda > uniform > self_calibration(64) > least_squares > self_calibration(16) > bias", 8 + 6 + 2 + 1.5),
        ("wanda > uniform > self_calibration(64, beside=True) > least_squares", 8 + 9),
    ],
)
def test_passes_are_counted_before_they_are_taken(text, passes):
    subject = LlamaSubject(random_model(spec_of((2, 4))))
    assert parse(text).passes(TextSize(32, 8), 0.2, subject) == pytest.approx(passes)
