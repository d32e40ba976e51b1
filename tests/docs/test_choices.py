"""The tables of what the constants of `default` were chosen by are made of their file."""

import choices
import pytest


def test_the_tables_are_made_of_their_file():
    page = choices.PAGE.read_text()
    before, _, rest = page.partition(choices.BEGIN)
    stale = f"{before}{choices.BEGIN}\nanother table\n{choices.END}{rest.partition(choices.END)[2]}"
    assert choices.with_block(stale) == page, "run experiments/choices.py report"


def test_tables_want_their_place():
    with pytest.raises(SystemExit, match="expected <!-- choices: .* found them not"):
        choices.with_block(choices.BEGIN)
