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


@pytest.mark.slow
def test_ten_kills(tmp_path, capsys):
    """Three of `compare`, one of each other command, and one of an export."""
    assert kills.main(["--kills", "10", "--seed", "1", "--work", str(tmp_path / "work")]) == 0
    assert "10 of 10 kills" in capsys.readouterr().out
