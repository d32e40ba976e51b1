"""The papers' tables as configurations: every recipe finds its budget on models of the published sizes, abstractly."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from saap_jax.selection.choose import choose
from saap_jax.selection.variants import variants_of

from saap_jax.config.packaged import CONFIGS
from saap_jax.llama import abstract_llama
from saap_jax.planning.models import spec_of
from saap_jax.recipes import recipes
from saap_jax.subjects.llama import LlamaSubject

PAPERS = sorted((CONFIGS / "papers").glob("*.py"))


def removed(path: Path) -> dict[tuple[str, float], tuple[float, int]]:
    """Return the share and the number of parameters that each variant removes, by random scores."""
    exported = runpy.run_path(str(path))
    subject, found = LlamaSubject(abstract_llama(spec_of(exported["PLANNED"]))), {}
    random = np.random.default_rng(0)
    scores = {name: random.uniform(0.5, 1.5, units.shape) for name, units in subject.existing.items()}
    for variant in variants_of(exported["CONFIG"]):
        for ratio in exported["CONFIG"].ratios:
            made = choose(subject, scores, ratio, variant.search, scores)
            assert subject.parameters - subject.remaining(made.keep) == made.removed
            found[variant.name, ratio] = made.actual, made.removed
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_every_variant_meets_its_budget(path):
    for (name, ratio), (share, _) in removed(path).items():
        assert ratio <= share <= ratio + 0.002, name


@pytest.mark.slow
def test_llm_pruners_rule_removes_what_its_repository_reports():
    """6,738,415,616 parameters before and 5,422,977,024 after, with its ratio of 0.25 in the layers 4 to 29."""
    path = next(path for path in PAPERS if path.name == "llm_pruner_llama_7b.py")
    counts = {name: count for (name, ratio), (_, count) in removed(path).items() if ratio == 0.203125}
    assert LlamaSubject(abstract_llama(spec_of("llama-7b"))).parameters == 6_738_415_616
    rules = {name for name in recipes() if name.startswith("llm-pruner")}
    assert {name for name, count in counts.items() if count == 6_738_415_616 - 5_422_977_024} == rules
