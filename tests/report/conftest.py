"""A finished comparison with invented perplexities: eight estimators at two ratios on a model of 30 layers.

Nothing is measured; what the records say and how they are shaped is for the code that writes those of every sweep.
"""

import dataclasses
import functools
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from saap_jax.selection.variants import Candidate, Variant, candidate_name, variants_of

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.data import Windows
from saap_jax.evaluation.perplexity import WindowLosses
from saap_jax.jobs import sweep
from saap_jax.llama import LayerWidths, LlamaSpec, abstract_llama
from saap_jax.runs.directory import RunDirectory
from saap_jax.runtime.progress import quiet
from saap_jax.subjects.llama import LlamaSubject

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
LAYERS, UNITS, WINDOWS = 30, {"attention": 3, "mlp": 1536}, 8
DENSE_PPL = (22.4, 34.7)


class Memory(RunDirectory):
    """A run that is in no directory."""

    def __init__(self):
        super().__init__(Path(), {})
        self.lines: list[dict] = []

    @property
    def record(self) -> dict[str, Any]:
        return self._record

    def candidates(self) -> list[dict]:
        return list(self.lines)

    def append(self, line: dict) -> None:
        self.lines.append(line)

    def update(self, **fields: Any) -> None:
        self._record |= fields


@functools.cache
def model():
    widths = LayerWidths(kv_heads=UNITS["attention"], q_per_kv=3, mlp=UNITS["mlp"])
    return abstract_llama(LlamaSpec(vocab=49152, embed=576, head_dim=64, layers=(widths,) * LAYERS, tied=True))


@functools.cache
def variant(estimator: str, allocation: str) -> Variant:
    """Return the variant of an estimator of any name."""
    known = variants_of(CompareConfig())[0]
    search = dataclasses.replace(known.search, allocation=allocation)
    return known._replace(name=estimator, estimator=estimator, scores=estimator, search=search)


def measured(keeps: dict, about: dict, ppl: tuple[float, float]) -> Memory:
    """Return what a sweep writes of keep-sets with these perplexities; windows differ, and are alike in all."""
    run = Memory()
    length = 4
    window = Windows(np.zeros((WINDOWS, length), np.int32), np.ones((WINDOWS, length), bool))
    evaluator = sweep.Evaluator(
        run, LlamaSubject(model()), dict.fromkeys(METRICS, window), EvaluationConfig(batch_size=2), 1
    )
    around = np.linspace(-0.5, 0.5, WINDOWS)
    with np.errstate(divide="ignore"):
        losses = np.concatenate([np.log(value) + around for value in ppl])
    found = WindowLosses(losses * (length - 1), np.full(2 * WINDOWS, length - 1))
    with mock.patch("saap_jax.subjects.llama.candidate_losses", return_value=iter([{0: found}])):
        evaluator.measure(keeps, about, doing="", track=quiet, stage=None)
    return run


def candidate(estimator: str, ratio: float, ppl: tuple[float, float], allocation: str = "global") -> dict:
    """Return one line of metrics.jsonl."""
    dice = random.Random(f"{estimator} {ratio}")
    kept = {
        "attention": [dice.choices((3, 2, 1), (1 - ratio, ratio, ratio / 3))[0] for _ in range(LAYERS)],
        "mlp": [round(1536 * min(1.0, max(0.0, dice.gauss(1 - ratio, 0.1)))) for _ in range(LAYERS)],
    }
    keep = {name: np.arange(UNITS[name]) < np.array(counts)[:, None] for name, counts in kept.items()}
    name = candidate_name(estimator, ratio)
    (line,) = measured({name: keep}, {name: Candidate(name, variant(estimator, allocation), 0, ratio).about}, ppl).lines
    return line | {"seconds": 41.25}


def older(line: dict) -> dict:
    """Return a line as versions before losses and variants wrote it."""
    return {key: value for key, value in line.items() if key not in ("losses", "variant", "seed", "scenario")}


@functools.cache
def _candidates() -> tuple[dict, ...]:
    found = []
    for ratio, base in ((0.2, 34.0), (0.5, 130.0)):
        for index, estimator in enumerate(ESTIMATORS):
            ppl_in, ppl_out = base * (1.9 - 0.11 * index), base * (2.4 - 0.17 * index)
            if estimator == "magnitude":
                ppl_in, ppl_out = 91_058.4 * ratio, 123_456.78
            if estimator == "random" and ratio == 0.5:
                ppl_in, ppl_out = math.inf, math.nan
            found.append(candidate(estimator, ratio, (ppl_in, ppl_out)))
    return tuple(found)


def candidates() -> list[dict]:
    """Return all lines of metrics.jsonl: one value off the scale, one infinite, one NaN."""
    return [dict(line) for line in _candidates()]


@functools.cache
def _described() -> tuple[dict, dict]:
    """Return what a sweep says of itself, and of the dense model."""
    about = sweep.about_run("compare", LlamaSubject(model(), name="invented-135M"), METRICS, (0,))
    return about, measured(sweep.unpruned(LlamaSubject(model())), {}, DENSE_PPL).record["dense"] | {"seconds": 12.5}


def fields() -> dict:
    """Return what a finished run has put into run.json beside its stages."""
    about, dense = _described()
    return about | {
        "status": "finished",
        "model": dict(about["model"]),
        "dense": dense | {"ppl": dict(dense["ppl"])},
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
            "segments": 27,
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


@pytest.fixture
def older_run(tmp_path) -> RunDirectory:
    """The same run as a version wrote it that kept no losses."""
    directory = RunDirectory.open(tmp_path / "older", CONFIG)
    for line in candidates():
        directory.append(older(line))
    known = fields()
    directory.update(**known | {"dense": {key: value for key, value in known["dense"].items() if key != "losses"}})
    return directory
