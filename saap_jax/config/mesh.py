"""How the devices of a job are arranged: the part of a configuration that all commands on many devices share."""

import dataclasses
from typing import Literal

from saap_jax.config.checks import check_choices

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh of devices: what splits batches alone, batches and weights, and heads and channels."""

BATCH = ("data", "fsdp")
"""Mesh axes that the examples of a batch are spread over."""

WEIGHTS = "fsdp"
"""Mesh axis that the residual width of the weights is spread over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of a job are arranged, and what is spread over them; see `saap_jax.runtime.mesh`."""

    data: int = 1
    """Devices along `data`, each with other examples and the same weights; -1: those that are left."""
    fsdp: int = 1
    """Devices along `fsdp`, each with other examples and a part of every weight."""
    tensor: int = 1
    """Devices along `tensor`, each with a part of the heads, channels and vocabulary."""
    rules: tuple[str, ...] = ()
    """Changes to the rules: `AXIS=MESH_AXIS+…`, such as `vocab=` to hold the vocabulary whole."""
    uneven: Literal["refuse", "replicate"] = "refuse"
    """What to do with an axis that the devices do not divide."""

    def __post_init__(self) -> None:
        check_choices("mesh", self)
        sizes = [self.data, self.fsdp, self.tensor]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            got = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
            raise ValueError(f"mesh: expected sizes of at least 1, one of them perhaps -1, got {got}")
