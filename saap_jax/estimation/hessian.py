"""The gate Hessian: what the loss does, to second order, when a unit's activation is scaled.

Entries come from Hessian-vector products, forward over reverse, with respect to one set of gates for all examples: no
second derivative of a weight is formed. A product costs 1.4 gate gradients in chunks of four, which share the first
derivative, and 1.9 by itself (135 M model, CPU). The exact diagonal of attention takes layers x kv_heads products (90
for that model, 1024 for a 7 B model without grouped queries); `attention="probes"` takes none beside those that the
channels need anyway.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import (
    Curvature,
    Estimator,
    Plan,
    Statistic,
    estimator_of,
    like_units,
    mean_over,
    only_units,
)
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.model import Llama, at_least_float32
from saap_jax.llama.segments import existing_units
from saap_jax.runtime.mesh import Places, held
from saap_jax.structures.weights import Weights
from saap_jax.types import STRUCTURES, Gates, Remat, Scores

CHUNK = 4
"""Products at once, at most: each more takes as much memory again as the backward pass of a microbatch."""


class GateHessian(NamedTuple):
    """First derivatives of the mean loss with respect to the gates, and what is known of the second ones."""

    gradient: Gates
    exact: Gates
    """Diagonal entries; only the structures that were observed exactly."""
    probed: Gates
    """z ⊙ Hz of each probe z, [probes, layers, units], whose mean estimates the diagonal; the other structures."""


def gate_hessian(*, probes: int = 16, seed: int = 0, attention: Literal["exact", "probes"] = "exact") -> Estimator:
    """Score a unit by |∂ℒ/∂g_u - ½ (∂²ℒ/∂g²)_uu|, ℒ the mean loss over all tokens.

    The diagonal of the channels is Hutchinson's estimate, mean of z ⊙ Hz over `probes` random sign vectors z; its
    standard error is √(Σ_{v≠u} H_uv² / probes). The diagonal of attention units is exact, or with
    `attention="probes"` estimated too (see the module for the cost). With statistics that hold more probes, the first
    ones count; `seed` counts when they are observed. Source: optimal brain damage (LeCun et al., 1990) on gates;
    estimator of Bekas et al. (2007).

    Raises:
        ValueError: fewer than one probe, another `attention`, or statistics that hold too few probes.
    """
    curvature = Curvature(probes=probes, seed=seed, attention=attention)

    def score(hessian: GateHessian, params: Weights) -> Scores:
        diagonals = {name: diagonal(hessian, name, curvature) for name in hessian.gradient}
        effects = {name: jnp.abs(hessian.gradient[name] - 0.5 * each) for name, each in diagonals.items()}
        return only_units(params, effects)

    return estimator_of(GATE_HESSIAN, score, curvature)


def diagonal(hessian: GateHessian, structure: str, curvature: Curvature) -> Float[Array, "layers units"]:
    """Read the diagonal of the gate Hessian, exact or estimated as `curvature` asks."""
    if structure == "attention" and curvature.attention == "exact":
        if structure not in hessian.exact:
            raise ValueError("gate_hessian: attention was observed by probes; observe it exactly, or score by probes")
        return hessian.exact[structure]
    observed = len(hessian.probed.get(structure, ()))
    if observed < curvature.probes:
        raise ValueError(
            f"gate_hessian: expected {curvature.probes} probes of {structure}, {observed} were observed; observe more"
        )
    return jnp.mean(hessian.probed[structure][: curvature.probes], axis=0)


def curvature_of(estimators: Iterable[Estimator]) -> Curvature:
    """Join how estimators ask to observe the gate Hessian: in one pass, with the most probes.

    Raises:
        ValueError: they ask for different seeds or kinds of attention.
    """
    asked = {each.curvature for each in estimators if each.curvature is not None}
    if len({(one.seed, one.attention) for one in asked}) > 1:
        raise ValueError(
            "gate_hessian: expected one seed and one kind of attention in a pass, got "
            f"{' and '.join(sorted(map(str, asked)))}; score them in separate runs"
        )
    return max(asked, key=lambda one: one.probes, default=Curvature())


@functools.partial(jax.jit, static_argnames=("curvature", "remat", "places"), donate_argnames=("total",))
def hessian_step(
    model: Llama,
    total: GateHessian,
    batch: tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]],
    gates: Gates,
    *,
    curvature: Curvature,
    remat: Remat,
    places: Places = (),
) -> GateHessian:
    """Add the derivatives of one microbatch's summed loss, at `gates`, to `total`, which stays at `places`."""
    dtype = at_least_float32(model.embedding.dtype)
    gates = {name: gate.astype(dtype) for name, gate in gates.items()}
    zeros = jax.tree.map(jnp.zeros_like, gates)

    def loss(gates: Gates) -> Float[Array, ""]:
        return jnp.sum(next_token_losses(model, *batch, gates, remat=remat)[0])

    def product(direction: Gates) -> Gates:
        return jax.jvp(jax.grad(loss), (gates,), (direction,))[1]

    def entry(unit: Int[Array, "2"]) -> Float[Array, ""]:
        layer, index = unit
        one_hot = {**zeros, "attention": zeros["attention"].at[layer, index].set(1)}
        return product(one_hot)["attention"][layer, index]

    def probe(number: Int[Array, ""]) -> Gates:
        signs = random_signs(curvature.seed, number, gates)
        signs = {name: jnp.where(gates[name] != 0, signs[name], 0) for name in total.probed}
        products = product({**zeros, **signs})
        return {name: sign * products[name] for name, sign in signs.items()}

    exact = {name: zeros[name] for name in total.exact}
    units = np.argwhere(existing_units(model.segments)["attention"])
    if exact and len(units):
        entries = in_chunks(entry, jnp.asarray(units))
        exact["attention"] = zeros["attention"].at[units[:, 0], units[:, 1]].set(entries)
    gradient = jax.grad(loss)(gates)
    seen = GateHessian(
        {name: gradient[name] for name in STRUCTURES}, exact, in_chunks(probe, jnp.arange(curvature.probes))
    )
    return held(jax.tree.map(jnp.add, total, seen), places)


def in_chunks(function: Callable[[Array], Any], inputs: Array) -> Any:
    """Map over the leading axis, by the largest chunks of at most CHUNK that leave no remainder to compile for."""
    size = next(size for size in range(CHUNK, 0, -1) if len(inputs) % size == 0)
    return jax.lax.map(function, inputs, batch_size=size)


def random_signs(
    seed: int, number: Int[Array, ""], gates: dict[str, Any], names: Sequence[str] = STRUCTURES
) -> dict[str, Any]:
    """Draw probe `number`: -1 or 1 for every gate, the same whatever the number of probes."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return {
        name: jax.random.rademacher(jax.random.fold_in(key, index), gates[name].shape, gates[name].dtype)
        for index, name in enumerate(names)
    }


def _zeros(model: Llama, plan: Plan) -> GateHessian:
    gates = like_units(model)
    probed = like_units(model, (plan.curvature.probes,))
    if plan.curvature.attention == "exact":
        return GateHessian(gates, {"attention": jnp.zeros_like(gates["attention"])}, {"mlp": probed["mlp"]})
    return GateHessian(gates, {}, probed)


GATE_HESSIAN = Statistic(
    name="gate_hessian",
    init=_zeros,
    source="step",
    kind=GateHessian,
    step=hessian_step,
    accumulation=mean_over("tokens"),
    axes=lambda path: ("probes",) * path.startswith("probed") + ("layers", "units"),
)
"""`GateHessian` of the mean loss over all tokens, as `Curvature` says."""
