"""The table of mutants: each still applies, and nothing that default recipes compute is without one."""

import ast

from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.chain import parse
from saap_jax.steps.score.oracles import ORACLES
from tests.mutants.running import ROOT
from tests.mutants.table import MUTANTS

PACKAGE = ROOT / "saap_jax"


def uncovered(names) -> set[str]:
    """Return the names that no mutant is of."""
    return set(names) - set().union(*(mutant.covers for mutant in MUTANTS))


def test_mutants_still_apply():
    texts = {mutant.file: (PACKAGE / mutant.file).read_text() for mutant in MUTANTS}
    for mutant in MUTANTS:
        before = texts[mutant.file]
        assert before.count(mutant.old) == 1, f"{mutant.name}: say more of the line in {mutant.file}"
        assert "\n" not in mutant.old + mutant.new, mutant.name
        assert ast.parse(before.replace(mutant.old, mutant.new)), mutant.name
        files = [word for word in mutant.tests.split() if word.endswith(".py")]
        assert files, mutant.name
        assert all((ROOT / file).is_file() for file in files), mutant.name


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_mutants_cover_every_estimator():
    own = {name for name, factory in ESTIMATORS.items() if factory.__module__.startswith("saap_jax.")}
    assert not uncovered(own | ORACLES.keys())
    assert uncovered({"nobody"}) == {"nobody"}, "control"


def test_mutants_cover_every_step_of_the_defaults():
    chains = [parse(RECIPES[name].chain) for name in ("fast", "default", "saap")]
    steps = {each.name for chain in chains for each in chain.every if each.name != "score"}
    assert {"best_of", "least_squares", "stable"} <= steps, "control"
    assert not uncovered(steps)
