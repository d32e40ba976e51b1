"""Invented comparisons with losses of each window: six variants at two ratios, or one variant at one; nothing is
measured."""

import functools
import math
import random
from pathlib import Path

import numpy as np

from saap_jax.runs.directory import RunDirectory

VARIANTS = ("random", "magnitude > uniform", "taylor_vector", "taylor_element", "gate_fisher", "wanda > uniform > bias")
METRICS = ("ppl@128 builtin:reference", "ppl@128 builtin:descriptions")
LAYERS, UNITS, WINDOWS = 30, {"attention": 3, "mlp": 1536}, 24
CONFIG = {"ratios": [0.2, 0.5], "limit": math.inf, "calibration": {},
          "evaluation": {"windows": WINDOWS, "length": 128, "batch_size": 2}}  # fmt: skip
PARAMETERS, PRUNABLE = 134_515_008, 106_168_320
DENSE = (22.4, 34.7)


def losses(ppl: float, seed: str) -> list[float]:
    """Return losses of windows whose mean is that of a perplexity; they differ little between models."""
    if not math.isfinite(ppl):
        return [ppl] * WINDOWS
    own = np.random.default_rng(list(seed.encode())).normal(0, 0.05, WINDOWS)
    hard = np.linspace(-0.5, 0.5, WINDOWS)
    return (math.log(ppl) + hard + own - own.mean()).tolist()


def candidate(variant: str, ratio: float, ppl: tuple[float, float], seed: int = 0, **more) -> dict:
    """Return one line of metrics.jsonl."""
    dice = random.Random(f"{variant} {ratio}")
    kept = {
        "attention": [dice.choices((3, 2, 1), (1 - ratio, ratio, ratio / 3))[0] for _ in range(LAYERS)],
        "mlp": [round(1536 * min(1.0, max(0.0, dice.gauss(1 - ratio, 0.1)))) for _ in range(LAYERS)],
    }
    return {
        "candidate": f"{variant},seed={seed}@{ratio:g}" if seed else f"{variant}@{ratio:g}",
        "variant": variant,
        "seed": seed,
        "ratio_asked": ratio,
        "ratio_actual": ratio + 0.0003,
        "parameters": round(PARAMETERS - ratio * PRUNABLE),
        "ppl": dict(zip(METRICS, ppl, strict=True)),
        "losses": {name: losses(value, f"{variant} {name} {seed}") for name, value in zip(METRICS, ppl, strict=True)},
        "kept": kept,
        "seconds": 41.25,
    } | more


@functools.cache
def _candidates() -> tuple[dict, ...]:
    found = []
    for ratio, base in ((0.2, 34.0), (0.5, 130.0)):
        for index, variant in enumerate(VARIANTS):
            ppl = (base * (1.9 - 0.11 * index), base * (2.4 - 0.17 * index))
            if variant.startswith("magnitude"):
                ppl = (91_058.4 * ratio, 123_456.78)
            if variant == "random" and ratio == 0.5:
                ppl = (math.inf, math.nan)
            found.append(candidate(variant, ratio, ppl))
    return tuple(found)


def candidates() -> list[dict]:
    """Return all lines of metrics.jsonl: one value off the scale, one infinite, one NaN."""
    return [dict(line) for line in _candidates()]


def fields() -> dict:
    """Return what a finished run has put into run.json beside its stages."""
    return {
        "kind": "compare",
        "status": "finished",
        "model": {"name": "invented-135M", "parameters": PARAMETERS, "prunable_parameters": PRUNABLE, "layers": LAYERS,
                  "units": UNITS},
        "metrics": [{"name": name, "domain": of} for name, of in zip(METRICS, ("in", "out"), strict=True)],
        "seeds": {"calibration": [0]},
        "dense": {
            "ppl": dict(zip(METRICS, DENSE, strict=True)),
            "losses": {name: losses(value, f"dense {name}") for name, value in zip(METRICS, DENSE, strict=True)},
            "parameters": PARAMETERS,
            "seconds": 12.5,
        },
        "best": {
            "candidate": "gate_fisher@0.2",
            "parameters": 113_000_000,
            "bytes": 452_000_000,
            "dense_bytes": 538_060_032,
            "forward_seconds": 0.31,
            "dense_forward_seconds": 0.38,
            "turns": ([0.38, 0.4], [0.31, 0.31]),
            "forward_tokens": 1024,
            "ppl": dict(zip(METRICS, (45.9, 52.7), strict=True)),
            "ppl_masked": dict(zip(METRICS, (45.9000004, 52.7), strict=True)),
            "segments": 27,
        },
    }  # fmt: skip


def kept_run(path: Path, lines: list[dict] | None = None, *, of: str = "invented", **more) -> RunDirectory:
    """Write a run directory of candidates and of fields of run.json; `of` is the model."""
    run = RunDirectory.open(path, CONFIG | {"name": path.name, "model": {"name": of, "dtype": "float32"}})
    with run.stage("load"):
        pass
    for line in candidates() if lines is None else lines:
        run.append(line)
    run.update(**fields() | more)
    return run


def fake_run(path: Path, *, seeds=(0,), shift: float = 0.0, model: str = "tiny") -> Path:
    """Write a comparison of few parameters: a dense model, and `wanda` at 20 % whose losses are the dense ones + shift.

    The second seed and those after it add noise.
    """
    dice, lines = np.random.default_rng(0), []
    dense = {metric: dice.normal(4, 1, WINDOWS) for metric in METRICS}
    for number, seed in enumerate(seeds):
        own = {metric: values + shift + 0.01 * number * dice.normal(size=WINDOWS) for metric, values in dense.items()}
        line = candidate("wanda", 0.2, (1.0, 1.0), seed, parameters=80 + number, chain="wanda > uniform") | _both(own)
        name = "wanda@0.2" if len(seeds) == 1 else f"wanda, seed {seed}@0.2"
        lines.append(line | {"candidate": name})
    best = {"candidate": lines[0]["candidate"]}
    return kept_run(path, lines, of=model, dense={"parameters": 100, "seconds": 1.0, **_both(dense)}, best=best).path


def _both(own: dict) -> dict:
    return {"ppl": {metric: np.exp(values.mean()) for metric, values in own.items()}, "losses": own}
