"""The formulas of compensation: from sums over the tokens of a text to the output matrix of a sub-block.

What they mean, and where they are from, is said in `compensation`, which gathers the sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float

from saap_jax.config.method import CompensationConfig
from saap_jax.config.registries import CORRECTIONS

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Candidates for δ."""


class Normal(NamedTuple):
    """What a least-squares problem needs to know of the text: weighted sums over its tokens."""

    gram: Float[Array, "coordinates coordinates"]
    """Σ w â âᵀ."""
    cross: Float[Array, "coordinates embed"]
    """Σ w â Tᵀ."""
    mean: Float[Array, "coordinates"]
    """Σ w â."""
    target: Float[Array, "embed"]
    """Σ w T."""
    square: Float[Array, ""]
    """Σ w |T|²."""
    weight: Float[Array, ""]
    """Σ w."""


class Correction(NamedTuple):
    """What was done to the output matrix of one sub-block, and what it helped, on the windows that were held out."""

    structure: str
    layer: int
    damping: float | None
    """δ; None of a bias."""
    error: float
    """|T - â W|² / |T|² with the removed rows gone and nothing corrected."""
    corrected: float
    """The same with the correction made from the other windows; of all windows where none were held out."""


@jax.jit
def least_squares(
    normal: Normal,
    weight: Float[Array, "coordinates embed"],
    kept: Bool[Array, "coordinates"],
    damping: Float[Array, ""],
) -> Float[Array, "coordinates embed"]:
    """Return W' = W[K] + (G_KK + δ D)⁻¹ (C_K - G_KK W[K]) in the rows that are kept, and 0 in the others.

    `damping` is δ: 0 is plain least squares, and with a growing one W' becomes W[K].
    """
    both = kept[:, None] & kept[None, :]
    gram = jnp.where(both, normal.gram, 0)
    energy = jnp.diag(gram)
    system = gram + jnp.diag(jnp.where(energy > 0, damping.astype(gram.dtype) * energy, 1))
    start = jnp.where(kept[:, None], weight, 0)
    rest = jnp.where(kept[:, None], normal.cross - gram @ start, 0)
    return start + jnp.where(kept[:, None], cho_solve(cho_factor(system), rest), 0)


@jax.jit
def output_bias(
    normal: Normal, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]
) -> Float[Array, "embed"]:
    """Return b = mean(T - â W[K]): what the sub-block lacks on average. Source: FLAP section 3.3."""
    left = jnp.where(kept[:, None], weight, 0)
    return (normal.target - normal.mean @ left) / jnp.maximum(normal.weight, jnp.finfo(normal.weight.dtype).tiny)


@jax.jit
def output_error(
    normal: Normal, weight: Float[Array, "coordinates embed"], bias: Float[Array, "embed"]
) -> Float[Array, ""]:
    """Return Σ w |T - â W - b|² / Σ w |T|², from the sums alone."""
    written = jnp.sum(weight * (normal.gram @ weight)) + 2 * jnp.dot(bias, normal.mean @ weight)
    missed = jnp.sum(weight * normal.cross) + jnp.dot(bias, normal.target)
    total = normal.square - 2 * missed + written + normal.weight * jnp.dot(bias, bias)
    return total / jnp.maximum(normal.square, jnp.finfo(normal.square.dtype).tiny)


class Sums(NamedTuple):
    """Over the tokens of the calibration text."""

    fit: Normal
    """What a correction is made from."""
    judge: Normal
    """What it is judged on: text that was held out, or where there is none the same."""
    everything: Normal
    """Both: what the final correction is made from."""


class Solved(NamedTuple):
    """A correction of one output matrix."""

    weight: Float[Array, "coordinates embed"]
    bias: Float[Array, "embed"] | None
    error: float
    """Of `output_error` on the text that judges, corrected from the text that fits."""
    damping: float | None = None


def solve_bias(
    sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"], config: CompensationConfig
) -> Solved:
    """Leave the kept weights as they are and add the bias that is lacking on average."""
    left = jnp.where(kept[:, None], weight, 0)
    error = float(output_error(sums.judge, left, output_bias(sums.fit, weight, kept)))
    return Solved(left, output_bias(sums.everything, weight, kept), error)


def solve_least_squares(
    sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"], config: CompensationConfig
) -> Solved:
    """Change the kept weights by least squares, with the damping that is given or that the held-out text prefers."""
    choices = DAMPINGS if config.damping is None else (config.damping,)
    nothing = jnp.zeros(weight.shape[1], weight.dtype)
    errors = [
        float(output_error(sums.judge, least_squares(sums.fit, weight, kept, jnp.asarray(d)), nothing)) for d in choices
    ]
    best = int(np.argmin(errors))
    solved = least_squares(sums.everything, weight, kept, jnp.asarray(choices[best]))
    return Solved(solved, None, errors[best], choices[best])


SOLVERS = {"bias": solve_bias, "least_squares": solve_least_squares}
"""How the methods of this package, which `config.registries.CORRECTIONS` describes, correct a matrix."""


def corrected(
    sums: tuple[Normal, Normal | None], weight: Array, kept: Bool[np.ndarray, "coordinates"], config: CompensationConfig
) -> tuple[Array, Array, float | None, tuple[float, float]]:
    """Return the new output matrix, the new bias, the damping, and the errors before and after on held-out text.

    Args:
        sums: over the text that the correction is made from; and over other text, that chooses the damping, or None.
    """
    fit, held = sums
    rows, nothing = jnp.asarray(kept), jnp.zeros(weight.shape[1], fit.gram.dtype)
    weight = weight.astype(fit.gram.dtype)
    everything = fit if held is None else jax.tree.map(jnp.add, fit, held)
    judge = fit if held is None else held
    before = float(output_error(judge, jnp.where(rows[:, None], weight, 0), nothing))
    solve = CORRECTIONS[config.method].solve or SOLVERS[config.method]
    solved: Solved = solve(Sums(fit, judge, everything), weight, rows, config)
    bias = nothing if solved.bias is None else solved.bias
    return solved.weight, bias, solved.damping, (before, solved.error)
