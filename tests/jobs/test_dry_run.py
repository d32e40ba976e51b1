"""What commands leave as `results.csv`, and what `--dry-run` says of them before they leave anything."""

import csv
import re

import pytest

from saap_jax.cli import main
from tests.cli.test_main import refused
from tests.jobs.test_table import SMALL

COMMANDS = {
    "score --estimators wanda gate_fisher taylor_element": (SMALL[:6], "3 estimators, one pass over 48 tokens"),
    "fidelity --estimators wanda --channels-per-layer 1": (SMALL[:6], "units go one by one, on 48 tokens"),
    "sensitivity --method magnitude --fractions 0.5": (SMALL, "4 evaluations of one place at a time, of 256 tokens"),
    "compare --methods magnitude --ratios 0.2": (SMALL, "1 method, 1 ratio, 1 seed, 1 candidate"),
    "prune --method magnitude --targets.parameters 90% --out pruned": (SMALL, "searching the ratio"),
    "evaluate --tasks items.jsonl --windows 2 --length 16": ([], "one pass over 64 tokens"),
    "ab --windows 2 --length 16 --sources builtin:reference": ([], "one pass over 32 tokens"),
    "export --dtype bfloat16": ([], "its weights as bfloat16"),
    "recover --dense= --training.max-steps 3 --training.batch-size 4 --data.length 32": ([], "3 steps of 4 rows of 32"),
}
"""Words -> further ones, and what is said."""
UNKNOWN = {"prune": "the ratio", "evaluate": "items.jsonl", "export": "writing", "recover": "timing the decoding"}
"""Of which the time is told in part, or not at all."""


@pytest.mark.parametrize("words", COMMANDS)
def test_a_dry_run_says_what_is_done_and_leaves_nothing(words, tiny_model_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more, said = COMMANDS[words]
    name, *rest = words.split()
    model = str(tiny_model_directory)
    first = {"ab": [model, model], "export": [model, "out"], "evaluate": [model]}.get(name, ["--model", model])
    assert main.main([name, *first, *rest, *more, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert said in text
    assert ("time: about" in text) == (name != "export")
    unknown = re.findall("time of (.*): not estimated", text)
    assert [UNKNOWN.get(name, "none") in each for each in unknown] == [True] * (name in UNKNOWN)
    assert ("disk: about" in text) == (name not in ("evaluate", "ab"))
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_refuses_what_the_job_would(tiny_model_directory, capsys):
    model = ["--model", str(tiny_model_directory)]
    assert "did you mean 'gate_fisher'" in refused(
        capsys, ["score", *model, "--estimators", "gate_fischer", "--dry-run"]
    )
    assert "protect: expected layers" in refused(
        capsys, ["sensitivity", *model, "--method", "magnitude>within(protect=(2,))>uniform", "--dry-run"]
    )


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
