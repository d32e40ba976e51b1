"""Targets: the smallest ratio at which all hold, counted exactly, timed by a table that models are checked against."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

import saap_jax
from saap_jax.config.jobs import CompareConfig, PruneConfig
from saap_jax.config.method import TargetsConfig
from saap_jax.contrib import targets as module
from saap_jax.contrib.targets import (
    Costs,
    LatencyTable,
    Phase,
    costs_of,
    held_bytes,
    measure_table,
    targets_of,
    workload_of,
)
from saap_jax.data.windows import Windows
from saap_jax.evaluation.cost import prefill_macs
from saap_jax.evaluation.timing import Times, Workload, compile_programs
from saap_jax.jobs import prune
from saap_jax.jobs.candidates import fitting, key_of, runner_of, table_of
from saap_jax.jobs.job import Material
from saap_jax.llama.generate import decoder_of
from saap_jax.llama.segments import existing_units
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec
from saap_jax.runs.directory import RunDirectory
from saap_jax.runtime.progress import Passes, quiet
from saap_jax.steps.allocation import rounds
from saap_jax.steps.chain import parse
from saap_jax.steps.run import Runner
from saap_jax.structures.discovery import count_parameters, weight_bytes
from saap_jax.subjects.base import rows_of
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut, pruned_spec
from tests.helpers import dense_model, random_keep
from tests.jobs.conftest import tiny


def smallest(model, targets: TargetsConfig, chain: str = "random", least: float = 0.0):
    """Return the costs, the targets, what was chosen and its ratio, and what runs the chain."""
    costs = Costs(targets, np.float32)
    found = targets_of(targets, costs.of(model.spec))
    text = Windows(np.random.default_rng(0).integers(0, 16, (4, 8)).astype(np.int32), np.ones((4, 8), bool))
    runner = Runner(LlamaSubject(model), {"text": text}, [parse(chain)], open_end=True)
    return costs, found, *module.smallest(runner, parse(chain), least, costs, found), runner


def test_costs_of_widths_are_those_of_the_cut_model():
    model = dense_model(layers=4, mlp=12)
    keep = random_keep(existing_units(model.segments), 0.4, seed=3)
    config = TargetsConfig(parameters="90%", macs="90%", weight_bytes="90%", memory="90%", at="2x16")
    pruned = cut(model, keep)
    assert pruned_spec(model.spec, keep) == pruned.spec
    assert Costs(config, np.float32).of(pruned.spec) == {
        "parameters": count_parameters(pruned),
        "macs": prefill_macs(pruned, 2, 16),
        "weight_bytes": weight_bytes(pruned),
        "memory": weight_bytes(pruned)
        + sum(
            2 * 2 * 16 * layer.kv_heads * pruned.spec.head_dim * 4 for layer in pruned.spec.layers
        ),  # keys and values of 2 rows of 16 tokens in float32
    }


@pytest.mark.parametrize(("windows", "size"), [(4, 1), (24, 4), (32, 8)])
def test_of_little_text_microbatches_are_split(tmp_path, windows, size):
    """As often as a step needs it that holds some out; other chains beside it keep them, as `saap prune` runs them."""
    text = {"text": Windows(np.zeros((windows, 8), np.int32), np.ones((windows, 8), bool))}
    subject, run = LlamaSubject(dense_model()), RunDirectory.open(tmp_path / "run", {})
    chains = [parse(f"random{rest}") for rest in (" > scales", "", " > self_calibration(32) > scales")]
    table = table_of(CompareConfig(), run, Material(subject, {0: text}, text, {}), chains, [0.2], quiet)
    for chain, found in zip(chains, (size, 8, 8), strict=True):
        alone = runner_of(subject, text, [chain], fitting(Passes(8), subject, text, chain), table.cache)
        assert alone.passes.batch_size == found
        assert table.runner(chain, 0).key_of(chain, 0.2) == alone.key_of(chain, 0.2)
    few = {"text": rows_of(text["text"], slice(3))}
    with pytest.raises(ValueError, match="microbatches"):
        runner_of(subject, few, chains[:1], fitting(Passes(8), subject, few, chains[0])).check(chains[0], [0.2])


def test_what_is_kept_is_of_scenarios_in_their_order():
    """Which microbatches are held out depends on it."""
    subject, one, other = LlamaSubject(dense_model()), *(
        Windows(np.full((4, 8), token, np.int32), np.ones((4, 8), bool)) for token in (1, 2))  # fmt: skip
    assert key_of(subject, {"a": one, "b": other}) == key_of(subject, {"a": one, "b": other})
    assert key_of(subject, {"a": one, "b": other}) != key_of(subject, {"b": other, "a": one})


@pytest.mark.parametrize("options", [
    {"parameters": "80%"}, {"weight_bytes": "9kB"}, {"macs": "70%", "at": "3x16"},
    {"parameters": "90%", "macs": "60%", "at": "1x16"},
    {"memory": "80%", "at": "8x64"},
])  # fmt: skip
def test_targets_hold_and_not_much_less_would_do(options):
    model = dense_model(layers=4, mlp=64)
    costs, targets, found, ratio, runner = smallest(model, TargetsConfig(**options))
    value = costs.of(pruned_spec(model.spec, found.keep))
    assert all(target.holds(value[target.name]) for target in targets)
    less = runner.choose(parse("random"), ratio - 0.004)
    value = costs.of(pruned_spec(model.spec, less.keep))
    assert not all(target.holds(value[target.name]) for target in targets)


@pytest.mark.parametrize("method", ["", "magnitude > uniform > bias"])
def test_the_model_that_is_saved_meets_the_targets(method):
    """Where no method is said, and where a repair adds parameters."""
    config = PruneConfig(method=method, targets=TargetsConfig(parameters="80%"))
    _, (target,), _, ratio, runner = smallest(dense_model(layers=4, mlp=64), config.targets, config.chain)
    made = runner.run(parse(config.chain), ratio)
    size = float(made.subject.cut(made.keep).parameters)
    assert target.holds(size)
    assert size > 0.95 * target.limit


def test_in_rounds_the_model_is_observed_again_until_the_round_that_does_it(monkeypatch):
    model, observed = dense_model(layers=4, mlp=64), []
    calls = rounds.Rounds.__call__

    def counted(self, state, on):
        observed.append(on.ratio)
        return calls(self, state, on)

    monkeypatch.setattr(rounds.Rounds, "__call__", counted)
    chain = "wanda > uniform > rounds(every=0.1)"
    *_, found, ratio, runner = smallest(model, TargetsConfig(parameters="80%"), chain)
    assert ratio > 0.2
    assert len(observed) > 2
    before = runner.choose(parse(chain), 0.2)
    assert not any((found.keep[name] & ~before.keep[name]).any() for name in found.keep), "what went stays gone"


def test_targets_out_of_reach_are_refused_with_what_can_be_reached():
    model = dense_model(layers=4, mlp=64)
    message = r"targets: cannot be met by removing [\d.]+% .*parameters 1% \(\d+\); ask for less"
    with pytest.raises(ValueError, match=message):
        smallest(model, TargetsConfig(parameters="1%"))
    with pytest.raises(ValueError, match="ratio: 0.99 of the prunable parameters cannot be removed"):
        smallest(model, TargetsConfig(parameters="50%"), least=0.99)
    with pytest.raises(ValueError, match=r"targets: cannot be met by removing 0.00% .*parameters 70%"):
        smallest(model, TargetsConfig(parameters="70%"), "random > within(protect=(0.5, -0.5))")
    assert smallest(model, TargetsConfig(parameters="99%"), least=0.3)[3] == 0.3, "a ratio beside them is the least"
    for chain in ("random > uniform > learn", "best_of(magnitude, random > learn)"):
        with pytest.raises(ValueError, match="targets: expected no learn beside them"):
            prune.prune(PruneConfig(targets=TargetsConfig(parameters="70%"), method=chain))


@pytest.mark.slow
def test_memory_is_no_less_than_the_compiler_says_of_the_pruned_model():
    model = dense_model(layers=4, mlp=64)
    config = TargetsConfig(peak_memory="90%", at="1x16")
    costs = costs_of(config, model)
    dense = compile_programs(decoder_of(model), workload_of(config)).memory_bytes
    assert costs.of(model.spec)["peak_memory"] == dense
    keep = random_keep(existing_units(model.segments), 0.5)
    pruned = cut(model, keep)
    said = costs.of(pruned.spec)["peak_memory"]
    real = compile_programs(decoder_of(pruned), workload_of(config)).memory_bytes
    assert dense > said
    assert said >= 0.98 * real
    assert said > held_bytes(pruned, config)


TABLE = LatencyTable(
    Workload(2, 16, 9), "test", (0, 1, 2), (0, 10, 20),
    Phase(1.0, (0.0, 0.1, 0.3), (0.0, 0.2, 0.4), 2.0), Phase(0.1, (0.0, 0.01, 0.02), (0.0, 0.01, 0.02), 1.0),
)  # fmt: skip


def test_a_table_adds_up_its_sub_blocks():
    spec = dense_model(layers=2, mlp=15).spec  # 2 KV heads, 15 channels
    assert TABLE.latency(spec) == pytest.approx(2.0 * (1.0 + 2 * (0.3 + 0.3)))
    assert TABLE.tokens_per_second(spec) == pytest.approx(2 / (0.1 + 2 * (0.02 + 0.015)))
    costs = Costs(TargetsConfig(latency="50%", tokens_per_second="120%"), np.float32, TABLE)
    slow, fast = targets_of(costs.config, costs.of(spec))
    assert (slow.limit, fast.limit) == (pytest.approx(2.2), pytest.approx(1.2 * TABLE.tokens_per_second(spec)))
    assert (slow.holds(2.1), slow.holds(2.3), fast.holds(fast.limit + 1), fast.holds(1.0)) == (True, False, True, False)


@pytest.mark.slow
def test_a_table_is_what_models_took(monkeypatch):
    """Times that are linear in widths are found again, and scaled to what the whole model takes."""

    def times(programs, repeats, *, progress=iter):
        def of(model):
            layers = model.spec.layers
            return 1.0 + sum(0.5 * layer.kv_heads + 0.01 * layer.mlp for layer in layers)

        def real(model):
            return 1.1 * of(model) if all(layer.kv_heads and layer.mlp for layer in model.spec.layers) else of(model)

        return [[Times(real(p.model), 0.0, 0.1 * real(p.model)) for _ in range(repeats)] for p in programs]

    monkeypatch.setattr(module, "time_in_turns", times)
    monkeypatch.setattr(module, "compile_programs", lambda model, workload: SimpleNamespace(model=model))
    model = dense_model(layers=3, mlp=12)
    table = measure_table(model, Workload(1, 16, 2), repeats=3)
    assert table.latency(model.spec) == pytest.approx(1.1 * (1 + 3 * (1.0 + 0.12)))
    narrow = pruned_spec(model.spec, random_keep(existing_units(model.segments), 0.5, seed=1))
    expected = 1.1 * (1 + sum(0.5 * layer.kv_heads + 0.01 * layer.mlp for layer in narrow.layers))
    assert table.latency(narrow) == pytest.approx(expected)
    assert table.tokens_per_second(narrow) == pytest.approx(10 / expected)


def test_narrow_layers_are_timed_in_deeper_models():
    """So that their weights do not stay in the cache: bytes are those of SmolLM2."""
    widths = LayerWidths(kv_heads=3, q_per_kv=3, mlp=1536)
    spec = LlamaSpec(vocab=8, embed=576, head_dim=64, layers=(widths,) * 30, tied=True)

    def layers(kv_heads: int, mlp: int) -> int:
        return module.layers_of(spec, dataclasses.replace(widths, kv_heads=kv_heads, mlp=mlp), "float32")

    assert layers(0, 1536) == -(-(2**28) // (4 * 576 * 3 * 1536)) == 26
    assert layers(0, 768) == layers(1, 0) == 30  # no more than the model has
    assert layers(0, 100 * 1536) == module.FEWEST


@pytest.mark.slow
def test_prune_to_targets_says_what_was_asked_and_reached(tiny_model_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENOUGH", 1)  # few layers, since each program is compiled
    monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(module, "POINTS", 1)
    targets = TargetsConfig(weight_bytes="95%", tokens_per_second="1%", latency="100000%", at="1x8", repeats=1)
    options = {"out": str(tmp_path / "out"), "method": "wanda", "targets": targets}
    config = tiny(PruneConfig, tiny_model_directory, tmp_path, examples=8, **options)
    pruned = prune.prune(config)
    record = json.loads((tmp_path / "out" / "targets.json").read_text())
    assert [each["name"] for each in record["reached"]] == ["weight_bytes", "latency", "tokens_per_second"]
    size = record["reached"][0]
    loaded = saap_jax.load_model(tmp_path / "out")
    assert size["reached"] == size["predicted"] == weight_bytes(loaded) <= 0.95 * size["dense"]
    assert all(each.holds(each.reached) for each in pruned.reached)
    assert record["table"]["workload"]["prompt"] == 8
    rows = module.target_rows(pruned.reached)
    assert [row[0] for row in rows] == ["weight_bytes", "latency", "tokens_per_second"]
    assert len(module.target_warnings([pruned.reached[0]._replace(limit=0.0, predicted=1.0)])) == 2


@pytest.mark.slow
def test_without_targets_there_is_no_record(tiny_model_directory, tmp_path):
    config = tiny(PruneConfig, tiny_model_directory, tmp_path, examples=8, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="expected how much goes, such as --ratio 0.2"):
        prune.prune(config)
    config = dataclasses.replace(config, ratio=0.2)
    pruned = prune.prune(config)
    assert pruned.selection.asked == config.ratio
    assert not pruned.reached
    assert {"judged", "corrections", "scaled"} <= pruned.metrics.keys(), "by default something makes up for what goes"
    assert len(pruned.metrics["scaled"]) > 1
    said = dict(pruned.rows)
    assert {"seconds to choose units", "seconds to make up for what went"} <= said.keys()
    sizes = [weight_bytes(saap_jax.load_model(each)) for each in (tiny_model_directory, tmp_path / "out")]
    assert said["bytes of weights in memory"] == "{:,} -> {:,}".format(*sizes)
    assert not (tmp_path / "out" / "targets.json").exists()
    quick = prune.prune(dataclasses.replace(config, method="fast", out=str(tmp_path / "fast")))
    assert all(each.corrected <= each.error for each in quick.metrics["corrections"]), "on the text that is given"


@pytest.mark.parametrize(
    ("widths", "fields", "form"),
    [
        ([(2, 8), (2, 8)], {}, "hf"), ([(3, 8), (3, 8)], {}, "padded"), ([(2, 8), (1, 8)], {}, "padded"),
        ([(3, 8), (3, 8)], {"embed": 6}, "hf"), ([(5, 8), (5, 8)], {"embed": 4}, "ragged"),
        ([(2, 8), (1, 8)], {"output_biases": True, "constants": Constants(family="qwen2")}, "ragged"),
    ],
)  # fmt: skip
def test_the_export_that_is_proposed_holds_the_model(widths, fields, form):
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=1, mlp=mlp) for heads, mlp in widths)
    spec = LlamaSpec(**{"vocab": 24, "embed": 16, "head_dim": 4, "layers": layers, "tied": True} | fields)
    *_, line = prune.further_of(PruneConfig(ratio=0.2, out="models/pruned/"), spec)
    assert line == f"export models/pruned models/pruned-hf --format {form}"
