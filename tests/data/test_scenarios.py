import numpy as np
import pytest

from saap_jax.data.scenarios import Scenario, load_scenarios, parse_scenario
from saap_jax.data.windows import calibration_windows

REFERENCE = Scenario("reference", "builtin:reference")
DESCRIPTIONS = Scenario("descriptions", "builtin:descriptions")


@pytest.mark.parametrize(
    ("text", "scenario"),
    [
        ("builtin:reference", REFERENCE),
        ("prose=builtin:reference", ("prose", "builtin:reference")),
        ("jsonl:web/c4.jsonl#text", ("c4", "jsonl:web/c4.jsonl#text")),
        ("news=ptb:a=b.txt", ("news", "ptb:a=b.txt")),
        ("text:a=b.txt", ("a=b", "text:a=b.txt")),
    ],
)
def test_a_scenario_is_a_name_and_a_source(text, scenario):
    assert parse_scenario(text) == scenario


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="did you mean builtin:reference"):
        parse_scenario("prose=builtin:referense")


def test_each_scenario_has_its_own_windows_whatever_else_is_loaded(tokenizer):
    both = load_scenarios([REFERENCE, DESCRIPTIONS], tokenizer, 3, 16, seed=5)
    alone = load_scenarios([DESCRIPTIONS], tokenizer, 3, 16, seed=5)
    assert list(both) == ["reference", "descriptions"]
    np.testing.assert_array_equal(both["descriptions"].tokens, alone["descriptions"].tokens)
    expected = calibration_windows(DESCRIPTIONS.source, tokenizer, 3, 16, seed=5)
    np.testing.assert_array_equal(alone["descriptions"].tokens, expected.tokens)
    renamed = load_scenarios([Scenario("other", DESCRIPTIONS.source)], tokenizer, 3, 16, seed=5)
    reseeded = load_scenarios([DESCRIPTIONS], tokenizer, 3, 16, seed=6)
    np.testing.assert_array_equal(renamed["other"].tokens, alone["descriptions"].tokens)
    assert not np.array_equal(both["reference"].tokens, alone["descriptions"].tokens)
    assert not np.array_equal(reseeded["descriptions"].tokens, alone["descriptions"].tokens)


def test_scenarios_that_come_twice_are_refused(tokenizer):
    with pytest.raises(ValueError, match="expected each name once, got 'reference' twice"):
        load_scenarios([REFERENCE, Scenario("reference", "builtin:descriptions")], tokenizer, 1, 8, 0)
    with pytest.raises(ValueError, match="expected each source once, got 'builtin:reference' twice"):
        load_scenarios([REFERENCE, Scenario("again", "builtin:reference")], tokenizer, 1, 8, 0)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        load_scenarios([], tokenizer, 1, 8, 0)
