"""`saap frontier` on a tiny model: what it finds is what independent calls find; one program; taken up again."""

import dataclasses
import itertools

import numpy as np
import pytest

from saap_jax.api import perplexity, run_chain
from saap_jax.config.jobs import CompareConfig, FrontierConfig
from saap_jax.contrib.frontier import command as frontier
from saap_jax.evaluation.crossing import found_variants
from saap_jax.evaluation.perplexity import candidates_step
from saap_jax.jobs import compare
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.subjects.llama import scenarios_of, texts_of
from saap_jax.types import STRUCTURES
from tests.helpers import same
from tests.jobs.conftest import tiny

OUT = "ppl@16 builtin:descriptions"
METHODS = ("gate_fisher > global", "wanda > global")
ROUNDS = "gate_fisher > within(attention=0.4, attention_from=0.15) > global > rounds(every=0.15)"


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> FrontierConfig:
    return tiny(
        FrontierConfig, tiny_model_directory, tmp_path_factory.mktemp("runs"), methods=METHODS, seeds=(0, 3),
        ratios=(0.1, 0.3, 0.5), max_ppl_increase="6%", tolerance=0.01, resamples=50,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    candidates_step.clear_cache()
    run = frontier.frontier(config)
    assert candidates_step._cache_size() == 1, "one program for dense model, curves and every round"
    return run


def kept_at(config, chain, seed, ratio):
    """Return what a session keeps that knows no run, by scores of its own."""
    model, tokenizer = load_model(config.model.name), load_tokenizer(config.model.name)
    scenarios = scenarios_of(dataclasses.replace(config.calibration, seed=seed), tokenizer)
    return run_chain(model, chain, scenarios, ratio, batch_size=2).keep


class TestLargestRatio:
    @pytest.mark.slow
    def test_holds_the_limit_and_a_tolerance_more_does_not(self, config, run):
        """By other code: each keep-set searched anew, its perplexity by the program for one set of gates."""
        model, tokenizer = load_model(config.model.name), load_tokenizer(config.model.name)
        windows = texts_of(config.evaluation, tokenizer)[OUT]
        limit = 1.06 * perplexity(model, windows)
        assert run.record["frontier"]["limit"] == pytest.approx(limit, rel=1e-5)
        for line in run.record["frontier"]["lines"]:
            ppl = {
                ratio: perplexity(model, windows, kept_at(config, line["variant"], line["seed"], ratio))
                for ratio in (line["ratio"], line["ratio"] + config.tolerance)
                if ratio > 0
            }
            assert all(value <= limit for ratio, value in ppl.items() if ratio == line["ratio"])
            assert ppl[line["ratio"] + config.tolerance] > limit
            assert 0 < line["breaks_at"] - line["ratio"] <= config.tolerance

    def test_seeds_and_variants_have_lines_of_their_own(self, config, run):
        lines = run.record["frontier"]["lines"]
        assert [(line["variant"], line["seed"]) for line in lines] == list(itertools.product(METHODS, (0, 3)))
        assert len({line["ratio"] for line in lines}) > 1
        found = found_variants(run.record, run.candidates())
        for each in found:
            own = [line["ratio"] for line in lines if line["variant"] == each.variant]
            assert each.ratio.mean == pytest.approx(np.mean(own))
            assert each.seeds == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", ["100000%", "0%"])
    def test_beyond_both_ends_of_the_grid(self, config, tmp_path, limit):
        """Everything holds: the largest ratio that the search can meet. Or nothing may, and 0 is the answer."""
        methods = ("gate_fisher > within(min_keep={mlp: 2}) > global",)
        changes = {"runs": str(tmp_path), "max_ppl_increase": limit, "methods": methods}
        other = dataclasses.replace(config, seeds=(), ratios=(0.3,), **changes)
        run = frontier.frontier(other)
        for line in run.record["frontier"]["lines"]:
            if limit == "0%":
                dense = run.record["dense"]["ppl"][run.record["frontier"]["metric"]]
                assert run.record["frontier"]["limit"] == dense
                assert line["breaks_at"] is None or line["breaks_at"] - line["ratio"] <= config.tolerance
            else:
                assert line["breaks_at"] is None
                assert line["ratio"] == line["largest_possible"] > 0.7
        if limit != "0%":
            found = found_variants(run.record, run.candidates())
            assert all(each.everywhere == 1 for each in found)


@pytest.mark.slow
def test_with_rounds_every_point_is_that_of_its_ratio_alone(config, tmp_path):
    """What `saap prune` makes at its ratio, and what a comparison of the single ratio makes."""
    other = dataclasses.replace(config, runs=str(tmp_path), methods=(ROUNDS,), ratios=(0.1, 0.2, 0.5))
    run = frontier.frontier(other)
    arrays, rows = run.load_arrays("keeps"), run.candidates()
    assert len(rows) > 2 * 3 + 2
    for row in rows:
        kept = {name: arrays[f"{row['candidate']}/{name}"] for name in STRUCTURES}
        assert same(kept, kept_at(config, ROUNDS, row["seed"], row["ratio_asked"]))
    once = kept_at(config, ROUNDS.rpartition(" > ")[0], 0, 0.5)
    assert not same({name: arrays[f"{ROUNDS},seed=0@0.5/{name}"] for name in STRUCTURES}, once), "rounds matter"
    fields = {f.name: getattr(other, f.name) for f in dataclasses.fields(CompareConfig) if hasattr(other, f.name)}
    fields |= {"name": "compare", "runs": str(tmp_path / "fresh"), "ratios": (0.5,), "best_ratio": 0.5, "new_tokens": 0}
    found = {row["candidate"]: row for row in rows}
    for row in compare.compare(CompareConfig(**fields)).candidates():
        assert row["keep"] == found[row["candidate"]]["keep"]
        assert row["losses"][OUT] == pytest.approx(found[row["candidate"]]["losses"][OUT], rel=1e-5)
