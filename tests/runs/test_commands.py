"""The words to type for another run: they read as the configuration that they are of, of older runs too."""

import contextlib
import dataclasses
import shlex
from typing import Any

import pytest
from saap_jax.config.search import LearnConfig, SearchConfig
from saap_jax.selection.variants import Candidate, variants_of

from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import EstimationConfig, EvaluationConfig, GridConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.jobs.prune import further_of
from saap_jax.recovery import check_group_size
from saap_jax.runs.commands import compare_command, prune_command
from tests.export.models import spec_of

ROW = {"variant": "wanda", "seed": 0, "estimator": "wanda", "scenario": "all", "ratio_asked": 0.3}


@pytest.mark.parametrize("lacks", [(), ("attention_from", "shape", "uniform")])
def test_a_candidate_is_pruned_as_it_was_compared(lacks):
    """Not by what `saap prune` does by default, which an older record may know nothing of."""
    config = dataclasses.asdict(CompareConfig())
    for name in lacks:
        del config["search"][name]
    words = shlex.split(prune_command({"config": config}, ROW))
    read, *_ = parse("prune", COMMANDS["prune"], words[2:])
    assert (read.search, read.compensation) == (CompareConfig().search, CompareConfig().compensation)
    assert (read.estimator, read.ratio) == ("wanda", 0.3)
    assert read.search != PruneConfig().search


def test_a_candidate_is_learned_for_as_long_as_it_was():
    """Not for as long as the configuration says, whose grid asks for both."""
    config = CompareConfig(
        search=SearchConfig(learn=LearnConfig(steps=72)),
        grid=GridConfig(learn_steps=(0, 72)),
        estimation=EstimationConfig(estimators=("wanda",)),
    )
    variants = variants_of(config)
    assert [variant.search.learn.steps for variant in variants] == [0, 72]
    for variant in variants:
        row: Any = Candidate("x", variant, 0, 0.3).about
        words = shlex.split(prune_command({"schema": 1, "config": dataclasses.asdict(config)}, row))
        assert parse("prune", COMMANDS["prune"], words[2:])[0].search == variant.search


@pytest.mark.parametrize(("mlp", "method"), [(32, "groupwise"), (33, "lora")])
def test_the_command_that_recovers_is_one_that_the_widths_suit(mlp, method):
    config = PruneConfig(out="small")
    spec = spec_of((2, 2, mlp))
    spec = dataclasses.replace(spec, head_dim=16, embed=64)
    (recover,) = [words for words in further_of(config, spec) if words.startswith("recover")]
    read, *_ = parse("recover", COMMANDS["recover"], ["--model", *shlex.split(recover)[1:]])
    assert read.method.name == method
    suits = contextlib.nullcontext() if method == "groupwise" else pytest.raises(ValueError, match="group_size")
    with suits:
        check_group_size(spec, read.method.bits, read.method.group_size, read.method.matrices)


def test_the_command_of_a_comparison_makes_its_configuration_again():
    """Under the name that it has, or under a longer one."""
    config = CompareConfig(
        name="mine",
        ratios=(0.1, 0.4),
        best_ratio=0.4,
        estimation=EstimationConfig(estimators=("wanda", "taylor_element(reduction='max')")),
        evaluation=EvaluationConfig(windows=12),
    )
    for more, name in (("", "mine"), ("more", "mine-more")):
        words = shlex.split(compare_command({"schema": 1, "config": dataclasses.asdict(config)}, more, {}))
        read, *_ = parse("compare", COMMANDS["compare"], words[2:])
        assert read == dataclasses.replace(config, name=name)
    assert config != CompareConfig()
