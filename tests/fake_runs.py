"""Invented run directories with losses of each window."""

from pathlib import Path

import numpy as np

from saap_jax.runs.directory import RunDirectory

METRICS = ("ppl@16 builtin:reference", "ppl@16 builtin:descriptions")
WINDOWS = 8


def fake_run(
    path: Path, *, seeds=(0,), shift: float = 0.0, model: str = "tiny", older: bool = False, seed_of_losses: int = 0
) -> Path:
    """Write a finished comparison: a dense model, and `wanda` at 20 % whose losses are the dense ones + `shift`.

    The second seed and those after it add noise. An older run has no losses, variants and seeds.
    """
    rng = np.random.default_rng(seed_of_losses)
    dense = {metric: rng.normal(4, 1, WINDOWS) for metric in METRICS}
    config = {
        "model": {"name": model, "dtype": "float32"},
        "evaluation": {"windows": WINDOWS, "length": 16, "batch_size": 2},
    }
    run = RunDirectory.open(path, config)
    for number, seed in enumerate(seeds):
        losses = {metric: values + shift + 0.01 * number * rng.normal(size=WINDOWS) for metric, values in dense.items()}
        name = "wanda@0.2" if len(seeds) == 1 else f"wanda, seed {seed}@0.2"
        row = {"candidate": name, "estimator": "wanda", "ratio_asked": 0.2, "parameters": 80 + number, **_both(losses)}
        if older:
            del row["losses"]
        else:
            row |= {"variant": "wanda", "chain": "wanda > uniform", "seed": seed}
        run.append(row)
    run.update(
        kind="compare",
        status="finished",
        metrics=[{"name": name, "domain": domain} for name, domain in zip(METRICS, ("in", "out"), strict=True)],
        dense={"parameters": 100, "seconds": 1.0, **_both(dense)},
        best={"candidate": name if len(seeds) == 1 else f"wanda, seed {seeds[0]}@0.2"},
    )
    return path


def _both(losses: dict) -> dict:
    return {"ppl": {metric: np.exp(values.mean()) for metric, values in losses.items()}, "losses": losses}
