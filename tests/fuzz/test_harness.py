"""The negative control of the fuzz: defects that are planted are reported, and what is right is not."""

import json
import re

import pytest

from tests.fuzz.formats import FORMATS
from tests.fuzz.mutations import Mutation

pytestmark = pytest.mark.slow

PLANTED = {
    "traceback": "exit code 1: .*KeyError",
    "unforeseen": "an error that nobody foresaw|exit code",
    "memory": "stopped at 2 GiB|held 3",
    "work": "stopped at 3 s",
    "hang": "stopped at 3 s",
    "crash": "exit code -6",
    "half_written": "refused, but wrote result.json",
    "overwritten": "refused, but wrote evaluation.txt",
    "two_lines": "more than a line",
    "long_line": "a line of 100011 characters",
    "escape": "more than a line of text",
    "box": "no line of ours",
    "another_code": "exit code 3",
    "nothing": "no result",
    "wrong_number": "another figure than the file says: /ppl@8",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_reported(name, harness):
    given = FORMATS["config"]
    case = harness.case(given)
    limit = {"seconds": 3} if name in ("work", "hang") else {}
    found = harness.faults(given, case, harness.worker.planted(name, case.place, **limit))
    assert len(found) == 1
    assert re.search(PLANTED[name], found[0], re.DOTALL), found


@pytest.mark.parametrize("name", ["refuse", "right_number"])
def test_what_is_right_is_not_reported(name, harness):
    given = FORMATS["config"]
    case = harness.case(given)
    assert harness.faults(given, case, harness.worker.planted(name, case.place)) == []


def test_a_number_may_follow_the_file_and_not_be_that_of_another(harness):
    """The figure is held against what the harmed file says, or where that is nothing, against the unharmed one's."""
    given = FORMATS["config"]
    config = json.loads(harness.content(given))
    changed = Mutation("another base", json.dumps(config | {"rope_theta": 9.0, "rope_parameters": None}).encode())
    twice = Mutation("a key twice", harness.content(given)[:-1] + b', "rms_norm_eps": 0.5}')
    activation = Mutation("another activation", json.dumps(config | {"hidden_act": "gelu"}).encode())
    found = []
    for mutation in (changed, twice, activation):
        case = harness.case(given, mutation)
        (case.place / "unharmed.json").write_text(json.dumps(harness.unharmed(given)))
        outcome = harness.worker.planted("number_of_the_unharmed", case.place)
        found.append("; ".join(harness.faults(given, case, outcome)))
    assert "another figure than the file says" in found[0]
    assert found[1] == ""
    assert "accepted, although no model is meant" in found[2]
