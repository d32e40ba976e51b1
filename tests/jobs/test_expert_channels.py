"""Channels inside experts in commands: compared, pruned, scored, exported."""

import json

import numpy as np
import pytest

from saap_jax.llama import load_keep, load_model, save_model
from saap_jax.types import EXPERT_CHANNELS, STRUCTURES
from tests.helpers import random_model
from tests.test_experts import spec_of

pytestmark = pytest.mark.slow
"""An option of commands; what it is made of is in the default suite (`tests/test_expert_channels.py`)."""

SHARE = "--search.expert-channels.share"


def test_commands(tokenizer, tmp_path, run):
    source = str(
        save_model(random_model(spec_of("mixtral", vocab=len(tokenizer))), tmp_path / "m", tokenizer=tokenizer)
    )
    runs = tmp_path / "runs"
    text = ["--model.name", source, "--calibration.examples", "8", "--calibration.length", "16"]
    text += ["--calibration.batch-size", "2"]
    free = "--search.skip-layers"
    judged = ["--evaluation.windows", "3", "--evaluation.length", "16", "--evaluation.batch-size", "2"]
    run(
        *("compare", *text, "--runs", str(runs), *judged, free, "--ratios", "0.3"),
        *("--estimation.estimators", "wanda", "gate_fisher", "--grid.expert-channels", "0", "0.5"),
    )
    rows = [json.loads(line) for line in (runs / "compare" / "metrics.jsonl").read_text().splitlines()]
    assert {row["candidate"] for row in rows} == {
        f"{name},expert_channels={share}@0.3" for name in ("wanda", "gate_fisher") for share in ("0", "0.5")
    }
    for row in rows:
        assert row["ratio_actual"] >= 0.3
        experts, channels = row["kept"]["mlp"], row["kept"][EXPERT_CHANNELS]
        fewer = [inner < 12 * count for inner, count in zip(channels, experts, strict=True)]
        assert any(fewer) == ("=0.5" in row["candidate"])
    assert f"{EXPERT_CHANNELS} kept, by layer" in (runs / "compare" / "report.html").read_text()

    out = tmp_path / "pruned"
    said = run("prune", *text, free, "--ratio", "0.3", "--estimator", "saap", "--out", str(out), SHARE, "0.5")
    assert "channels of experts" in said
    assert "expert_channels is not compensated: matrices of experts are left as they are" in said
    pruned, keep = load_model(out), load_keep(out)
    assert min(layer.channels for layer in pruned.spec.layers) < 12
    assert set(keep) == {*STRUCTURES, EXPERT_CHANNELS}
    assert "ppl@16" in run("evaluate", str(out), "--windows", "3", "--length", "16")
    run("plan", f"{out}/config.json", "gpu:h100:1", "--task", "score")

    run(
        *("score", *text, "--runs", str(runs), "--estimation.estimators", "wanda"),
        *("--model.further", EXPERT_CHANNELS),
    )
    with np.load(runs / "score" / "scores.npz") as arrays:
        assert {key.rpartition("/")[2] for key in arrays} == {*STRUCTURES, EXPERT_CHANNELS}
