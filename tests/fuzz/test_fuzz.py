"""Harmed files of every format, by the thousand: each is refused in one line, or read as what it says.

`SAAP_FUZZ_SEED=1 SAAP_FUZZ_SCALE=10` draws others, and ten times as many. A failure names the directory of the case,
with the harmed file in it, the command, and what was done to the file; `SAAP_FUZZ_LOG=FILE` has it at
once, and how many cases of each test ended with which exit code.
"""

import os
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.fuzz import mutations
from tests.fuzz.formats import FORMATS, RESCORE, SHOWN, SOURCES, Format, evaluated_if_asked, scored
from tests.fuzz.harness import Harness

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SAAP_FUZZ_SEED", "0"))
SCALE = float(os.environ.get("SAAP_FUZZ_SCALE", "1"))
LOG = os.environ.get("SAAP_FUZZ_LOG")
CHUNK = 10
"""Cases of a test, so that workers share them evenly."""

WORDS = Format("", ("evaluate", "tiny", *SOURCES, *SHOWN), lambda _: st.nothing(), evaluated_if_asked, "expected_words")
SPECS = Format(
    "", (*RESCORE, "--estimation.estimators", "wanda"), lambda _: st.nothing(), scored, "expected_spec",
    needs=("tiny", "runs"), places=("runs/new",),
)  # fmt: skip


def log(line: str) -> None:
    """Append a line to the log, if one is kept."""
    if LOG:
        with open(LOG, "a") as file:
            print(line, file=file)


def run_cases(harness: Harness, strategy: st.SearchStrategy, check: Callable[..., str], name: str, number: int) -> None:
    """Check as many drawn values as a test has; fail with what is wrong with any of them."""
    found: list[str] = []
    seen: set[str] = set()
    cases = max(1, round(CHUNK * SCALE))
    before = harness.codes.copy()

    @hypothesis.seed(1000 * SEED + number)
    @hypothesis.settings(
        max_examples=2 * cases,  # as some come twice
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def each(drawn) -> None:
        key = drawn.done if isinstance(drawn, mutations.Mutation) else repr(drawn)
        simplest = not seen and number > 0  # comes first in every test: once is enough
        if simplest or key in seen or len(seen) >= cases + (number > 0):
            seen.add(key)
            return
        seen.add(key)
        if wrong := check(drawn):
            found.append(wrong)
            log(wrong)

    each()
    log(f"{name} {number}: exit codes {dict(harness.codes - before)}")
    if found:
        pytest.fail(f"{len(found)} cases:\n" + "\n".join(found), pytrace=False)


CHUNKS = [(name, number) for name, given in FORMATS.items() for number in range(-(-given.cases // CHUNK))]


@pytest.mark.parametrize(("name", "number"), CHUNKS)
def test_a_harmed_file(name, number, harness: Harness):
    given = FORMATS[name]
    harness.unharmed(given)
    strategy = given.harm(harness.content(given))
    run_cases(harness, strategy, lambda mutation: harness.check(given, mutation), name, number)


@pytest.mark.parametrize("number", range(8))
def test_harmed_words(number, harness: Harness):
    harness.unharmed(WORDS)
    strategy = mutations.of_words(WORDS.words)
    run_cases(
        harness, strategy, lambda drawn: harness.check(WORDS, None, drawn[1]) if drawn[1] else "", "words", number
    )


@pytest.mark.parametrize("number", range(6))
def test_a_harmed_estimator(number, harness: Harness):
    def check(spec: str) -> str:
        return harness.check(SPECS, None, (*SPECS.words[:-1], spec))

    harness.unharmed(SPECS)
    run_cases(harness, mutations.of_spec(), check, "estimators", number)
