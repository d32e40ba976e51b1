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


def test_a_dry_run_reads_the_texts_that_the_job_reads_and_refuses_what_it_refuses(
    tiny_model_directory, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("The cat sat on a mat, and there was a dog. " * 99)

    def told(words: str) -> str:
        code = main.main([*words.split(), "--model", str(tiny_model_directory), *SMALL[6:], "--dry-run"])
        said = capsys.readouterr()
        assert code == 2 * bool(said.err)
        return said.out + said.err

    small, prune = " ".join(SMALL[:6]), "prune --method magnitude --ratio 0.2"
    for command in ("compare --methods magnitude", "frontier --methods magnitude", prune):
        both = f"{small} --calibration.scenarios text:t.txt --evaluation.in-domain text:t.txt"
        assert "calibrate on one text and evaluate on another" in told(f"{command} {both}")
    assert "0 tokens of evaluation" in told(f"{prune} {small} --no-judge --evaluation.in-domain text:gone.txt")
    kept = "--calibration.examples 5 --calibration.length 16 --calibration.batch-size 2 --name kept --estimators wanda"
    assert main.main(["score", "--model", str(tiny_model_directory), *kept.split()]) == 0
    capsys.readouterr()
    assert "over 80 tokens of calibration" in told(f"{prune} --from-run runs/kept")
    assert "over 80 tokens of calibration" in told(f"{prune} --from-run runs/kept {' '.join(kept.split()[:6])}")
    said = told(f"{prune} --from-run runs/kept --calibration.examples 6")
    assert "calibration.examples: expected 5, as runs/kept has it, beside from_run, got 6; leave it out" in said
    assert "found no run.json in gone" in told(f"{prune} --from-run gone")


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
