"""What the user's own code makes of smaller parameters, structure by structure.

Code may hold a size as a number: it then refuses smaller arrays, or takes them and computes something else (a flat
projection that is reshaped by a number of heads mixes the heads). The cut program does neither, but who wants to go on
with the own code needs to know.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.subjects.base import TOLERANCE, tolerance_of
from saap_jax.trace.cut import keep_units, kept_shapes, smaller
from saap_jax.trace.trace import Traced, TracedStructure, groups_of

SAID = {"takes": "takes it", "shapes": "takes the shapes", "differs": "gives other outputs", "refuses": "refuses it"}
"""Verdicts in words, the worst last."""


class Verdict(NamedTuple):
    """What the own code does when a unit goes."""

    verdict: Literal["takes", "shapes", "differs", "refuses"]
    """`shapes`: it takes the shapes; what it computes was not seen, for the parameters have no values."""
    detail: str = ""

    def __str__(self) -> str:
        """Put the verdict into words."""
        return SAID[self.verdict] + (f" ({self.detail})" if self.detail else "")


def verdicts(
    function: Callable[..., Any], traced: Traced, structures: Sequence[TracedStructure], params: Any, *inputs: Any
) -> dict[str, Verdict]:
    """Try what a function makes of parameters without a unit, for each structure.

    Of structures that are alike but for numbers in their paths (equal layers) the first and the last are tried, and the
    worse of both holds for all. Values are drawn near those of parameters and inputs, positive ones staying so, lest
    zeros hide a difference; abstract parameters are tried by shapes only.
    """
    concrete = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves((params, inputs)))
    drawn, given = (nearby(params), nearby(inputs)) if concrete else (params, inputs)

    def tried(structure: TracedStructure) -> Verdict:
        if error := retrace(function, traced, structure, params, *inputs):
            return Verdict("refuses", " ".join(error.split())[:160])
        if not concrete:
            return Verdict("shapes")
        order = np.broadcast_to(np.arange(structure.units), (*structure.copied, structure.units))
        keep = {structure.name: np.random.default_rng(0).permuted(order, axis=-1) > 0}
        runs = function, smaller(traced, keep)
        with jax.numpy_rank_promotion("allow"):  # to compile one takes as long as both
            both = jax.jit(lambda *given: [run(*given) for run in runs])
            return compared(*both(keep_units(traced, keep, drawn), *given))

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
    keep = np.broadcast_to(np.arange(structure.units) > 0, (*structure.copied, structure.units))
    sizes = iter(kept_shapes(traced, {structure.name: keep}).values())
    less = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(next(sizes), jnp.result_type(leaf)), params)
    try:
        after = jax.eval_shape(function, less, *inputs)
    except Exception as error:  # whatever the user's code says about sizes
        return f"{type(error).__name__}: {error}"
    shapes = [[leaf.shape for leaf in jax.tree.leaves(out)] for out in (traced.results, after)]
    if shapes[0] == shapes[1]:
        return ""
    return f"the outputs change their shapes from {shapes[0]} to {shapes[1]}"


def compared(own: Any, cut: Any) -> Verdict:
    """Compare outputs of the own code with those of the cut program, relative to the largest of an array, and to how
    far it is from its mean: what all outputs have in common, such as a large bias, may hide no difference but eight of
    its roundings.
    """
    apart = 0.0
    near = TOLERANCE
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(cut), strict=True):
        near = max(near, tolerance_of(other.dtype))
        dtype = other.dtype
        if jnp.issubdtype(other.dtype, jnp.complexfloating):
            wide = complex
        else:
            wide = float
        one = np.asarray(one, wide)
        other = np.asarray(other, wide)
        wild = ~(np.isfinite(one) & np.isfinite(other))
        if not np.array_equal(one[wild], other[wild], equal_nan=True):
            return Verdict("differs", "in what is not finite")
        one = one[~wild]
        other = other[~wild]
        largest = np.abs(other).max(initial=0)
        spread = 0.0
        if other.size:
            spread = np.abs(other - other.mean()).max()
        rounding = 0.0
        if jnp.issubdtype(dtype, jnp.inexact):
            rounding = 8 * float(jnp.finfo(dtype).eps) * largest
        differing = float(np.abs(one - other).max(initial=0))
        apart = max(apart, differing / (largest or 1), (differing - rounding) / (spread or largest or 1))
    if apart <= near:
        return Verdict("takes")
    return Verdict("differs", f"by up to {apart:.1%} of the outputs")


def nearby(params: Any) -> Any:
    """Draw parameters with values near the given ones: none is zero, and what was positive stays so."""
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        factor = random.uniform(0.7, 1.3, leaf.shape)
        more = random.uniform(0.01, 0.1, leaf.shape)
        return jnp.asarray(np.asarray(leaf, np.float64) * factor + more, leaf.dtype)

    return jax.tree.map(draw, params)
