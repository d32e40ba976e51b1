"""The formulas of compensation: from sums over the tokens of a text to the output matrix of a sub-block.

What they mean, and where they are from, is said in `compensation`, which gathers the sums.
"""

import abc
import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from saap_jax.runtime.decisions import finite
from saap_jax.types import HELD_OUT

Ridge = Literal["coordinate", "mean"]


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
    tokens: Float[Array, ""]
    """How many tokens there are."""


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


class Walk(NamedTuple):
    """How sub-blocks are corrected from the first to the last, as static values."""

    repair: "Repair | None" = None
    """None: not at all."""
    through: bool = True
    """On the stream as pruned so far, toward what it lacks, as the repair says; else on the unpruned one."""
    equal: bool = False
    """Tokens count alike."""


@functools.partial(jax.jit, static_argnames=("ridge",))
def least_squares(
    normal: Normal,
    weight: Float[Array, "coordinates embed"],
    kept: Bool[Array, "coordinates"],
    damping: Float[Array, ""],
    ridge: Ridge = "coordinate",
) -> Float[Array, "coordinates embed"]:
    """Compute W' = W[K] + (G_KK + δ D)⁻¹ (C_K - G_KK W[K]) in the rows that are kept, and 0 in the others.

    `damping` is δ: 0 is plain least squares, and with a growing one W' becomes W[K]. D has the diagonal of G_KK, or its
    mean.
    """
    both = kept[:, None] & kept[None, :]
    gram = jnp.where(both, normal.gram, 0)
    # D: the diagonal of G_KK, or its mean in every place.
    energy = jnp.diag(gram)
    if ridge != "coordinate":
        energy = jnp.mean(energy, where=kept)
    energy = jnp.where(kept, energy, 0)
    # Removed rows, and kept ones that never act, get a 1 on the diagonal: the system stays positive definite.
    system = gram + jnp.diag(jnp.where(energy > 0, damping.astype(gram.dtype) * energy, 1))
    start = jnp.where(kept[:, None], weight, 0)
    rest = jnp.where(kept[:, None], normal.cross - gram @ start, 0)
    return start + jnp.where(kept[:, None], cho_solve(cho_factor(system), rest), 0)


@jax.jit
def rows_of(normal: Normal, rows: Int[Array, "some"]) -> Normal:
    """Return the problem of some coordinates alone."""
    return normal._replace(gram=normal.gram[rows][:, rows], cross=normal.cross[rows], mean=normal.mean[rows])


PARTS = 8
"""Of the coordinates of a sub-block: problems of kept rows are padded to multiples of that, for one program each."""


def kept_rows(kept: Bool[np.ndarray, "coordinates"]) -> tuple[Int[np.ndarray, "some"], Bool[np.ndarray, "some"]]:
    """Pad the kept rows with others to a size that many keep-sets share, and mark those that count.

    What a repair needs of the text are sums over these coordinates alone.
    """
    # Sizes are multiples of an eighth of all rows, so that few of them occur and few programs are compiled.
    each = max(-(-len(kept) // PARTS), 1)
    size = min(len(kept), -(-int(kept.sum()) // each) * each)
    order = np.argsort(~kept, kind="stable")[:size]
    return order, kept[order]


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
    # |T - â W - b|² = |T|² - 2 Tᵀ(â W + b) + |â W|² + 2 bᵀâ W + |b|², added up over the tokens.
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


Propagate = Literal["dense", "pruned"]
Tokens = Literal["scaled", "equal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair(abc.ABC):
    """How output matrices are corrected: what steps of that kind have in common."""

    biases: ClassVar[bool] = False
    """Whether biases are added to the output projections."""
    from_dense: ClassVar[bool] = False
    """Whether weights start as those of the unpruned model, and so take the place of what a repair before made."""

    @property
    def alone(self) -> bool:
        """Whether each sub-block makes up for its own units only, so that one which keeps all stays as it is."""
        return False

    propagate: Propagate = "pruned"
    """`dense`: each sub-block for itself, on the activations of the unpruned model; `pruned`: layer by layer, on those
    of the model as pruned so far, making up for the layers before too."""
    tokens: Tokens = "scaled"
    """How much each token counts: `scaled` by 1 / mean(x²) of the residual stream x behind the sub-block, by whose root
    whatever reads it divides it; or `equal`, as the rows of a traced model do."""

    @abc.abstractmethod
    def solve(self, sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]) -> Solved:
        """Return the output matrix (and bias) of a sub-block.

        Args:
            sums: over the tokens of the text: what fits, what judges, everything.
            weight: the rows of the matrix that are kept, perhaps with some others.
            kept: which of these are kept; the others are to be 0.
        """

    def target(
        self, own: Float[Array, "batch seq embed"], lacking: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Choose the target of a sub-block with `propagate = pruned`, where no norm stands behind it.

        Args:
            own: what the unpruned sub-block writes on the pruned stream.
            lacking: the unpruned stream behind the sub-block less the pruned one in front of it.
        """
        return lacking


def check_microbatches(what: str, count: int) -> None:
    """Raise ValueError where there are too few microbatches of calibration text to hold some out."""
    if count < HELD_OUT:
        raise ValueError(
            f"{what}: expected at least {HELD_OUT} microbatches of calibration text to hold every {HELD_OUT}th out, "
            f"got {count}; give more calibration.examples, a smaller calibration.batch_size"
        )


def together(fit: Normal, held: Normal | None) -> Normal:
    """Add the sums over the text that fits and over the held-out text, if there is any.

    Raises ValueError where a sum is not finite: nothing can be solved for, or chosen, by it.
    """
    total = fit
    if held is not None:
        total = jax.tree.map(jnp.add, fit, held)
    return finite("sums, over the text, of what enters an output matrix, to choose and repair by", total)


def corrected(
    sums: tuple[Normal, Normal | None], weight: Array, kept: Bool[np.ndarray, "coordinates"], repair: Repair
) -> tuple[Array, Array, float | None, tuple[float, float]]:
    """Return the new output matrix, the new bias, the damping, and the errors before and after on held-out text.

    Args:
        sums: of `kept_rows`, over the text that the correction is first made from; and over the held-out text that
            judges it, or None.
    """
    fit, held = sums
    # Of the rows, `real` are kept; others fill up to a size that many sub-blocks share, and get 0.
    (rows, real) = map(jnp.asarray, kept_rows(kept))
    nothing = jnp.zeros(weight.shape[1], fit.gram.dtype)
    some = weight[rows].astype(fit.gram.dtype)
    judge = fit if held is None else held
    before = float(output_error(judge, jnp.where(real[:, None], some, 0), nothing))
    solved = repair.solve(Sums(fit, judge, together(fit, held)), some, real)
    bias = solved.bias
    if bias is None:
        bias = nothing
    finite("repaired weights, of finite sums over the text (is the damping too small?)", (solved.weight, bias))
    new = jnp.zeros(weight.shape, some.dtype).at[rows].set(solved.weight)
    return new, bias, solved.damping, (before, solved.error)
