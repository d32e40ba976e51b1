"""What a kill may not change: `experiments/kills.py`, a twentieth of it, and that its comparison would notice."""

import json
import shutil

import kills
import pytest

from tests.fake_runs import fake_run


def test_timing_may_differ_and_nothing_else(tmp_path):
    ours, theirs = fake_run(tmp_path / "ours"), tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    assert kills.differences(ours, theirs) == []
    assert kills.unnoticed(ours) == []
    record = json.loads((theirs / "run.json").read_text())
    record["dense"]["seconds"] *= 2
    (theirs / "run.json").write_text(json.dumps(record))
    assert kills.differences(ours, theirs) == []
    (theirs / "metrics.jsonl").write_text((ours / "metrics.jsonl").read_text() + '{"candid')
    (theirs / ".best.partial").write_text("half")
    assert [line.partition(":")[0] for line in kills.differences(ours, theirs)] == [".best.partial", "metrics.jsonl"]


REST = ("recover", "export to GGUF", "frontier", "sensitivity", "fidelity", "prune", "score")


def all_end_the_same(work, names, count, capsys) -> bool:
    words = ["--kills", "10", "--seed", "1", "--only", *names, "--work", str(work)]
    return kills.main(words) == 0 and f"{count} of {count} kills" in capsys.readouterr().out


@pytest.mark.slow
def test_three_kills(tmp_path, capsys):
    """Those of `compare`."""
    assert all_end_the_same(tmp_path / "work", ["compare"], 3, capsys)


@pytest.mark.slow
def test_the_rest(tmp_path, capsys):
    """One of each other command that makes a run or a model."""
    assert all_end_the_same(tmp_path / "work", REST, 7, capsys)
