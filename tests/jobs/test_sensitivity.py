"""`saap sensitivity` on a tiny model: each candidate prunes one place, and its loss is the one it has alone."""

import dataclasses
import itertools
import shlex

import numpy as np
import pytest

from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.config.jobs import SensitivityConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.contrib.sensitivity import command as sensitivity
from saap_jax.contrib.sensitivity.profiles import changes_of
from saap_jax.data.windows import pairs
from saap_jax.evaluation.perplexity import candidates_step, window_losses
from saap_jax.evaluation.scales import format_ppl
from saap_jax.jobs import compare
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.segments import existing_units, masks
from saap_jax.runs.commands import compare_command, prune_command
from saap_jax.runs.scores import read_scores
from saap_jax.structures.discovery import count_parameters
from saap_jax.subjects.llama import LlamaSubject, texts_of
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.jobs.conftest import tiny

IN, OUT = "ppl@16 builtin:reference", "ppl@16 builtin:descriptions"
FRACTIONS = (0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> SensitivityConfig:
    return tiny(
        SensitivityConfig, tiny_model_directory, tmp_path_factory.mktemp("runs"), fractions=FRACTIONS, ratio=0.15,
        method="gate_fisher > within(attention=0.0) > uniform",
        evaluation=EvaluationConfig(windows=4, length=16, batch_size=2, candidates_at_once=3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    candidates_step.clear_cache()
    run = sensitivity.sensitivity(config)
    assert candidates_step._cache_size() == 1, "one program for all"
    return run


@pytest.fixture(scope="module")
def model(config):
    return load_model(config.model.name)


def places(run) -> list[dict]:
    return [row for row in run.candidates() if "layer" in row]


class TestCandidates:
    def test_every_layer_structure_and_fraction(self, run):
        asked = {(row["layer"], row["structure"], row["asked"]) for row in places(run)}
        assert asked == set(itertools.product(range(2), STRUCTURES, FRACTIONS))

    def test_only_the_lowest_scores_of_one_place_go(self, config, run, model):
        scores, existing = read_scores(run).scores("gate_fisher"), existing_units(model.segments)
        keeps, about = sensitivity.one_place_each(LlamaSubject(model), scores, FRACTIONS)
        for name, keep in keeps.items():
            row = about[name]
            layer, structure = row["layer"], row["structure"]
            gone = {n: existing[n] & ~keep[n] for n in STRUCTURES}
            assert sum(int(gone[n].sum()) for n in STRUCTURES) == int(gone[structure][layer].sum())
            units = existing[structure][layer].sum()
            assert gone[structure][layer].sum() == np.ceil(units * row["asked"]) == round(units * row["actual"])
            left = scores[structure][layer][keep[structure][layer]]
            assert not len(left) or scores[structure][layer][gone[structure][layer]].max() <= left.min()
            assert row["removed"] == count_parameters(model) - count_parameters(cut(model, keep))

    def test_losses_are_those_of_one_by_one(self, config, run, model):
        scores = read_scores(run).scores("gate_fisher")
        keeps, _ = sensitivity.one_place_each(LlamaSubject(model), scores, FRACTIONS)
        texts = texts_of(config.evaluation, load_tokenizer(config.model.name))
        rows = {row["candidate"]: row for row in places(run)}
        assert rows.keys() == keeps.keys()
        dense = {name: window_losses(model, pairs(windows, 2)) for name, windows in texts.items()}
        for name, keep in keeps.items():
            for metric, windows in texts.items():
                alone = window_losses(model, pairs(windows, 2), masks(keep))
                np.testing.assert_allclose(rows[name]["losses"][metric], alone.sums / alone.counts, rtol=2e-6)
                assert not np.allclose(alone.sums, dense[metric].sums, rtol=1e-6), "negative control: it is pruned"

    def test_equal_keep_sets_are_evaluated_once(self, run):
        """Of two heads, 20 % and 50 % are one each."""
        rows = {row["candidate"]: row for row in places(run)}
        for layer in (0, 1):
            first, second = (rows[f"layer={layer},attention@{fraction}"] for fraction in (0.2, 0.5))
            assert (first["actual"], second["actual"]) == (0.5, 0.5)
            assert second["keep"] == first["keep"]
            assert second["losses"] == first["losses"]

    def test_changes(self, run):
        rows = {(row["layer"], row["structure"], row["asked"]): row for row in places(run)}
        changes = changes_of(run.record, run.candidates())
        dense = np.mean(run.record["dense"]["losses"][OUT])
        for change in changes:
            row = rows[change.layer, change.structure, change.asked]
            assert change.nats == pytest.approx(np.mean(row["losses"][OUT]) - dense)
            assert change.percent == pytest.approx(100 * (row["ppl"][OUT] / run.record["dense"]["ppl"][OUT] - 1))


class TestTrials:
    def test_a_trial_has_a_command_that_prunes_so(self, run):
        """As `saap ab` names it where a limit needs a model that can be run."""
        (row, *_) = [row for row in run.candidates() if "layer" not in row]
        words = shlex.split(prune_command(run.record, row))
        assert words[words.index("--ratio") + 1] == "0.15"
        assert parse("prune", COMMANDS["prune"], words[2:])[0].method == row["chain"]

    @pytest.mark.slow
    @pytest.mark.parametrize("rest", ["", " > rounds(every=0.1)", " > bias"])
    def test_a_comparison_by_the_command_measures_what_the_suggestion_claims(self, config, tmp_path, rest):
        """On a model and with estimators as they are; with rounds on the way, or a repair, the trial takes them too."""
        method = f"magnitude > within(attention=0.3) > uniform{rest}"
        other = dataclasses.replace(config, runs=str(tmp_path), method=method, ratio=0.3)
        run = sensitivity.sensitivity(other)
        (trial,) = [trial for trial in run.record["trials"] if trial["kind"] == "attention"]
        command = compare_command(run.record, "tried", {"methods": [trial["chain"]]})
        compared = compare.compare(parse("compare", COMMANDS["compare"], shlex.split(command)[2:])[0])
        rows = {row["candidate"]: row for row in run.candidates()}
        (found,) = compared.candidates()
        assert found["keep"] == rows[trial["candidate"]]["keep"] != rows[trial["instead_of"]]["keep"]
        np.testing.assert_allclose(found["losses"][OUT], rows[trial["candidate"]]["losses"][OUT], rtol=1e-5)
        for suggestion in run.record["suggestions"]:
            assert f"ppl {format_ppl(found['ppl'][OUT])} instead of" in suggestion["effect"]
