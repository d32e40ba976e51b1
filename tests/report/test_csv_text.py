"""CSV that a spreadsheet shows as it is, whatever the names in it."""

import ast
import csv
import io
from pathlib import Path

import pytest

import saap_jax
from saap_jax.report.kinds.variants import csv_table
from saap_jax.report.page.csv_text import csv_text
from tests.report import conftest as fake


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1+cmd", "'+1+cmd"),
        ("-1+2", "'-1+2"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", r"\r=1"),
        ("-", "-"),
        ("-1.5e-3", "-1.5e-3"),
        ("+10", "+10"),
        ("wanda", "wanda"),
        ("", ""),
        (-0.1, "-0.1"),
        (1 / 3, repr(1 / 3)),
        (None, ""),
    ],
)
def test_what_begins_like_a_formula_is_text_unless_it_is_a_number(cell, written):
    assert list(csv.reader(io.StringIO(csv_text([cell], [[cell]]), newline=""))) == [[written], [written]]


def test_in_a_table_of_a_run():
    lines = list(csv.reader(io.StringIO(csv_table(fake.fields(), [fake.candidate("=1+2", 0.2, (1.0, 2.0))]))))
    assert [line[0] for line in lines] == ["candidate", "dense", "'=1+2@0.2"]


def test_there_is_one_writer():
    """No other module of the package writes CSV by itself."""
    for path in Path(saap_jax.__file__).parent.rglob("*.py"):
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
        uses = "csv" in {alias.name for node in imported for alias in node.names}
        assert uses == (path.name == "csv_text.py"), path
