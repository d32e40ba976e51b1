"""The calibration pass over a problem's examples: what `estimation.observe` is to our models.

Gates get the axis of the batch, so that one backward pass yields each example's gate gradients beside the summed weight
gradients; squared weight gradients take an example at a time.

Activations are what stands where a structure's units act, in front of the matrices that carry them onward
(`trace.writers`), as in our LLaMA; a structure that several of them read has the coordinates of all. Where units meet
no parameter as it is, there is no matrix, and a unit counts by what it meets instead: coordinates c of queries meet
those of keys, whose root mean square r_c their moments are multiplied with, r_c E[a_c] and r_c² E[a_c²], so that
`wanda` is Σ_c √E[q_c²] √E[k_c²]: the norms of queries and of keys whose product ThinK (arXiv:2407.21018) ranks the
channels of keys by. Where they are only summed, r_c is 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from saap_jax.estimation.activations import ACTIVATION_MOMENTS, ACTIVATION_USAGE, MULTIPLES, Moments, used
from saap_jax.estimation.base import Curvature, Statistic, Statistics, wide
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN, GateHessian, in_chunks, random_signs
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.llama.segments import masks
from saap_jax.runtime.gather import first_not_finite
from saap_jax.runtime.progress import OBSERVING, Passes
from saap_jax.trace.problem import Examples, count_examples
from saap_jax.trace.program import Tap
from saap_jax.trace.subject.problem import TracedProblem, batches, loss_of_one, rows_of
from saap_jax.trace.subject.weights import TracedWeights
from saap_jax.trace.trace import TracedStructure, by_path
from saap_jax.trace.writers import Contraction
from saap_jax.types import Gates, Keep

ACTIVATIONS = frozenset({ACTIVATION_MOMENTS, ACTIVATION_USAGE})
OBSERVED = frozenset({WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT, GATE_GRADIENT, GATE_HESSIAN, *ACTIVATIONS})
"""What can be observed of a traced model. Of the gate Hessian, every structure is probed."""


def observe(
    subject: TracedProblem,
    /,
    examples: Examples,
    needs: frozenset[Statistic],
    passes: Passes = Passes(),
    *,
    curvature: Curvature | None = None,
    keep: Keep | None = None,
) -> Statistics:
    """Gather the statistics that `needs` names in one pass over examples; with `keep`, all other units masked.

    An example counts as a token of the statistics: means are over examples. `passes.remat` is the model's own affair.

    Raises:
        ValueError: activations of a structure of which they cannot be told, or a loss or statistic that is not finite.
    """
    for structure in subject.structures if needs & ACTIVATIONS else ():
        if not subject.writers.acting(structure.name):
            names = ", ".join(sorted(need.name for need in needs & ACTIVATIONS))
            raise ValueError(
                f"{names} of {structure.name}: cannot be observed, {subject.writers.without[structure.name]}; expected "
                "estimators of weights, their gradients or those of gates: random, magnitude, taylor_*, fisher, gate_*"
            )
    problem = subject.problem
    curvature = curvature or Curvature()
    count = count_examples(examples)
    parts = list(batches(examples, passes.batch_size, subject.layout))
    masked = keep is not None and bool(needs & ACTIVATIONS)
    step = subject.program(("observe", needs, curvature, masked), lambda: _step(subject, needs, curvature, masked))
    values = members(subject)
    gates = subject.ones if keep is None else masks(keep)
    sums: dict[Statistic, Any] = {}
    rows: list[tuple[Any, Any]] = []
    for (inputs, targets), weights in passes.progress(OBSERVING)(parts) if needs else ():
        new, losses, gradients = step(values, problem.params, gates, inputs, targets, jnp.asarray(weights))
        sums = jax.tree.map(jnp.add, sums, new) if sums else new
        real = int(weights.sum())
        rows.append(jax.tree.map(lambda leaf, real=real: np.asarray(leaf[:real]), (losses, gradients)))
    observed: dict[Statistic, Any] = jax.tree.map(lambda leaf: leaf / count, sums)
    for need in (WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT):
        if need in observed:
            observed[need] = TracedWeights(subject.structures, observed[need], subject.acting)
    if ACTIVATION_MOMENTS in observed:
        mean = {}
        square = {}
        for name, places in observed[ACTIVATION_MOMENTS].items():  # the coordinates of all places side by side
            pairs = [(a * jnp.sqrt(met[0]), b * met[0]) if met else (a, b) for a, b, *met in places]
            mean[name], square[name] = (jnp.concatenate(parts, axis=-1) for parts in zip(*pairs, strict=True))
        there = None
        if keep is not None:
            there = {each.name: _there(subject, each, gates) for each in subject.structures}
        observed[ACTIVATION_MOMENTS] = Moments(mean, square, there)
    losses, gradients = jax.tree.map(lambda *parts: np.concatenate(parts), *rows) if rows else (np.zeros(count), {})
    if GATE_GRADIENT in needs:
        observed[GATE_GRADIENT] = gradients
    advice = "check the parameters, the examples and the loss"
    if len(wrong := np.flatnonzero(~np.isfinite(losses))):
        said = f"the loss of {len(wrong)} examples is not finite, the first is example {wrong[0]}"
        raise ValueError(f"calibration: {said}; {advice}")
    for statistic, value in observed.items():
        if place := first_not_finite(value):
            raise ValueError(f"calibration: the {statistic.name.replace('_', ' ')} of {place} is not finite; {advice}")
    values = jax.tree.map(jnp.asarray, observed)
    at = None if keep is None else gates
    return Statistics(jnp.asarray(count), jnp.asarray(count), jnp.asarray(losses), values, at)


def members(subject: TracedProblem) -> dict[str, Any]:
    """Choose the parameters of floating point that hold units, by path."""
    paths = {member.path for structure in subject.structures for member in structure.members}
    held = {path: jnp.asarray(value) for path, value in by_path(subject.problem.params).items() if path in paths}
    return {path: value for path, value in held.items() if jnp.issubdtype(value.dtype, jnp.floating)}


def with_values(params: Any, values: Mapping[str, Any]) -> Any:
    """Replace some parameters, by path."""
    return jax.tree.structure(params).unflatten((by_path(params) | dict(values)).values())


def _step(
    subject: TracedProblem, needs: frozenset[Statistic], curvature: Curvature, masked: bool
) -> Callable[..., Any]:
    """Compile the step: sums over a batch, the loss of each example, and its gate gradients."""
    one = loss_of_one(subject)
    argnums = (0,) * (WEIGHT_GRADIENT in needs) + (1,) * (GATE_GRADIENT in needs)
    activations = _activation_sums(subject, needs, masked) if needs & ACTIVATIONS else lambda *_: {}

    def step(
        values: dict[str, Any], params: Any, ones: Gates, inputs: Any, targets: Any, weights: Array
    ) -> tuple[Any, Any, Any]:
        def summed(values: dict[str, Any], gates: Gates, axis: int | None = 0) -> tuple[Array, Array]:
            """Sum the losses, of gates of each example or (None) of all."""
            each = wide(jax.vmap(one, (axis, None, 0, 0))(gates, with_values(params, values), inputs, targets))
            return jnp.sum(each * weights), each

        def add(total: dict[str, Any], row: Any) -> tuple[dict[str, Any], None]:
            weight, *example = row
            gradient = jax.grad(lambda values: one(ones, with_values(params, values), *example))(values)
            return jax.tree.map(lambda x, g: x + weight * jnp.square(wide(g)), total, gradient), None

        def of_gates(gates: Gates) -> Array:
            return summed(values, gates, None)[0]

        def probe(number: Array) -> Gates:
            signs = random_signs(curvature.seed, number, ones, tuple(ones))
            signs = {name: jnp.where(ones[name] != 0, sign, 0) for name, sign in signs.items()}
            products = jax.jvp(jax.grad(of_gates), (ones,), (signs,))[1]
            return {name: sign * products[name] for name, sign in signs.items()}

        batched = {name: jnp.broadcast_to(gate[None], (len(weights), *gate.shape)) for name, gate in ones.items()}
        sums = activations(ones, params, inputs, weights)
        found: tuple[Any, ...] = ()
        if argnums:
            found, each = jax.grad(summed, argnums, has_aux=True)(values, batched)
        else:
            each = summed(values, batched)[1]
        if WEIGHT_GRADIENT in needs:
            sums[WEIGHT_GRADIENT] = jax.tree.map(wide, found[0])
        if SQUARED_WEIGHT_GRADIENT in needs:
            zeros = jax.tree.map(lambda value: jnp.zeros(value.shape, wide(value).dtype), values)
            sums[SQUARED_WEIGHT_GRADIENT] = jax.lax.scan(add, zeros, (weights, inputs, targets))[0]
        if GATE_HESSIAN in needs:
            probed = in_chunks(probe, jnp.arange(curvature.probes))
            sums[GATE_HESSIAN] = GateHessian(jax.grad(of_gates)(ones), {}, probed)
        return sums, each, found[-1] if GATE_GRADIENT in needs else {}

    return jax.jit(step)


def _activation_sums(
    subject: TracedProblem, needs: frozenset[Statistic], masked: bool
) -> Callable[..., dict[Statistic, Any]]:
    """Make `sums(gates, params, inputs, weights)`: of a batch, the weighted sum of each example's means over rows.

    Where some are masked, units of whatever structure that have gone are in none of the means.
    """
    acting = {each: subject.writers.acting(each.name) for each in subject.structures}
    run = rows_of(subject, list(dict.fromkeys(place for own in acting.values() for place in own)))

    def left(place: Contraction, gates: Gates, tap: Tap, active: Array) -> tuple[Array, Array]:
        """Take out what belongs to units that have gone, and say by what a mean over all rows falls short of one over
        those that are left, `[systems, coordinates]`: 1 where nothing has gone."""
        if not masked:
            return active, jnp.ones(active.shape[1::2], active.dtype)
        there = place.there(gates, tap[1])
        count = jnp.maximum(jnp.sum(there, axis=1), 1).astype(active.dtype)
        return jnp.where(there[None], active, 0), there.shape[1] / count

    def sums(gates: Gates, params: Any, inputs: Any, weights: Array) -> dict[Statistic, Any]:
        rows = run(gates, params, inputs)
        moments: dict[str, list[list[Array]]] = {}
        usage: dict[str, Any] = {}
        for structure, own in acting.items():
            moments[structure.name] = []
            shares = []
            there = gates[structure.name]
            for place in own:
                at = place.places(structure)
                active, more = left(place, gates, place.tap, rows[place.tap])
                parts = [(active, more), (jnp.square(active), more)]
                if place.partner in rows:
                    met, more_met = left(place, gates, place.partner, rows[place.partner])
                    parts.append((jnp.square(met), more_met))
                means = [jnp.einsum("b,bsc->sc", weights.astype(part.dtype), part.mean(2)) * by for part, by in parts]
                moments[structure.name].append([mean.reshape(-1)[at] for mean in means])
                flat = jnp.swapaxes(active, 1, 2).reshape(active.shape[0], active.shape[2], -1)
                units = jnp.swapaxes(flat[:, :, at], 1, 2)  # [batch, copies, rows, units, coordinates]
                each = [
                    jax.vmap(used, (0, None, None))(units, m, there).astype(active.dtype).mean(2) for m in MULTIPLES
                ]
                share = jnp.einsum("b,bcum->cum", weights.astype(active.dtype), jnp.stack(each, axis=-1))
                shares.append(share * more.reshape(-1)[at].min(-1)[..., None])
            usage[structure.name] = sum(shares) / len(own)
        return {need: {ACTIVATION_MOMENTS: moments, ACTIVATION_USAGE: usage}[need] for need in needs & ACTIVATIONS}

    return sums


def _there(subject: TracedProblem, structure: TracedStructure, gates: Gates) -> Array:
    """Say which coordinates of the units of a structure were there, `[copies, units, coordinates]`."""
    parts = []
    for place in subject.writers.acting(structure.name):
        there = place.there(gates).any(axis=1)
        parts.append(there.reshape(-1)[place.places(structure)])
    return jnp.concatenate(parts, axis=-1)
