"""What the user's own code makes of smaller parameters, structure by structure.

Code may hold a size as a number: it then refuses smaller arrays, or takes them and computes something else (a flat
projection that is reshaped by a number of heads mixes the heads). The cut program does neither, but who wants to go on
with the own code needs to know.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.patterns import groups_of
from saap_jax.trace.trace import AxisMember, Traced, TracedStructure

RELATIVE = 1e-3
"""How far outputs may be apart that are equal but for rounding, relative to the largest."""

SAID = {"takes": "takes it", "shapes": "takes the shapes", "differs": "gives other outputs", "refuses": "refuses it"}
"""Verdicts in words, the worst last."""


class Verdict(NamedTuple):
    """What the own code does when a unit goes."""

    verdict: Literal["takes", "shapes", "differs", "refuses"]
    """`shapes`: it takes the shapes; what it computes was not seen, for the parameters have no values."""
    detail: str = ""

    @property
    def left_alone(self) -> bool:
        """Whether the own code does not take fewer units, or computes something else."""
        return self.verdict in ("differs", "refuses")

    def __str__(self) -> str:
        """Put the verdict into words."""
        return SAID[self.verdict] + (f" ({self.detail})" if self.detail else "")


def verdicts(
    function: Callable[..., Any], traced: Traced, structures: Sequence[TracedStructure], params: Any, *inputs: Any
) -> dict[str, Verdict]:
    """Try what a function makes of parameters without a unit, for each structure.

    Of structures that are alike but for numbers in their paths (equal layers) the first and the last are tried, and the
    worse of both holds for all. Values are drawn near those of the parameters, positive ones staying so, lest a matrix
    of zeros hide a difference; abstract parameters are tried by shapes only.
    """
    concrete = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves((params, inputs)))
    drawn = nearby(params) if concrete else params

    def tried(structure: TracedStructure) -> Verdict:
        if error := retrace(function, traced, structure, params, *inputs):
            return Verdict("refuses", " ".join(error.split())[:160])
        if not concrete:
            return Verdict("shapes")
        order = np.broadcast_to(np.arange(structure.units), (*structure.copied, structure.units))
        keep = {structure.name: np.random.default_rng(0).permuted(order, axis=-1) > 0}
        runs = function, smaller(traced, keep)
        with jax.numpy_rank_promotion("allow"):  # to compile one takes as long as both
            both = jax.jit(lambda *given: [jax.tree.leaves(run(*given)) for run in runs])
            own, cut = both(keep_units(traced, keep, drawn), *inputs)
        apart = max((_distance(a, b) for a, b in zip(own, cut, strict=True)), default=0.0)
        coarse = [8 * float(jnp.finfo(x.dtype).eps) for x in cut if jnp.issubdtype(x.dtype, jnp.floating)]
        if apart <= max([RELATIVE, *coarse]):
            return Verdict("takes")
        return Verdict("differs", f"by up to {apart:.1%} of the largest")

    found: dict[str, Verdict] = {}
    for group in groups_of(structures).values():
        each = [tried(one) for one in (group if len(group) < 2 else (group[0], group[-1]))]
        worst = max(each, key=lambda verdict: list(SAID).index(verdict.verdict))
        found.update(dict.fromkeys((structure.name for structure in group), worst))
    return found


def retrace(function: Callable[..., Any], traced: Traced, structure: TracedStructure, params: Any, *inputs: Any) -> str:
    """Trace the function again with parameters that lack one unit; give the error it raises, "" if none.

    An error means that the code holds a size of the structure as a number, or takes it from another array's shape.
    """
    smaller = iter(removed_shapes(traced, structure.members).values())
    leaves, tree = jax.tree.flatten(params)
    less = tree.unflatten([jax.ShapeDtypeStruct(next(smaller), jnp.result_type(leaf)) for leaf in leaves])
    try:
        after = jax.eval_shape(function, less, *inputs)
    except Exception as error:  # whatever the user's code says about sizes
        return f"{type(error).__name__}: {error}"
    shapes = [[leaf.shape for leaf in jax.tree.leaves(out)] for out in (traced.results, after)]
    return "" if shapes[0] == shapes[1] else f"the outputs change their shapes from {shapes[0]} to {shapes[1]}"


def removed_shapes(traced: Traced, members: Sequence[AxisMember]) -> dict[str, tuple[int, ...]]:
    """Tell the shape of each parameter when one unit of some members of a structure is removed."""
    shapes = {path: list(shape) for path, shape in traced.shapes.items()}
    for member in members:
        gone = {index for place in member.places for index in place.indices(0)}
        shapes[member.path][member.axis] -= len(gone)
    return {path: tuple(shape) for path, shape in shapes.items()}


def _distance(first: Any, second: Any) -> float:
    """Measure the largest difference relative to the largest value; values that are not finite have to agree."""
    one, other = (np.asarray(each, np.float64 if each.dtype != jnp.complex64 else complex) for each in (first, second))
    wild = ~(np.isfinite(one) & np.isfinite(other))
    if not np.array_equal(one[wild], other[wild], equal_nan=True):
        return math.inf
    largest = np.abs(other[~wild]).max(initial=0)
    apart = np.abs(one[~wild] - other[~wild]).max(initial=0)
    return float(apart / largest) if largest else float(apart)


def nearby(params: Any) -> Any:
    """Draw parameters with values near the given ones: none is zero, and what was positive stays so."""
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        factor, more = random.uniform(0.7, 1.3, leaf.shape), random.uniform(0.01, 0.1, leaf.shape)
        return jnp.asarray(np.asarray(leaf, np.float64) * factor + more, leaf.dtype)

    return jax.tree.map(draw, params)
