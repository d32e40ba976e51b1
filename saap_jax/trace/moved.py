"""Where numbers go unchanged through a traced program: reshaped, transposed, cut into parts, dealt out to a scan.

A parameter that is only moved before a product takes part in it as it is: a number that is written at a place of the
product's operand can be written back into the parameter. A conversion between types of floating point counts as a move.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Int

from saap_jax.trace.interpret import Path
from saap_jax.trace.nested import called_program, opened, scan_split
from saap_jax.trace.program import CALLS
from saap_jax.trace.rules import dtype_of, shape_of

MOVES = frozenset({"reshape", "transpose", "squeeze", "slice", "split", "rev", "broadcast_in_dim"})
"""Operations that give each number another place, leave some out, or repeat some."""
_SAME = "copy copy_p convert_element_type sharding_constraint layout_constraint optimization_barrier device_put"
SAME = frozenset(_SAME.split())
"""Operations that leave each number at its place."""
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
"""Operations whose results are followed as those of parameters are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """Numbers of a parameter, or of the result of a product, at another place of the program."""

    source: str | Path
    """The path of the parameter, or of the equation that has the result."""
    loops: tuple[Path, ...]
    """The scans whose turns number the first axes."""
    steps: tuple[Callable[[Array], Array], ...] = ()

    def of(self, value: Array) -> Array:
        """Return what stands there for an array in the place of the source, of any type; `loops` come first."""
        for step in self.steps:
            value = step(value)
        return value

    def index(self, shape: Sequence[int]) -> Int[np.ndarray, "..."]:
        """Return for each number there its flat index in the source, of a given shape."""
        size = math.prod(shape)
        dtype = np.int32 if size <= np.iinfo(np.int32).max else np.uint32
        return np.asarray(self.of(jnp.asarray(np.arange(size, dtype=dtype).reshape(shape))))


class Use(NamedTuple):
    """Moved numbers as an operand of an equation that does something with them."""

    moved: Moved
    equation: Path
    """Of results of the whole program: ()."""
    operand: int
    eqn: JaxprEqn | None


def uses_of(program: ClosedJaxpr, paths: Sequence[str]) -> list[Use]:
    """Return every use of the parameters, the first inputs of a program, and of the results of products.

    The sum of a product's result and something that is no parameter (a residual stream) stands for the result: what is
    added to the one is added to the other.
    What a branch, a `while` loop or `shard_map` is given counts as used there, whatever happens inside.
    """
    uses: list[Use] = []
    inputs: list[Moved | None] = [Moved(path, ()) for path in paths]
    inputs += [None] * (len(program.jaxpr.invars) - len(paths))
    results = _follow(program.jaxpr, inputs, (), (), uses)
    uses += [Use(moved, (), number, None) for number, moved in enumerate(results) if moved is not None]
    return uses


def _follow(
    jaxpr: Jaxpr, inputs: Sequence[Moved | None], path: Path, scans: tuple[Path, ...], uses: list[Use]
) -> list[Moved | None]:
    """Return what a program's results are of, and note the uses inside it."""
    known: dict[Any, Moved | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Moved | None:
        return None if isinstance(atom, Literal) else known.get(atom)

    for number, eqn in enumerate(jaxpr.eqns):
        here, values = (*path, number), [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS:
            results = _follow(opened(called_program(eqn))[0], values, (*here, 0), scans, uses)
        elif name == "scan":
            results = _scan(eqn, values, here, scans, uses)
        elif any(values) and _moves(eqn):
            results = _after(eqn, values)
        elif (sum_of := _sum_of(eqn, values)) is not None:
            results = [sum_of]
        else:
            uses += [Use(moved, here, operand, eqn) for operand, moved in enumerate(values) if moved is not None]
            product = Moved(here, scans) if name in PRODUCTS else None
            results = [product] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(
    eqn: JaxprEqn, values: list[Moved | None], here: Path, scans: tuple[Path, ...], uses: list[Use]
) -> list[Moved | None]:
    """Follow a scan: constants are the same in each turn, stacked arrays get an axis of turns, carries are used."""
    first, last = scan_split(eqn)
    uses += [Use(moved, here, first + i, eqn) for i, moved in enumerate(values[first:last]) if moved is not None]
    rows = [moved and dataclasses.replace(moved, loops=(*moved.loops, here)) for moved in values[last:]]
    body = opened(eqn.params["jaxpr"])[0]
    results = _follow(body, [*values[:first], *[None] * (last - first), *rows], (*here, 0), (*scans, here), uses)
    uses += [Use(moved, here, -1, eqn) for moved in results if moved is not None]
    return [None] * len(eqn.outvars)


def _moves(eqn: JaxprEqn) -> bool:
    """Say whether an equation does nothing but move its operands."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        return all(jnp.issubdtype(dtype_of(each), jnp.floating) for each in (eqn.invars[0], eqn.outvars[0]))
    return name in SAME or (name in MOVES and len(eqn.invars) == 1)


def _sum_of(eqn: JaxprEqn, values: list[Moved | None]) -> Moved | None:
    """Return the result of a product of which an equation returns the sum with something that is no parameter."""
    if eqn.primitive.name not in ("add", "add_any") or sum(value is not None for value in values) != 1:
        return None
    (operand,) = [i for i, value in enumerate(values) if value is not None]
    moved, same = values[operand], shape_of(eqn.invars[operand]) == shape_of(eqn.outvars[0])
    return moved if moved is not None and same and not isinstance(moved.source, str) else None


def _after(eqn: JaxprEqn, values: list[Moved | None]) -> list[Moved | None]:
    """Return what the results of a move are of."""
    if eqn.primitive.name in SAME:
        return values
    (moved,) = values
    assert moved is not None
    depth, parameters = len(moved.loops), eqn.primitive.get_bind_params(eqn.params)

    def step(number: int) -> Callable[[Array], Array]:
        def bound(value: Array) -> Array:
            results = eqn.primitive.bind(value, **parameters)
            return results[number] if eqn.primitive.multiple_results else results

        for _ in range(depth):
            bound = jax.vmap(bound)
        return bound

    return [dataclasses.replace(moved, steps=(*moved.steps, step(number))) for number in range(len(eqn.outvars))]
