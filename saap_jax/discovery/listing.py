"""The coupled structures of a model as a table."""

import jax
import jax.numpy as jnp
from rich.table import Table

from saap_jax.discovery.structures import count_parameters, discover, prunable_parameters
from saap_jax.discovery.tracing.trace import Traced, trace
from saap_jax.llama.model import Llama


def listing(name: str, model: Llama) -> tuple[Table, str]:
    """Return the structures of a model as a table, and a sentence on its size."""
    structures = discover(model)
    table = Table(title=f"coupled structures of {name}", title_justify="left")
    for column in ("structure", "members (path, axis)", "units a layer", "units", "parameters a unit"):
        table.add_column(column, justify="right" if column.startswith(("units", "param")) else "left")
    for structure in structures.values():
        members = "\n".join(f"{member.path}, {member.axis}" for member in structure.members)
        units, each = _range(structure.units), _range(structure.parameters_per_unit)
        table.add_row(f"{structure.name} ({structure.axis})", members, units, f"{sum(structure.units):,}", each)
    prunable, total = prunable_parameters(structures), count_parameters(model)
    return table, (
        f"{len(model.spec.layers)} layers in {len(model.runs)} runs; {total:,} parameters, "
        f"{prunable:,} of them prunable ({prunable / total:.1%})"
    )


def traced_model(model: Llama) -> Traced:
    """Return the structures of a model as its program tells them, to be drawn."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    return trace(Llama.__call__, shapes, jax.ShapeDtypeStruct((1, 16), jnp.int32))


def _range(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
