"""What the user's own code makes of smaller parameters, structure by structure.

Code may hold a size as a number: it then refuses smaller arrays, or takes them and computes something else (a flat
projection that is reshaped by a number of heads mixes the heads). The cut program does neither, but who wants to go on
with the own code needs to know.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.trace.removal import keep_units, retrace
from saap_jax.trace.smaller import smaller
from saap_jax.trace.trace import Traced, TracedStructure

RELATIVE = 1e-3
"""How far outputs may be apart that are equal but for rounding, relative to the largest."""


class Verdict(NamedTuple):
    """What the own code does when a unit goes."""

    verdict: Literal["takes", "refuses", "differs", "shapes"]
    """`shapes`: it takes the shapes; what it computes was not seen, for the parameters have no values."""
    detail: str = ""

    def __str__(self) -> str:
        """Return the verdict in words."""
        said = {
            "takes": "takes it",
            "refuses": "refuses it",
            "differs": "gives other outputs",
            "shapes": "takes the shapes",
        }
        return said[self.verdict] + (f" ({self.detail})" if self.detail else "")


def group_of(name: str) -> str:
    """Return a structure's name with `*` for each number of its path; equal layers have one.

    >>> group_of("layers/11/mlp/up[1].2")
    'layers/*/mlp/up[1].2'
    """
    path, bracket, rest = name.partition("[")
    return re.sub(r"\d+", "*", path) + bracket + rest


def groups_of(structures: Sequence[TracedStructure]) -> dict[str, list[TracedStructure]]:
    """Return structures that are alike but for numbers in the paths of their members, by their names' pattern."""
    found: dict[Any, list[TracedStructure]] = {}
    for each in structures:
        members = tuple((group_of(m.path), m.axis, m.places, m.shared) for m in each.members)
        key = (group_of(each.name), each.units, each.copied, each.prunable, each.normalised == (), len(each.gates))
        found.setdefault((key, tuple(dict.fromkeys(members))), []).append(each)
    named: dict[str, list[TracedStructure]] = {}
    for group in found.values():
        name = group_of(group[0].name) if len(group) > 1 else group[0].name
        taken = any(name == other or (name in other and len(group) > 1) for other in named)
        named[f"{name} ({group[0].name})" if taken else name] = group
    return named


def verdicts(
    function: Callable[..., Any], traced: Traced, structures: Sequence[TracedStructure], params: Any, *inputs: Any
) -> dict[str, Verdict]:
    """Return what a function makes of parameters without a unit, for each structure.

    Of structures that are alike but for numbers in their paths (equal layers) the first and the last are tried, and the
    worse of both holds for all. Values are drawn near those of the parameters, positive ones staying so, lest a matrix
    of zeros hide a difference; abstract parameters are tried by shapes only.
    """
    concrete = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves((params, inputs)))
    drawn = nearby(params) if concrete else params
    worst = ("takes", "shapes", "differs", "refuses").index
    found: dict[str, Verdict] = {}
    for group in groups_of(structures).values():
        tried = [
            _verdict(function, traced, each, params, drawn, concrete, *inputs)
            for each in (group if len(group) < 2 else (group[0], group[-1]))
        ]
        found.update(dict.fromkeys((each.name for each in group), max(tried, key=lambda each: worst(each.verdict))))
    return found


def _verdict(
    function: Callable[..., Any],
    traced: Traced,
    structure: TracedStructure,
    params: Any,
    drawn: Any,
    concrete: bool,
    *inputs: Any,
) -> Verdict:
    if error := retrace(function, traced, structure, params, *inputs):
        return Verdict("refuses", " ".join(error.split())[:160])
    if not concrete:
        return Verdict("shapes")
    random = np.random.default_rng(0)
    order = np.broadcast_to(np.arange(structure.units), (*structure.copied, structure.units))
    keep = {structure.name: random.permuted(order, axis=-1) > 0}
    less = keep_units(traced, keep, drawn)
    runs = function, smaller(traced, keep)
    with jax.numpy_rank_promotion("allow"):
        both = jax.jit(lambda *given: [jax.tree.leaves(run(*given)) for run in runs])  # to compile one takes as long
        own, cut = both(less, *inputs)
    apart = max((_distance(a, b) for a, b in zip(own, cut, strict=True)), default=0.0)
    tolerance = max(
        [RELATIVE, *(8 * float(jnp.finfo(x.dtype).eps) for x in cut if jnp.issubdtype(x.dtype, jnp.floating))]
    )
    return Verdict("takes") if apart <= tolerance else Verdict("differs", f"by up to {apart:.1%} of the largest")


def _distance(first: Any, second: Any) -> float:
    """Return the largest difference relative to the largest value; values that are not finite have to agree."""
    one, other = (np.asarray(each, np.float64 if each.dtype != jnp.complex64 else complex) for each in (first, second))
    wild = ~(np.isfinite(one) & np.isfinite(other))
    if not np.array_equal(one[wild], other[wild], equal_nan=True):
        return math.inf
    largest = np.abs(other[~wild]).max(initial=0)
    apart = np.abs(one[~wild] - other[~wild]).max(initial=0)
    return float(apart / largest) if largest else float(apart)


def nearby(params: Any) -> Any:
    """Return parameters with values near the given ones: none is zero, and what was positive stays so."""
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        factor, more = random.uniform(0.7, 1.3, leaf.shape), random.uniform(0.01, 0.1, leaf.shape)
        return jnp.asarray(np.asarray(leaf, np.float64) * factor + more, leaf.dtype)

    return jax.tree.map(draw, params)


def refused(found: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Return the verdicts of structures that the own code does not take, or computes otherwise."""
    return {name: verdict for name, verdict in found.items() if verdict.verdict in ("refuses", "differs")}
