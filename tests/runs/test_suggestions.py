"""Suggestions on planted data: they are made where they should be, and following one has the effect that it claims."""

import dataclasses
import itertools
import json
import math
import re
import shlex

import numpy as np
import pytest

from saap_jax.api import select_units
from saap_jax.cli import arguments
from saap_jax.cli.main import COMMANDS
from saap_jax.config.jobs import CompareConfig, FrontierConfig, PruneConfig, SensitivityConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.contrib.sensitivity import command as sensitivity
from saap_jax.contrib.sensitivity.page import extremes, marks_of
from saap_jax.contrib.sensitivity.profiles import changes_of, costs_of, plan_of, predicted
from saap_jax.contrib.suggestions import suggestions_of
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.evaluation.perplexity import WindowLosses, keep_digest
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.report.blocks import Code, Words
from saap_jax.report.pages.common import suggestion_blocks
from saap_jax.runtime.files import plain
from saap_jax.runtime.words import MINUS
from saap_jax.steps.chain import limits_of, parse
from saap_jax.types import STRUCTURES
from tests.helpers import random_model

METRICS = ("ppl@8 a", "ppl@8 b")
WINDOWS = 30


def record_of(config, **fields) -> dict:
    domains = [{"name": name, "domain": domain} for name, domain in zip(METRICS, ("in", "out"), strict=True)]
    return {"config": json.loads(json.dumps(plain(dataclasses.asdict(config)))), "metrics": domains, **fields}


def following(command: str, kind: type = CompareConfig):
    """Return the configuration that a command stands for, as the command line reads it."""
    saap, name, *words = shlex.split(command)
    assert (saap, name) == ("saap", kind.__name__.removesuffix("Config").lower())
    return arguments.parse(name, COMMANDS[name], words)[0]


# --- sensitivity: a model of six layers whose losses and scores are planted ------------------------

LAYERS, UNITS, EACH = 6, {"attention": 10, "mlp": 40}, {"attention": 64, "mlp": 24}
"""Layers, units of each, and parameters of a unit: two fifths of the prunable ones are attention's."""


def times(factors: dict, interaction=lambda gone: 0.0):
    """Return a truth in which a parameter costs more at some places, and whatever else the whole costs.

    Its argument `gone` is the share that goes, by structure and layer.
    """

    def truth(gone: dict) -> float:
        sizes = {place: fraction * UNITS[place[0]] * EACH[place[0]] for place, fraction in gone.items()}
        loss = sum(1e-4 * size * factors.get((s, n), factors.get(s, 1.0)) for (s, n), size in sizes.items())
        return loss + interaction(gone)

    return truth


COSTLY = times({("mlp", 4): 20.0})


@pytest.fixture(scope="module")
def six_layers(tokenizer, tmp_path_factory):
    widths = LayerWidths(kv_heads=UNITS["attention"], q_per_kv=1, mlp=UNITS["mlp"])
    spec = LlamaSpec(vocab=len(tokenizer), embed=8, head_dim=3 - 1, layers=(widths,) * LAYERS, tied=True)
    return save_model(random_model(spec), tmp_path_factory.mktemp("models") / "six", tokenizer=tokenizer)


@pytest.fixture
def planted(six_layers, tmp_path, monkeypatch):
    """Return a function that runs `saap sensitivity` with a truth in place of the model's losses."""
    places = itertools.count()

    def run(truth, noise: float = 1e-3, **changes):
        def losses(model, batches, keeps, *, done=(), at_once=8, progress=iter):
            masks = np.concatenate([mask for _, mask in batches])
            counts = masks[masks.any(axis=1)][:, 1:].sum(axis=1)
            for number, keep in ((n, keep) for n, keep in enumerate(keeps) if n not in done):
                dice = np.random.default_rng(int(keep_digest(keep), 16))
                mean = 3 + truth(shares(keep)) + np.linspace(-1, 1, len(counts)) + dice.normal(0, noise, len(counts))
                yield {number: WindowLosses(mean * counts, counts)}

        own = planted_scores(truth)
        monkeypatch.setitem(ESTIMATORS, "planted", lambda: Estimator(frozenset(), lambda statistics, params: own))
        monkeypatch.setattr("saap_jax.subjects.llama.candidate_losses", losses)
        options = {"method": "planted > uniform", "fractions": (0.1, 0.3, 0.5)} | changes
        config = SensitivityConfig(
            model=ModelConfig(name=str(six_layers)),
            calibration=CalibrationConfig(examples=2, length=8),
            runs=str(tmp_path / str(next(places))),
            **{"evaluation": EvaluationConfig(windows=8, length=8)} | options,
        )
        return sensitivity.sensitivity(config, overwrite=True)

    return run


def shares(keep: dict) -> dict:
    return {(s, n): 1 - float(keep[s][n].mean()) for s in STRUCTURES for n in range(LAYERS)}


def planted_scores(truth) -> dict:
    """Return what a unit costs, as single layers tell it; the first units the least."""
    ramp = {s: np.linspace(0.99, 1.01, UNITS[s]) / UNITS[s] for s in STRUCTURES}
    return {s: np.array([truth({(s, layer): 1.0}) * ramp[s] for layer in range(LAYERS)]) for s in STRUCTURES}


def cost_of(truth, run, method: str) -> float:
    """Return what a method costs in truth at the run's ratio."""
    model, steps = load_model(run.record["model"]["name"]), method.partition(" > ")[2]
    return truth(shares(select_units(model, planted_scores(truth), run.record["config"]["ratio"], steps).keep))


def follow(truth, run, text: str = ""):
    """Follow the suggestion of some text: return its text and its method, which has the effect that it claims."""
    found = next(each for each in run.record["suggestions"] if text in each["text"])
    said = re.search(
        r"ppl ([\d.]+) instead of ([\d.]+) \(([+-][\d.]+) %, ([+-][\d.]+) to ([+-][\d.]+) %\)",
        found["effect"].replace(MINUS, "-"),
    )
    assert said is not None, found["effect"]
    new, old, change, low, high = map(float, said.groups())
    assert low <= change <= high < 0
    assert change == pytest.approx(100 * (new / old - 1), abs=0.1)
    (method,) = following(found["command"]).methods
    gain = cost_of(truth, run, method) - cost_of(truth, run, run.record["config"]["method"])
    assert gain < 0
    assert math.log1p(change / 100) == pytest.approx(gain, abs=0.003)
    return found["text"], parse(method)


@pytest.mark.slow
class TestSensitivity:
    @pytest.mark.parametrize("protect", [(), (0, -1)])
    def test_a_costly_layer_is_left_alone_and_that_pays(self, planted, protect):
        """Beside those that are left alone already; shown with its command."""
        run = planted(COSTLY, **({"method": f"planted > within(protect={protect}) > uniform"} if protect else {}))
        text, method = follow(COSTLY, run)
        assert text.startswith("Layer 4's MLP costs 4.8 x the average of its structure")  # 20 / (25 / 6)
        assert text.endswith("leave layers 0, 4 alone." if protect else "leave layer 4 alone.")
        assert limits_of(method).protect == (*protect, 4)
        commands = [block.text for block in suggestion_blocks(run.record) if isinstance(block, Code)]
        assert commands == [each["command"] for each in run.record["suggestions"]]

    @pytest.mark.parametrize("noise", [0.0, 0.02])
    def test_no_difference_no_suggestion(self, planted, noise):
        """Negative control: all parameters cost the same."""
        run = planted(times({}), noise)
        assert run.record["suggestions"] == []
        (said,) = suggestion_blocks(run.record)
        assert isinstance(said, Words)
        assert "No suggestion" in said.text

    def test_what_single_layers_promise_and_the_whole_does_not_keep_is_not_suggested(self, planted):
        """Negative control: predicted better, tried, and measured worse, since the others cannot make up for it."""
        crowded = times(
            {("mlp", 4): 20.0},
            lambda gone: 30 * max(0.0, max([f for (_, n), f in gone.items() if n != 4], default=0.0) - 0.21),
        )
        run = planted(crowded, fractions=(0.1, 0.2))
        tried = {trial["kind"]: trial for trial in run.record["trials"]}
        assert tried["protect"]["changes"] == {"protect": [4]}
        assert not any("leave" in each["text"] for each in run.record["suggestions"])
        assert cost_of(crowded, run, tried["protect"]["chain"]) > cost_of(crowded, run, "planted > uniform")

    def test_cheap_layers_give_more_and_that_pays(self, planted):
        truth = times({("mlp", 2): 0.01, ("mlp", 3): 0.01, ("mlp", 0): 1.5})
        text, method = follow(truth, planted(truth), "rank all")
        assert text == "Some places cost at most 0.1 x the average: rank all layers together."
        assert method.steps[-1].name == "global"
        again = planted(truth, method="planted > global")
        assert not any("rank all" in each["text"] for each in again.record["suggestions"]), "it ranks already"

    @pytest.mark.parametrize(("dearer", "lower"), [("attention", True), ("mlp", False)])
    def test_the_budget_moves_to_where_a_parameter_costs_less(self, planted, dearer, lower):
        truth = times({dearer: 3.0})
        text, method = follow(truth, planted(truth))
        assert text.startswith(f"A parameter of attention costs {3.0 if lower else 1 / 3:.2g} x one of the MLP")
        natural = 640 / (640 + 960)
        assert (limits_of(method).attention < natural) == lower
        assert text.endswith(f"take {100 * limits_of(method).attention:.0f} % of what is removed from attention.")

    def test_predictions_are_sums_over_places_and_costs_average_one(self, planted):
        truth = times({("mlp", 4): 20.0, "attention": 2.0})
        run = planted(truth, 0.0)
        costs, dice = costs_of(run.record, run.candidates()), np.random.default_rng(0)
        for most in (0.5, 1.0):  # measured were 50 %; beyond, the last line goes on
            plan = {place: float(dice.uniform(0, most)) for place in costs}
            assert predicted(costs, plan) == pytest.approx(truth(plan), rel=1e-6)
        kept = next(row["kept"] for row in run.candidates() if row["candidate"].endswith(",plain@0.2"))
        gone = {(s, n): 1 - kept[s][n] / UNITS[s] for s in STRUCTURES for n in range(LAYERS)}
        assert plan_of(costs, kept) == pytest.approx(gone)
        changes = changes_of(run.record, run.candidates())
        for asked, structure in itertools.product((0.1, 0.3, 0.5), STRUCTURES):
            own = [change for change in changes if (change.structure, change.asked) == (structure, asked)]
            assert np.average([c.relative for c in own], weights=[c.removed for c in own]) == pytest.approx(1)

    def test_of_few_windows_nothing_is_suggested(self, planted):
        run = planted(COSTLY, evaluation=EvaluationConfig(windows=4, length=8))
        assert run.record["suggestions"] == []
        said = "No suggestion: nothing measured is sure to be an improvement (4 windows, where it takes 8)."
        assert suggestion_blocks(run.record) == [Words(said, soft=False)]
        text = (run.path / "sensitivity.md").read_text()
        assert "no intervals, and which others cost as much is not tested: 4 windows, where it takes 8" in text
        assert all(math.isnan(change.low) for change in changes_of(run.record, run.candidates()))

    def test_what_costs_as_much_as_the_dearest_is_tied_with_it(self, planted):
        """Layers 4 and 5 cost the same and the most, by noise alone one of them more; all others cost less."""
        run = planted(times({("mlp", 4): 20.0, ("mlp", 5): 20.0}), noise=0.003)
        changes = changes_of(run.record, run.candidates())
        found = marks_of(run.record, run.candidates(), changes)
        marks = {(each.layer, each.structure): mark for each, mark in found.items()}
        assert sorted(marks[layer, "mlp"] for layer in (4, 5)) == ["*", "\N{ALMOST EQUAL TO}"]
        most, _ = extremes(changes, 0.2)
        assert not {(c.layer, c.structure) for c in most[2:]} & marks.keys()
        for change in changes:
            assert change.low <= change.percent <= change.high


# --- comparisons and frontiers -------------------------------------------------------------------


def compared(ppl: dict[str, tuple[float, ...]]) -> tuple[dict, list[dict]]:
    """Return a comparison: perplexity of each estimator and seed at 20 %, the windows scattered about it."""
    seeds = tuple(range(len(next(iter(ppl.values())))))
    config = CompareConfig(methods=tuple(ppl), seeds=seeds, ratios=(0.2,), best_ratio=0.2)
    dice = np.random.default_rng(0)
    hard = dice.normal(0, 0.3, WINDOWS)
    rows = []
    for name, values in ppl.items():
        for seed, value in zip(seeds, values, strict=True):
            scatter = dice.normal(0, 0.01, WINDOWS)
            losses = math.log(value) + hard - hard.mean() + scatter - scatter.mean()
            rows.append(
                {"candidate": f"{name},seed={seed}@0.2", "variant": name, "chain": f"{name} > uniform", "seed": seed,
                 "ratio_asked": 0.2, "ratio_actual": 0.2, "parameters": 100,
                 "ppl": dict.fromkeys(METRICS, value), "losses": {m: losses.tolist() for m in METRICS}}
            )  # fmt: skip
    return record_of(config, kind="compare", seeds={"calibration": list(seeds)}), rows


def test_of_few_windows_more_are_suggested():
    run, rows = compared({"taylor_element": (50.0, 51.0, 49.0), "wanda": (50.1, 51.0, 49.1), "fisher": (80.0,) * 3})
    assert suggestions_of(run, rows) == [], "control"
    short = [row | {"losses": {name: each[:5] for name, each in row["losses"].items()}} for row in rows]
    assert suggestions_of(run, short) == [], "as many as the text has"
    run["config"]["evaluation"]["windows"] = 5
    (found,) = suggestions_of(run, short)
    assert found["text"].startswith("5 windows of evaluation text cannot tell variants apart, which takes 8")
    assert following(found["command"]).evaluation.windows == 24


def test_one_seed_says_nothing_of_seeds():
    run, rows = compared({"wanda": (48.0,), "fisher": (49.0,)})
    (found,) = suggestions_of(run, rows)
    assert following(found["command"]).seeds == (0, 1, 2)
    assert suggestions_of({"kind": "score"}, []) == []


def test_a_frontier_suggests_to_prune_at_its_end():
    config = FrontierConfig(methods=("wanda",), seeds=(0, 4))
    _, rows = compared({"wanda": (41.0, 42.0)})
    rows = [row | {"seed": seed, "ratio_asked": 0.2 + 0.01 * seed} for row, seed in zip(rows, (0, 4), strict=True)]
    losses = {name: np.full(WINDOWS, math.log(40.0)).tolist() for name in METRICS}
    lines = [{"variant": "wanda", "seed": row["seed"], "ratio": row["ratio_asked"], "candidate": row["candidate"],
              "breaks_at": 0.3, "again": []} for row in rows]  # fmt: skip
    frontier = {"metric": METRICS[1], "percent": 10.0, "limit": 44.0, "ratios": [0.2], "resamples": 20, "lines": lines}
    dense = {"ppl": dict.fromkeys(METRICS, 40.0), "losses": losses}
    (found,) = suggestions_of(record_of(config, kind="frontier", dense=dense, frontier=frontier), rows)
    assert "wanda can be pruned to 20 % within +10 %, whatever the seed" in found["text"]
    assert "41.00, +2.5 %" in found["effect"]
    assert following(found["command"], PruneConfig).ratio == 0.2
