"""The words to type for another run: they read as the configuration that they are of, of older runs too."""

import dataclasses
import shlex

import pytest

from saap_jax.cli.arguments import parse
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import EstimationConfig, EvaluationConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.runs.commands import compare_command, prune_command

ROW = {"variant": "wanda", "seed": 0, "estimator": "wanda", "scenario": "all", "ratio_asked": 0.3}


@pytest.mark.parametrize("lacks", [(), ("attention_from", "shape", "uniform")])
def test_a_candidate_is_pruned_as_it_was_compared(lacks):
    """Not by what `saap prune` does by default, which an older record may know nothing of."""
    config = dataclasses.asdict(CompareConfig())
    for name in lacks:
        del config["search"][name]
    words = shlex.split(prune_command({"config": config}, ROW))
    read, _ = parse("prune", PruneConfig(), words[2:])
    assert (read.search, read.compensation) == (CompareConfig().search, CompareConfig().compensation)
    assert (read.estimator, read.ratio) == ("wanda", 0.3)
    assert read.search != PruneConfig().search


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
        read, _ = parse("compare", CompareConfig(), words[2:])
        assert read == dataclasses.replace(config, name=name)
    assert config != CompareConfig()
