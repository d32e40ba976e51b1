"""The words to type for another run: they read as the configuration that they are of."""

import contextlib
import dataclasses
import shlex

import pytest

from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.config.jobs import CompareConfig, PruneConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.jobs.prune import further_of
from saap_jax.recovery.quantization import check_group_size
from saap_jax.runs.commands import compare_command, prune_command
from saap_jax.steps.chain import chain
from tests.export.models import spec_of

CHAIN = "wanda > uniform > least_squares"


@pytest.mark.parametrize("variant", [CHAIN, "mine", "best"])  # of which the last is a recipe's name too
def test_a_candidate_is_pruned_as_it_was_compared(variant):
    row = {"variant": variant, "chain": CHAIN, "seed": 3, "ratio_asked": 0.3}
    words = shlex.split(prune_command({"config": dataclasses.asdict(CompareConfig())}, row))
    read, *_ = parse("prune", COMMANDS["prune"], words[2:])
    assert (read.method, read.ratio, read.calibration.seed) == (CHAIN, 0.3, 3)
    recipe = {"variant": "flap", "chain": chain("flap").written, "seed": 0, "ratio_asked": 0.3}
    assert "--method flap " in prune_command({"config": dataclasses.asdict(CompareConfig())}, recipe), "control"


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


@pytest.mark.parametrize(("more", "name"), [("", "mine"), ("more", "mine-more")])
def test_the_command_of_a_comparison_makes_its_configuration_again(more, name):
    config = CompareConfig(name="mine", ratios=(0.1, 0.4), best_ratio=0.4, evaluation=EvaluationConfig(windows=12))
    words = shlex.split(
        compare_command({"schema": 1, "config": dataclasses.asdict(config)}, more, {"methods": [CHAIN]})
    )
    read, *_ = parse("compare", COMMANDS["compare"], words[2:])
    assert read == dataclasses.replace(config, name=name, methods=(CHAIN,))
