"""Statistics of activations of a traced model: of what stands where a structure's units act.

That is in front of the matrices that carry units onward (`trace.writers`), as in our LLaMA; a structure
that several of them read has the coordinates of all. Where units meet no parameter as it is, there is no matrix, and a
unit counts by what it meets instead: coordinates c of queries meet those of keys, whose root mean square r_c their
moments are multiplied with, r_c E[a_c] and r_c² E[a_c²], so that `wanda` is Σ_c √E[q_c²] √E[k_c²]: the norms of queries
and of keys whose product ThinK (arXiv:2407.21018) ranks the channels of keys by. Where they are only summed, r_c is 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.estimation import ACTIVATION_MOMENTS, ACTIVATION_USAGE, Statistic
from saap_jax.estimation.activations import MULTIPLES, Moments, used
from saap_jax.estimation.base import wide
from saap_jax.trace.interpret import Tap, tapped
from saap_jax.trace.subject.problem import TracedProblem
from saap_jax.trace.trace import TracedStructure
from saap_jax.trace.writers import Contraction, Writer
from saap_jax.types import Gates

ACTIVATIONS = frozenset({ACTIVATION_MOMENTS, ACTIVATION_USAGE})
"""What is observed of activations."""


def check_acting(subject: TracedProblem, needs: frozenset[Statistic]) -> None:
    """Raise ValueError where activations are needed and some structure's cannot be told."""
    for structure in subject.structures if needs & ACTIVATIONS else ():
        if not subject.writers.acting(structure.name):
            names = ", ".join(sorted(need.name for need in needs & ACTIVATIONS))
            raise ValueError(
                f"{names} of {structure.name}: cannot be observed, {subject.writers.without[structure.name]}; expected "
                "estimators of weights, their gradients or those of gates: random, magnitude, taylor_*, fisher, gate_*"
            )


def activation_sums(subject: TracedProblem, needs: frozenset[Statistic]) -> Callable[..., dict[Statistic, Any]]:
    """Make `sums(gates, params, inputs, weights)`: of a batch, the weighted sum of each example's means over rows."""
    acting = {each: subject.writers.acting(each.name) for each in subject.structures}
    places = list(dict.fromkeys(place for own in acting.values() for place in own))
    taps = [place.tap for place in places]
    taps += [place.partner for place in places if place.partner and not isinstance(place, Writer)]
    run = tapped(subject.traced, taps)

    def sums(gates: Gates, params: Any, inputs: Any, weights: Array) -> dict[Statistic, Any]:
        def found_of(row: Any) -> dict[Tap, Array]:
            row = jax.tree.map(lambda leaf: leaf[None], row)
            return run(subject.by_copies(gates), params, *subject.problem.inputs(row))[1]

        found = jax.vmap(found_of)(inputs)
        rows = {place.tap: jax.vmap(place.rows)(wide(found[place.tap])) for place in places}
        new: dict[Statistic, Any] = {}
        if ACTIVATION_MOMENTS in needs:
            new[ACTIVATION_MOMENTS] = {
                structure.name: [_powers(structure, place, rows, found, weights) for place in own]
                for structure, own in acting.items()
            }
        if ACTIVATION_USAGE in needs:
            new[ACTIVATION_USAGE] = {
                structure.name: sum(_usage(structure, place, rows[place.tap], weights) for place in own) / len(own)
                for structure, own in acting.items()
            }
        return new

    return sums


def _powers(
    structure: TracedStructure,
    place: Contraction,
    rows: Mapping[Tap, Float[Array, "batch systems rows coordinates"]],
    found: Mapping[Tap, Array],
    weights: Array,
) -> list[Float[Array, "copies units own"]]:
    """Sum up the means of a and a², and where units meet no parameter that of the square of what they meet."""
    active = rows[place.tap]
    parts = [active, jnp.square(active)]
    if place.partner and not isinstance(place, Writer):
        parts.append(jnp.square(jax.vmap(place.partner_rows)(wide(found[place.partner]))))
    at = place.places(structure)
    means = [jnp.einsum("b,bsc->sc", weights.astype(part.dtype), part.mean(2)) for part in parts]
    return [mean.reshape(-1)[at] for mean in means]


def _usage(
    structure: TracedStructure,
    place: Contraction,
    active: Float[Array, "batch systems rows coordinates"],
    weights: Array,
) -> Float[Array, "copies units multiples"]:
    """Sum up the share of rows on which each unit of a copy is `used` among the units of that copy."""
    flat = jnp.swapaxes(active, 1, 2).reshape(active.shape[0], active.shape[2], -1)
    own = jnp.swapaxes(flat[:, :, place.places(structure)], 1, 2)  # [batch, copies, rows, units, coordinates]
    shares = [jax.vmap(lambda each, m=m: used(each, m))(own).astype(active.dtype).mean(2) for m in MULTIPLES]
    return jnp.einsum("b,bcum->cum", weights.astype(active.dtype), jnp.stack(shares, axis=-1))


def finished(means: Mapping[str, Sequence[Sequence[Array]]]) -> Moments:
    """Make the moments of means over all examples, the coordinates of a structure's places side by side."""
    mean, square = {}, {}
    for name, places in means.items():
        pairs = [(a * jnp.sqrt(met[0]), b * met[0]) if met else (a, b) for a, b, *met in places]
        mean[name], square[name] = (jnp.concatenate(parts, axis=-1) for parts in zip(*pairs, strict=True))
    return Moments(mean, square)
