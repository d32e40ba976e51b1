"""Scenarios: named calibration sets, whose statistics are kept apart."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from saap_jax.data.sources import parse_source
from saap_jax.data.windows import Tokenizer, Windows, calibration_windows
from saap_jax.types import Bos


class Scenario(NamedTuple):
    """A calibration set: the name that results carry, and the source of its text."""

    name: str
    source: str


def parse_scenario(text: str) -> Scenario:
    """Read `name=source`, or a bare source, which is named after its file or its built-in name.

    Raises ValueError for an unknown source.

    >>> parse_scenario("web=jsonl:c4.jsonl#text")
    Scenario(name='web', source='jsonl:c4.jsonl#text')
    >>> parse_scenario("builtin:reference").name
    'reference'
    """
    named = re.fullmatch(r"([\w.-]+)=(.+)", text)
    source = named[2] if named else text
    parsed = parse_source(source)
    stem = Path(parsed.path).stem
    if parsed.format == "tfds":
        stem = re.split("[:@]", parsed.path)[0].replace("/", "-")
    return Scenario(named[1] if named else stem, source)


def load_scenarios(
    scenarios: Sequence[Scenario],
    tokenizer: Tokenizer,
    examples: int,
    length: int,
    seed: int,
    *,
    bos: Bos = "auto",
) -> dict[str, Windows]:
    """Draw each scenario's calibration windows: `examples` of `length` tokens.

    All are drawn with the same seed, so adding, renaming or reordering scenarios changes no other one's windows.
    Raises ValueError for no scenario at all and for a name or a source that comes twice.
    """
    if not scenarios:
        raise ValueError("scenarios: expected at least one, got none; give name=source")
    for field, hint in (("name", "give name=source with another name"), ("source", "leave one of them out")):
        values = [getattr(scenario, field) for scenario in scenarios]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"scenarios: expected each {field} once, got {twice!r} twice; {hint}")
    return {name: calibration_windows(source, tokenizer, examples, length, seed, bos=bos) for name, source in scenarios}
