"""Arrays of a traced model on a mesh: parameters over `fsdp` by their largest axis that it divides, examples over both.

The axes of somebody else's parameters have no names for rules to go by; the compiler splits the program by where its
arrays lie.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from saap_jax.config.mesh import BATCH, WEIGHTS
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.processes import controllers
from saap_jax.trace.problem import Examples


def check_layout(layout: Layout | None) -> None:
    """Raise ValueError for devices of several processes, over which nothing of a traced model is spread."""
    if layout is not None and (processes := controllers()) > 1:
        raise ValueError(f"mesh: expected the devices of one process for a traced model, got {processes} processes")


def place_params(params: Any, layout: Layout | None) -> Any:
    """Return parameters spread over `fsdp`; those that no axis of fits are on every device, as all are on `data`."""
    if layout is None:
        return params
    count = layout.mesh.shape[WEIGHTS]

    def place(leaf: Any) -> Any:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size and size % count == 0]
        widest = max(fitting, key=lambda axis: leaf.shape[axis]) if fitting and count > 1 else None
        spec = PartitionSpec(*(WEIGHTS if axis == widest else None for axis in range(leaf.ndim)))
        return jax.device_put(leaf, NamedSharding(layout.mesh, spec))

    return jax.tree.map(place, params)


def place_rows(examples: Examples, layout: Layout | None) -> Examples:
    """Return examples spread over `data` and `fsdp`; on every device where their number is not divided."""
    if layout is None:
        return examples

    def place(leaf: Any) -> Any:
        parts = BATCH if leaf.shape[0] % layout.batch_shards == 0 else None
        return jax.device_put(np.asarray(leaf), NamedSharding(layout.mesh, PartitionSpec(parts)))

    return jax.tree.map(place, examples)
