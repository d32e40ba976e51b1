"""Squares of each example's weight gradient, summed over a batch, from one backward pass over the whole batch.

For y_b = x_b W the gradient of example b is G_b = Σ_t x_btᵀ dy_bt, and what is wanted is Σ_b (s_b G_b)², s_b the weight
of the example. The backward pass of a product of activations with a matrix that is watched makes dW = Σ_b G_b and adds
this sum to a total, in place. A bias is a matrix with one input, which is 1. So squares need no pass an example, no
gradient of the whole model an example, and are spread over devices like any other gradient: each makes those of its own
examples, layer by layer, and they are summed.

An example's gradient is as large as the matrix, and a batch of them may be larger than the model, so no more than one
is ever held: one example follows the other.

Sources: gradients of examples from activations and output gradients as in Goodfellow (arXiv:1510.01799), here squared
and summed entry by entry instead of as norms.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saap_jax.estimation.base import Statistic, like_matrices, mean_over
from saap_jax.llama.model import Llama, at_least_float32, param
from saap_jax.llama.product import Flat, flat_product, is_matrix
from saap_jax.runtime.constraints import batch_shards, sum_of_shards

GradientSums = tuple[Float[Array, "inputs outputs"], Float[Array, "inputs outputs"]]


def gradient_sums(
    x: Float[Array, "batch seq inputs"],
    cotangent: Float[Array, "batch seq outputs"],
    scale: Float[Array, "batch"],
    embed: int,
) -> GradientSums:
    """Sum G_b, in the type of `x`, and (s_b G_b)², float32 at least, over b, one example after the other.

    On a CPU G_b stays in the cache, and the sum of all is the gradient, which needs no product of its own. On a mesh
    each device takes its own examples; sums are exchanged once.

    Args:
        embed: which axis of the result is the residual width, along which weights are spread over devices.
    """
    wide = at_least_float32(x.dtype)
    shards = batch_shards(len(x))

    def split(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(shards, len(array) // shards, *array.shape[1:]), 0, 1)

    def add(sums: tuple[Array, Array], example: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        inputs, outputs, weight = example
        each = jnp.einsum("sti,sto->sio", inputs, outputs, preferred_element_type=wide)
        return (sums[0] + each, sums[1] + jnp.square(each * weight[:, None, None])), None

    zeros = jnp.zeros((shards, x.shape[-1], cotangent.shape[-1]), wide)
    examples = split(x), split(cotangent), split(scale.astype(wide))
    (total, square), _ = jax.lax.scan(add, (zeros, zeros), examples)
    return sum_of_shards(total.astype(x.dtype), embed), sum_of_shards(square, embed)


# --- a model that is watched -----------------------------------------------------------------------


class Sums:
    """References to sums `[layers, ...]`, to which a backward pass adds; a leaf of no tree, so no scan slices it."""

    def __init__(self, totals: Sequence[Any]) -> None:
        self.totals = totals


class Watched(Flat):
    """A matrix, or a bias, whose backward pass adds the sum over examples of their squared gradients to totals.

    They are added to in place, layer by layer: a second tree as large as the matrices is never in memory.
    """

    def __init__(self, weight: nnx.Param, scale: Float[Array, "batch"], totals: Sequence[Any]) -> None:
        super().__init__(weight)
        self.sums = Sums(totals)
        self.layer = param(("layers",), jnp.arange(weight.shape[0]))
        self.scale = param(("layers", "batch"), jnp.broadcast_to(scale[None], (weight.shape[0], *scale.shape)))

    def product(self, equation: str, x: Array) -> Array:
        """Compute `einsum(equation, x, matrix)`."""
        return self._product(equation, self.axes[1:], x, self.weight[...])

    def add(self, y: Array) -> Array:
        """Add the bias to y."""
        ones = jnp.ones((*y.shape[:2], 1), y.dtype)
        sizes = "kgh"[: y.ndim - 2]
        return y + self._product(f"bti,i{sizes}->bt{sizes}", ("embed", *self.axes[1:]), ones, self.weight[...][None])

    def _product(self, equation: str, axes: tuple[str, ...], x: Array, weight: Array) -> Array:
        found: Array = _product(equation, axes, x, weight, self.scale[...], self.layer[...], self.sums.totals)
        return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, axes: tuple[str, ...], x: Array, weight: Array, *rest: Any) -> Array:
    return flat_product(equation, x, weight)


def _forward(equation: str, axes: tuple[str, ...], x: Array, weight: Array, *rest: Any) -> tuple[Array, Any]:
    return flat_product(equation, x, weight), (x, weight, *rest)  # not `_product`: `remat` sees its dots


def _backward(equation: str, axes: tuple[str, ...], kept: Any, cotangent: Array) -> tuple[Array | None, ...]:
    (x, weight, scale, layer, totals) = kept
    embed_first = axes[0] == "embed"
    split = 1 if embed_first else len(weight.shape) - 1
    batch = x.shape[:2]
    inputs = math.prod(weight.shape[:split])
    outputs = math.prod(weight.shape[split:])
    of_x = cotangent.reshape(math.prod(batch), outputs) @ weight.reshape(inputs, outputs).T
    total, square = gradient_sums(
        x.reshape(*batch, inputs), cotangent.reshape(*batch, outputs), scale, 0 if embed_first else 1
    )
    for each in totals if square.size else ():  # a layer may be without units
        each[layer] += square.reshape(each.shape[1:])
    return of_x.reshape(x.shape), total.reshape(weight.shape).astype(weight.dtype), None, None, None


_product.defvjp(_forward, _backward)


def flattened(model: Llama, make: Callable[..., Flat] = Flat, *trees: Llama) -> Llama:
    """Make the matrices of the layers `Flat`, or whatever `make` makes of each and its parts of further trees: the same
    function, its gradient made faster."""
    each = lambda value, *more: make(value, *more) if is_matrix(value) else value  # noqa: E731
    return jax.tree.map(each, model, *trees, is_leaf=lambda value: isinstance(value, nnx.Variable))


def watched(model: Llama, scale: Float[Array, "batch"], totals: Sequence[Llama]) -> Llama:
    """Watch every matrix of the layers of a model, and every bias that belongs to units.

    Args:
        scale: weight s_b of each example; 1 / tokens makes the gradient of a summed loss that of the mean one.
        totals: trees like `like_matrices` of references, which the backward pass adds the squares to.
    """
    return flattened(model, lambda matrix, *own: Watched(matrix, scale, jax.tree.leaves(own)), *totals)


SQUARED_WEIGHT_GRADIENT = Statistic(
    name="squared_weight_gradient",
    init=like_matrices,
    source="squares",
    accumulation=mean_over("examples"),
    axes=lambda path: (),
)
"""Mean over examples of the squared gradient of its mean loss: a tree like the model's, of the matrices of its layers;
each other parameter has a single 0."""
