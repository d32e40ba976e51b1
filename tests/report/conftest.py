"""Invented records of a finished comparison: eight estimators at two ratios on a model of 30 layers."""

import math
import random

import pytest

from saap_jax.runs.directory import RunDirectory

ESTIMATORS = (
    "random",
    "magnitude",
    "taylor_vector",
    "taylor_element",
    "taylor_element_second",
    "gate_fisher",
    "wanda",
    "activation_frequency",
)
METRICS = ("ppl@128 builtin:reference", "ppl@128 builtin:descriptions")
CONFIG = {"name": "fake", "model": "invented", "search": {"ratios": [0.2, 0.5], "min_keep": 1}, "limit": math.inf}
LAYERS, UNITS = 30, {"attention": 3, "mlp": 1536}


def candidate(estimator: str, ratio: float, ppl: tuple[float, float], allocation: str = "global") -> dict:
    """Return one line of metrics.jsonl."""
    dice = random.Random(f"{estimator} {ratio}")
    kept = {
        "attention": [dice.choices((3, 2, 1), (1 - ratio, ratio, ratio / 3))[0] for _ in range(LAYERS)],
        "mlp": [round(1536 * min(1.0, max(0.0, dice.gauss(1 - ratio, 0.1)))) for _ in range(LAYERS)],
    }
    actual = ratio + dice.uniform(-0.004, 0.004)
    return {
        "candidate": f"{estimator}@{ratio}",
        "estimator": estimator,
        "allocation": allocation,
        "ratio_asked": ratio,
        "ratio_actual": actual,
        "parameters": round(134_515_008 - 106_168_320 * actual),
        "ppl": dict(zip(METRICS, ppl, strict=True)),
        "seconds": 41.25,
        "kept": kept,
    }


def candidates() -> list[dict]:
    """Return all lines of metrics.jsonl: one value off the scale, one infinite, one NaN."""
    found = []
    for ratio, base in ((0.2, 34.0), (0.5, 130.0)):
        for index, estimator in enumerate(ESTIMATORS):
            ppl_in, ppl_out = base * (1.9 - 0.11 * index), base * (2.4 - 0.17 * index)
            if estimator == "magnitude":
                ppl_in, ppl_out = 91_058.4 * ratio, 123_456.78
            if estimator == "random" and ratio == 0.5:
                ppl_in, ppl_out = math.inf, math.nan
            found.append(candidate(estimator, ratio, (ppl_in, ppl_out)))
    return found


def fields() -> dict:
    """Return what a finished run has put into run.json beside its stages."""
    return {
        "kind": "compare",
        "status": "finished",
        "versions": {"saap_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7"},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "seeds": {"root": 0},
        "model": {
            "name": "invented-135M",
            "parameters": 134_515_008,
            "prunable_parameters": 106_168_320,
            "layers": LAYERS,
            "units": UNITS,
        },
        "metrics": [{"name": METRICS[0], "domain": "in"}, {"name": METRICS[1], "domain": "out"}],
        "dense": {"ppl": dict(zip(METRICS, (22.4, 34.7), strict=True)), "parameters": 134_515_008, "seconds": 12.5},
        "best": {
            "candidate": "gate_fisher@0.2",
            "parameters": 113_000_000,
            "bytes": 452_000_000,
            "dense_bytes": 538_060_032,
            "forward_seconds": 0.31,
            "dense_forward_seconds": 0.38,
            "forward_tokens": 1024,
            "ppl": dict(zip(METRICS, (45.9, 52.7), strict=True)),
            "ppl_masked": dict(zip(METRICS, (45.9000004, 52.7), strict=True)),
            "runs": 27,
        },
    }


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A finished run directory."""
    directory = RunDirectory.open(tmp_path / "fake", CONFIG)
    with directory.stage("load"):
        pass
    with directory.stage("observe"):
        pass
    for line in candidates():
        directory.append(line)
    directory.update(**fields())
    return directory
