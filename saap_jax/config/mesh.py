"""How the devices of a job are arranged: the part of a configuration that all commands on many devices share."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from saap_jax.checks import Checked

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh of devices: what splits batches alone, batches and weights, and heads and channels."""

EXPERT = "expert"
"""Axis behind those, of a mesh where it is larger than 1: what splits the experts of a mixture alone."""

SPREAD = "mesh.data mesh.fsdp mesh.tensor mesh.expert"
"""Fields of a configuration that spread a job over several devices, as `Beside` takes them."""

BATCH = ("data", "fsdp")
"""Mesh axes that the examples of a batch are spread over."""

WEIGHTS = "fsdp"
"""Mesh axis that the residual width of the weights is spread over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """How the devices of a job are arranged, and what is spread over them; see `saap_jax.runtime.mesh`."""

    PLACE = "mesh."

    data: int = 1
    """Devices along `data`, each with other examples and the same weights; -1: those that are left."""
    fsdp: int = 1
    """Devices along `fsdp`, each with other examples and a part of every weight."""
    tensor: int = 1
    """Devices along `tensor`, each with a part of the heads, channels and vocabulary."""
    expert: int = 1
    """Devices along `expert`, each with a part of the experts of a mixture; more than 1 for a mixture alone."""
    rules: tuple[str, ...] = ()
    """Changes to the rules: `AXIS=MESH_AXIS+…`, such as `vocab=` to hold the vocabulary whole."""
    uneven: Literal["refuse", "replicate"] = "refuse"
    """What to do with an axis that the devices do not divide."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size < 1 and size != -1 for size in self.sizes) or self.sizes.count(-1) > 1:
            got = ", ".join(f"{axis} {size}" for axis, size in by_axis(self.sizes).items())
            raise ValueError(f"mesh: expected sizes of at least 1, one of them perhaps -1, got {got}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes along `MESH_AXES`, and along `EXPERT` where that is not 1."""
        return (self.data, self.fsdp, self.tensor, *(() if self.expert == 1 else (self.expert,)))


def by_axis(sizes: Sequence[int]) -> dict[str, int]:
    """Name the sizes of a mesh by its axes, three or four.

    >>> by_axis((1, 4, 2)), by_axis((1, 2, 1, 4))
    ({'data': 1, 'fsdp': 4, 'tensor': 2}, {'data': 1, 'fsdp': 2, 'tensor': 1, 'expert': 4})
    """
    return dict(zip((*MESH_AXES, EXPERT)[: max(len(sizes), len(MESH_AXES))], sizes, strict=True))
