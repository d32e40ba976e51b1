"""The papers' tables as configurations: every recipe finds its budget on models of the published sizes, abstractly."""

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest

from saap_jax.config.packaged import CONFIGS
from saap_jax.llama.model import abstract_llama
from saap_jax.planning.models import spec_of
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.allocation.allocation import Allocation, choose
from saap_jax.steps.chain import expand, limits_of
from saap_jax.subjects.llama import LlamaSubject

PAPERS = sorted((CONFIGS / "papers").glob("*.py"))


@functools.cache
def removed(path: Path) -> dict[tuple[str, float], tuple[float, int]]:
    """Return the share and the number of parameters that each method removes, by random scores."""
    exported = runpy.run_path(str(path))
    subject, found = LlamaSubject(abstract_llama(spec_of(exported["PLANNED"]))), {}
    random = np.random.default_rng(0)
    scores = {name: random.uniform(0.5, 1.5, units.shape) for name, units in subject.existing.items()}
    methods = expand(exported["CONFIG"].methods)
    for chain in (one for each in methods for one in (each.steps[0].inner or [each])):
        (allocation,) = (step for step in chain.steps if isinstance(step, Allocation))
        for ratio in exported["CONFIG"].ratios:
            made = choose(subject, scores, ratio, allocation, limits_of(chain))
            assert subject.removed(made.keep) == made.removed
            found[chain.name, ratio] = made.actual, made.removed
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_every_method_meets_its_budget(path):
    for (name, ratio), (share, _) in removed(path).items():
        assert ratio <= share <= ratio + 0.002, name


@pytest.mark.slow
def test_llm_pruners_rule_removes_what_its_repository_reports():
    """6,738,415,616 parameters before and 5,422,977,024 after, with its ratio of 0.25 in the layers 4 to 29."""
    path = next(path for path in PAPERS if path.name == "llm_pruner_llama_7b.py")
    counts = {name: count for (name, ratio), (_, count) in removed(path).items() if ratio == 0.203125}
    assert LlamaSubject(abstract_llama(spec_of("llama-7b"))).parameters == 6_738_415_616
    rules = {name for name in RECIPES if name.startswith("llm-pruner")}
    assert {name for name, count in counts.items() if count == 6_738_415_616 - 5_422_977_024} == rules
