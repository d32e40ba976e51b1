"""Functions that name axes of a mesh (explicit sharding: `out_sharding=P("data", None)`, `reshard`), less the names.

On `Explicit` axes a function says where its arrays lie, and an array whose size an axis does not divide is refused: one
example of a batch, a pruned width. So such a function is traced on a mesh of one device whose axes have the same names,
and the program is evaluated without what it says of places: the compiler finds them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from saap_jax.trace.interpret import Changes, Path, evaluate

_PLACING = ("reshard", "mesh_cast", "sharding_constraint")
"""Operations that only say where an array lies."""
_PLACES = ("sharding", "out_sharding")
"""Parameters of others that do."""


def without_axes(function: Callable[..., Any], axes: Sequence[str]) -> Callable[..., Any]:
    """Return a function that names axes of an explicit mesh as one that can be traced without a mesh.

    One that names none is called as it is. Of another, calls are inlined: a custom derivative is that of its program.

    Args:
        axes: the names of the mesh's axes; none: the function is returned.
    """
    if not axes:
        return function
    one_device = AbstractMesh((1,) * len(axes), tuple(axes), (AxisType.Explicit,) * len(axes))

    def plain(*arguments: Any) -> Any:
        shapes = jax.tree.map(_shape, arguments)
        with use_abstract_mesh(AbstractMesh((), ())):  # between meshes of different sizes
            if _names_none(function, shapes):
                return function(*arguments)
            with use_abstract_mesh(one_device):
                program, results = jax.make_jaxpr(function, return_shape=True)(*shapes)
        flat = jax.tree.leaves(arguments)
        values = evaluate(program.jaxpr, program.consts, flat, (), Changes([], resize=_placeless, replace=_placing))
        return jax.tree.unflatten(jax.tree.structure(results), values)

    return plain


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), weak_type=getattr(leaf, "weak_type", False))


def _names_none(function: Callable[..., Any], shapes: Sequence[Any]) -> bool:
    """Say whether a function can be traced without a mesh."""
    try:
        jax.eval_shape(function, *shapes)
    except Exception:  # whatever the function raises, and raises again on the mesh
        return False
    return True


def _placing(eqn: JaxprEqn) -> Callable[..., Sequence[Any]] | None:
    return (lambda *values: values) if eqn.primitive.name in _PLACING else None


def _placeless(path: Path, eqn: JaxprEqn, values: Sequence[Any]) -> dict[str, Any]:
    """Return the parameters of an equation without places."""
    parameters = eqn.primitive.get_bind_params(eqn.params)
    return {**parameters, **{name: None for name in _PLACES if name in parameters}}
