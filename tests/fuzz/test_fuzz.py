"""Harmed files of every format, by the thousand: each is refused in one line, or read as what it says.

`SAAP_FUZZ_SEED=1 SAAP_FUZZ_SCALE=10` draws others, and ten times as many. A failure names the directory of the case,
with the harmed file in it, the command, and what was done to the file; `SAAP_FUZZ_LOG=FILE` has it at once.
"""

import os
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.fuzz import mutations
from tests.fuzz.formats import FORMATS, RESCORE, SHOWN, SOURCES, Format, evaluated, scored
from tests.fuzz.harness import Harness

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SAAP_FUZZ_SEED", "0"))
SCALE = float(os.environ.get("SAAP_FUZZ_SCALE", "1"))
LOG = os.environ.get("SAAP_FUZZ_LOG")
CHUNK = 10
"""Cases of a test, so that workers share them evenly."""

WORDS = Format("", ("evaluate", "tiny", *SOURCES, *SHOWN), lambda _: st.nothing(), evaluated, "expected_words")
SPECS = Format(
    "", (*RESCORE, "--estimation.estimators"), lambda _: st.nothing(), scored, "expected_spec",
    needs=("tiny", "runs"), places=("runs/new",),
)  # fmt: skip


def run_cases(strategy: st.SearchStrategy, check: Callable[..., str], number: int) -> None:
    """Check as many drawn values as a test has; fail with what is wrong with any of them."""
    found: list[str] = []

    @hypothesis.seed(1000 * SEED + number)
    @hypothesis.settings(
        max_examples=max(1, round(CHUNK * SCALE)),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def each(drawn) -> None:
        if wrong := check(drawn):
            found.append(wrong)
            if LOG:
                with open(LOG, "a") as file:
                    print(wrong, file=file)

    each()
    if found:
        pytest.fail(f"{len(found)} cases:\n" + "\n".join(found), pytrace=False)


CHUNKS = [(name, number) for name, given in FORMATS.items() for number in range(-(-given.cases // CHUNK))]


@pytest.mark.parametrize(("name", "number"), CHUNKS)
def test_a_harmed_file(name, number, harness: Harness):
    given = FORMATS[name]
    harness.unharmed(given)
    run_cases(given.harm(harness.content(given)), lambda mutation: harness.check(given, mutation), number)


@pytest.mark.parametrize("number", range(8))
def test_harmed_words(number, harness: Harness):
    strategy = mutations.of_words(WORDS.words)
    run_cases(strategy, lambda drawn: harness.check(WORDS, None, drawn[1]) if drawn[1] else "", number)


@pytest.mark.parametrize("number", range(6))
def test_a_harmed_estimator(number, harness: Harness):
    def check(spec: str) -> str:
        return harness.check(SPECS, None, (*SPECS.words, spec))

    run_cases(mutations.of_spec(), check, number)
