"""The page of what the constants of `default` were chosen by is made of its file."""

import importlib
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_of_its_file():
    module = importlib.import_module("choices")
    assert module.report() == (DOCS / "choices.md").read_text(), "run experiments/choices.py report"
