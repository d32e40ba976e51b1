"""Runs: stretches of equal-shaped layers. Where whole-model trees are split into a model's runs and joined again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.types import STRUCTURES, Gates, Keep, LayerGates


class RunBounds(NamedTuple):
    """Layers `start … stop - 1` of the model form a run whose layers have `units[structure]` units each."""

    start: int
    stop: int
    units: dict[str, int]


def run_bounds(runs: Sequence[Any]) -> list[RunBounds]:
    """Return the bounds of each run of a model, from the shapes of its arrays."""
    bounds, start = [], 0
    for run in runs:
        widths = run.widths
        bounds.append(RunBounds(start, start + run.length, {"attention": widths.kv_heads, "mlp": widths.mlp}))
        start += run.length
    return bounds


def split_gates(gates: Gates | None, bounds: list[RunBounds]) -> list[LayerGates | None]:
    """Slice whole-model gates `[*batch, layers, units]` into one tree a run, `[layers, *batch, units]`, for scan."""
    if gates is None:
        return [None] * len(bounds)
    widest = {name: max(run.units[name] for run in bounds) for name in STRUCTURES}
    for name in STRUCTURES:
        if gates[name].shape[-2:] != (bounds[-1].stop, widest[name]):
            raise ValueError(
                f"gates: expected {name} of shape [..., {bounds[-1].stop} layers, {widest[name]} units] for this "
                f"model, got {gates[name].shape}; make them with `ones_gates(model)`"
            )
    return [
        {n: jnp.moveaxis(gates[n][..., run.start : run.stop, : run.units[n]], -2, 0) for n in STRUCTURES}
        for run in bounds
    ]


def join_runs(pieces: Sequence[Any], fill: float = 0.0) -> Any:
    """Join per-run trees with leaves `[layers, units, ...]` into whole-model ones, narrow layers padded with `fill`."""

    def join(*leaves: jax.Array) -> jax.Array:
        widest = max(leaf.shape[1] for leaf in leaves)
        pads = [[(0, 0), (0, widest - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2) for leaf in leaves]
        return jnp.concatenate([jnp.pad(x, p, constant_values=fill) for x, p in zip(leaves, pads, strict=True)])

    return jax.tree.map(join, *pieces)


def existing_units(runs: Sequence[Any]) -> Keep:
    """Return which units a model has: all True for a dense one, False in the padding of a cut one's narrow layers."""
    bounds = run_bounds(runs)
    units: Keep = {}
    for name in STRUCTURES:
        widest = max(run.units[name] for run in bounds)
        rows = [np.arange(widest) < run.units[name] for run in bounds for _ in range(run.start, run.stop)]
        units[name] = np.stack(rows)
    return units


def ones_gates(runs: Sequence[Any]) -> Gates:
    """Return gates that keep everything, `[layers, units]` a structure, float32."""
    return {name: jnp.ones(units.shape, jnp.float32) for name, units in existing_units(runs).items()}
