"""Sweeps: every combination once, from one pass a seed, equal keep-sets once, resumed to the last bit of the table."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from saap_jax.config.search import SearchConfig
from saap_jax.selection import variants
from saap_jax.selection.variants import candidates_of, seeds_of, variants_of

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.kind import searched
from saap_jax.config.method import (
    CalibrationConfig,
    EstimationConfig,
    EvaluationConfig,
    FusionConfig,
    GridConfig,
    ModelConfig,
)
from saap_jax.evaluation.candidates import candidates_step
from saap_jax.jobs import compare
from saap_jax.report import csv_table
from saap_jax.runs import scores as kept
from saap_jax.runs.standing import comparison_rows, untested

pytestmark = pytest.mark.slow

FUSED = "gate_fisher+wanda"
GRID = GridConfig(
    fusion_scopes=("structure", "layer"),
    allocations=("uniform", "global", "adaptive"),
    rank_by=("score", "score_per_parameter"),
    stability_weights=(-0.5, 0.5),
    scenarios=("all", "reference"),
    seeds=(0, 3),
)


def config_of(directory, runs, **options) -> CompareConfig:
    scenarios = ("builtin:reference", "other=builtin:descriptions")
    options = {
        "estimation": EstimationConfig(estimators=("wanda", FUSED)),
        "grid": GRID,
        "calibration": CalibrationConfig(scenarios=scenarios, examples=3, length=16, batch_size=2),
    } | options
    return CompareConfig(
        name="sweep",
        model=ModelConfig(name=str(directory)),
        evaluation=EvaluationConfig(windows=4, length=16, batch_size=2, candidates_at_once=3),
        runs=str(runs),
        ratios=(0.2, 0.4),
        best_ratio=0.2,
        **options,
    )


class TestVariants:
    def test_every_combination_that_can_differ_once(self):
        """wanda: (uniform, 2 global, 4 adaptive) x 2 scenarios; the fusion the same twice, for two scopes."""
        found = variants_of(config_of("model", "runs"))
        assert len(found) == 14 + 28
        assert len({variant.name for variant in found}) == 42
        assert len({variant[1:] for variant in found}) == 42
        assert [variant.name for variant in found if variant.estimator == "wanda"][:6] == [
            "wanda,uniform,all",
            "wanda,uniform,reference",
            "wanda,global,score,all",
            "wanda,global,score,reference",
            "wanda,global,score_per_parameter,all",
            "wanda,global,score_per_parameter,reference",
        ]
        (one,) = [v for v in found if v.name == f"{FUSED},layer,adaptive,score,lambda=-0.5,reference"]
        assert (one.fusion.scope, one.search.stability_weight, one.scenario) == ("layer", -0.5, "reference")
        assert one.scores == f"{FUSED},layer"
        assert {v.scores for v in found if v.estimator == "wanda"} == {"wanda"}

    def test_without_a_grid_names_are_those_of_estimators(self):
        config = CompareConfig()
        assert [variant.name for variant in variants_of(config)] == list(config.estimation.estimators)
        assert seeds_of(config) == (config.calibration.seed,)
        names = [c.name for c in candidates_of(variants_of(config), (0,), (0.2,))]
        assert names[0] == "random@0.2"

    def test_steps_of_learning_are_values_of_the_grid(self):
        config = CompareConfig(grid=GridConfig(learn_steps=(0, 8)))
        first, second = variants_of(config)[:2]
        assert [first.name, second.name] == ["random,learn=0", "random,learn=8"]
        assert [v.search.learn.steps for v in (first, second)] == [0, 8]
        assert searched(config).learn.steps == 8
        with pytest.raises(ValueError, match="grid.learn_steps: expected at least 0, got -1"):
            GridConfig(learn_steps=(-1,))
        with pytest.raises(ValueError, match="search.learn.steps: expected at least 4 microbatches"):
            CompareConfig(grid=GridConfig(learn_steps=(0, 8)), calibration=CalibrationConfig(examples=8))
        with pytest.raises(ValueError, match="search.learn: is for attention and MLP of layers"):
            CompareConfig(grid=GridConfig(learn_steps=(8,)), model=ModelConfig(name="mine.py:build"))

    def test_names_tell_the_seed_where_there_are_several(self):
        names = [c.name for c in candidates_of(variants_of(CompareConfig())[:1], (0, 7), (0.2, 0.5))]
        assert names == ["random,seed=0@0.2", "random,seed=7@0.2", "random,seed=0@0.5", "random,seed=7@0.5"]

    @pytest.mark.parametrize(
        ("grid", "message"),
        [
            (GridConfig(scenarios=("nothing",)), "grid.scenarios: expected all or one of reference, got 'nothing'"),
            (GridConfig(allocations=("uniform",)), "depth needs a ranking"),
        ],
    )
    def test_refused(self, grid, message):
        search = SearchConfig(
            allocation="global", depth=True, min_keep=variants.SearchConfig().min_keep.__class__(mlp=0)
        )
        with pytest.raises(ValueError, match=message):
            variants_of(CompareConfig(grid=grid, search=search))

    def test_a_value_twice_is_refused(self):
        with pytest.raises(ValueError, match=r"grid.seeds: expected each value once, got \[1, 1\]"):
            GridConfig(seeds=(1, 1))


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    return config_of(tiny_model_directory, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def sweep(config) -> tuple[compare.RunDirectory, list]:
    observed = []
    observe = kept.score_examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "score_examples", lambda *a, **o: (observed.append(o["scenario"]), observe(*a, **o))[1])
        candidates_step.clear_cache()
        run = compare.compare(config)
    return run, observed


def test_one_pass_a_seed_and_one_program(config, sweep):
    run, observed = sweep
    assert observed == ["reference", "other"] * 2
    assert candidates_step._cache_size() == 1
    assert len(run.candidates()) == 42 * 2 * 2
    assert run.record["seeds"] == {"calibration": [0, 3]}


def test_equal_keep_sets_are_evaluated_once(sweep):
    run, _ = sweep
    rows = {row["candidate"]: row for row in run.candidates()}
    twins = [row for row in rows.values() if row["same_as"]]
    assert len(twins) > 5  # on four heads and a few channels many variants agree
    for row in twins:
        assert row["losses"] == rows[row["same_as"]]["losses"]
        assert row["keep"] == rows[row["same_as"]]["keep"]
    firsts = [row for row in rows.values() if row["same_as"] is None]
    assert len({row["keep"] for row in firsts}) == len(firsts) > 10


def test_a_row_is_a_variant_over_its_seeds(sweep):
    run, _ = sweep
    rows = comparison_rows(run.record, run.candidates())
    assert len(rows) == 1 + 42 * 2
    assert all(row.seeds == 2 for row in rows[1:])
    assert all(np.isfinite(row.spread_out) for row in rows[1:])
    row = rows[5]
    members = [c for c in run.candidates() if (c["variant"], c["ratio_asked"]) == (row.label, row.asked)]
    assert [member["seed"] for member in members] == [0, 3]
    losses = [loss for member in members for loss in member["losses"]["ppl@16 builtin:descriptions"]]
    assert row.ppl_out == pytest.approx(np.exp(np.mean(losses)), rel=1e-9)
    assert not any(row.tied for row in rows)
    assert untested(rows) == "4 windows, where a test takes 8"


def test_the_best_is_cut_with_the_first_seed(config, sweep):
    run, _ = sweep
    best = next(row for row in comparison_rows(run.record, run.candidates()) if row.asked == 0.2)
    assert best.best
    assert run.record["best"]["candidate"] == f"{best.label},seed=0@0.2"


def test_a_scenario_alone_is_what_a_run_on_it_alone_gives(config, sweep, tmp_path):
    alone = dataclasses.replace(
        config,
        runs=str(tmp_path),
        estimation=EstimationConfig(estimators=("wanda",)),
        calibration=dataclasses.replace(config.calibration, scenarios=("builtin:reference",), seed=3),
        search=SearchConfig(allocation="adaptive", rank_by="score", stability_weight=0.5),
        grid=GridConfig(),
    )
    run = compare.compare(alone)
    rows = {row["candidate"]: row for row in sweep[0].candidates()}
    for ratio in config.ratios:
        (own,) = [row for row in run.candidates() if row["ratio_asked"] == ratio]
        same = rows[f"wanda,adaptive,score,lambda=0.5,reference,seed=3@{ratio}"]
        assert own["keep"] == same["keep"]
        other = rows[f"wanda,adaptive,score,lambda=0.5,all,seed=3@{ratio}"]
        assert other["keep"] != same["keep"]


def test_scopes_of_a_fusion_are_scored_apart(config, sweep):
    scores = kept.read_scores(sweep[0])
    assert set(scores.estimators) == {"wanda", f"{FUSED},structure", f"{FUSED},layer"}
    a, b = scores.scores(f"{FUSED},structure"), scores.scores(f"{FUSED},layer")
    assert not np.allclose(a["mlp"], b["mlp"])
    assert set(sweep[0].record["fusions"]["reference"]) == {f"{FUSED},structure", f"{FUSED},layer"}
    other = kept.read_scores(sweep[0], "-seed3")
    assert not np.allclose(other.scores("wanda")["mlp"], scores.scores("wanda")["mlp"])
    assert FusionConfig().scope == "structure"


SCRIPT = """
import sys, time
from saap_jax.jobs import compare
from saap_jax.cli.main import main
append = compare.RunDirectory.append
def slowly(self, row):
    append(self, row)
    print(row["candidate"], flush=True)
compare.RunDirectory.append = slowly
main(["compare", sys.argv[1]])
"""


def config_file(path, config: CompareConfig) -> None:
    """Write a configuration as the file that a user would write."""
    imports = sorted({f"from {kind.__module__} import {kind.__name__}" for kind in classes_in(config)})
    path.write_text("\n".join([*imports, f"CONFIG = {config!r}", ""]))


def classes_in(value) -> set[type]:
    """The classes that `repr(value)` names: those of configurations inside each other."""
    if isinstance(value, (tuple, list)):
        return set().union(*(classes_in(each) for each in value))
    if not dataclasses.is_dataclass(value):
        return set()
    return {type(value)}.union(*(classes_in(getattr(value, field.name)) for field in dataclasses.fields(value)))


def test_killed_at_random_moments(config, sweep, tmp_path):
    """kill -9 early and late, then finish: table and records as in the run that nobody killed."""
    other = dataclasses.replace(config, runs=str(tmp_path / "runs"))
    config_file(tmp_path / "config.py", other)
    dice = random.Random(7)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    for first, last in ((0, 5), (6, 14)):
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "config.py")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for _ in range(dice.randint(first, last)):  # lines of output: stages first, then candidates
                if not process.stdout.readline():
                    break
            time.sleep(dice.random() * 0.05)
            process.send_signal(signal.SIGKILL)
    assert not compare.RunDirectory.open(tmp_path / "runs" / "sweep", dataclasses.asdict(other)).finished
    run = compare.compare(other)
    assert run.finished
    reference = sweep[0]
    assert csv_table(run.record, run.candidates()) == csv_table(reference.record, reference.candidates())
    strip = lambda rows: sorted(({**row, "seconds": 0} for row in rows), key=lambda row: row["candidate"])  # noqa: E731
    assert strip(run.candidates()) == strip(reference.candidates())


def test_taken_up_again_bit_for_bit(config, sweep, tmp_path):
    """Lines of metrics.jsonl may be missing, torn, incomplete or changed: what is evaluated again has the same bits."""
    reference, _ = sweep
    other = dataclasses.replace(config, runs=str(tmp_path))
    compare.RunDirectory.open(tmp_path / "sweep", dataclasses.asdict(other)).begin()
    for path in reference.path.iterdir():
        if path.is_file() and path.name not in ("run.json", "report.html"):
            (tmp_path / "sweep" / path.name).write_bytes(path.read_bytes())
    lines = (reference.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept_lines = [line for number, line in enumerate(lines) if number % 3]
    rows = [json.loads(line) for line in kept_lines[:6]]
    (metric, *_) = rows[0]["losses"]
    changes = [{"losses": None}, {"losses": {metric: []}}, {"parameters": 1}, {"keep": "0" * 16}, {"seconds": None}]
    changes += [{"ppl": dict.fromkeys(rows[5]["ppl"], 2.0)}]
    kept_lines[:6] = [json.dumps(row | change).encode() + b"\n" for row, change in zip(rows, changes, strict=True)]
    (tmp_path / "sweep" / "metrics.jsonl").write_bytes(b"".join(kept_lines[:-1]) + kept_lines[-1][:40])
    record = json.loads((tmp_path / "sweep" / "run.json").read_text())
    files = [name for name in reference.record["files"] if name != "best"]
    (tmp_path / "sweep" / "run.json").write_text(
        json.dumps(record | {"files": files, "inputs": reference.record["inputs"]})
    )
    run = compare.compare(other)
    assert csv_table(run.record, run.candidates()) == csv_table(reference.record, reference.candidates())
    strip = lambda rows: sorted(({**row, "seconds": 0} for row in rows), key=lambda row: row["candidate"])  # noqa: E731
    assert strip(run.candidates()) == strip(reference.candidates())
    assert run.record["dense"]["losses"] == reference.record["dense"]["losses"]
    assert csv_table(run.record, run.candidates()[1:]) != csv_table(reference.record, reference.candidates())
