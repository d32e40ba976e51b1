"""Each mutant is killed: a package with one line changed fails a test. What fails here survives."""

import re
import shutil

import pytest

from tests.mutants.running import FAILED, changed, package_beside_links, run_tests
from tests.mutants.table import MUTANTS, Mutant

pytestmark = pytest.mark.mutants

BROKEN = re.compile(r"^E +(AttributeError|ImportError|NameError|SyntaxError|TypeError):", re.M)
"""What says that a change makes no sense, and not that its figures are wrong."""


@pytest.fixture
def copy(tmp_path):
    """A copy of the package with the tests beside it, taken away afterwards: there are hundreds."""
    made = package_beside_links(tmp_path)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(mutant: Mutant, copy):
    changed(copy / mutant.file, mutant.old, mutant.new)
    outcome = run_tests(copy.parent, mutant.tests)
    assert outcome.package == str(copy / "__init__.py"), outcome.said
    if outcome.code == 0:
        pytest.fail(f"{mutant.name} survives: {mutant.new!r} in {mutant.file} and {mutant.tests}", pytrace=False)
    assert outcome.code == FAILED, outcome.said
    assert not BROKEN.search(outcome.said), outcome.said


@pytest.mark.parametrize("tests", sorted({mutant.tests for mutant in MUTANTS}))
def test_an_unchanged_copy_passes(tests, copy):
    """Control: what kills is the change, and not the copy."""
    outcome = run_tests(copy.parent, tests)
    assert outcome.package == str(copy / "__init__.py"), outcome.said
    assert outcome.code == 0, outcome.said
