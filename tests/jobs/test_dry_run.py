"""What commands leave as `results.csv`, and what `--dry-run` says of them before they leave anything."""

import csv

import pytest

from saap_jax.cli import main
from tests.jobs.test_table import SMALL

COMMANDS = {
    "compare --methods magnitude --ratios 0.2": "1 method, 1 ratio, 1 seed, 1 candidate",
    "prune --method magnitude --ratio 0.2 --out pruned": "1 method, 1 ratio, 1 seed, 1 candidate",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_dry_run_says_what_is_done_and_leaves_nothing(words, tiny_model_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([*words.split(), "--model", str(tiny_model_directory), *SMALL, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[words] in text
    assert "time: about" in text
    assert "disk: about" in text
    assert not [*tmp_path.iterdir()]
    assert main.main([*words.split(), "--model", str(tiny_model_directory), *SMALL, "--dry-run", "--out", "."]) == 2
    assert ("found .; choose another --out" in capsys.readouterr().err) == words.startswith("prune"), "control"


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("score --estimators wanda magnitude", {"estimator": {"wanda", "magnitude"}, "layer": {"0", "1"}}),
        ("fidelity --estimators wanda --channels-per-layer 1", {"estimator": {"wanda"}, "measure": {"spearman"}}),
    ],
)
def test_every_run_has_its_results_as_a_table(words, rows, tiny_model_directory, tmp_path):
    command = [*words.split(), "--model", str(tiny_model_directory), "--runs", str(tmp_path), *SMALL[:6]]
    assert main.main(command) == 0
    found = list(csv.DictReader((tmp_path / command[0] / "results.csv").read_text().splitlines()))
    assert {name: {row[name] for row in found} >= values for name, values in rows.items()} == dict.fromkeys(rows, True)
    assert not any("seconds" in name for name in found[0])
