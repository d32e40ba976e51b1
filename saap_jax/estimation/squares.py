"""Squares of each example's weight gradient, summed over a batch, from one backward pass over the whole batch.

For y_b = x_b W the gradient of example b is G_b = Σ_t x_btᵀ dy_bt, and what is wanted is Σ_b (s_b G_b)², s_b the weight
of the example. A product of activations with a matrix that is watched gives, beside dW = Σ_b G_b, this sum as the
derivative of an array of zeros that stands beside the matrix. A bias is a matrix with one input, which is 1. So squares
need no pass an example, no gradient of the whole model an example, and are spread over devices like any other gradient:
each makes those of its own examples, layer by layer, and they are summed.

Sources: gradients of examples from activations and output gradients as in Goodfellow (arXiv:1510.01799), here squared
and summed entry by entry instead of as norms.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saap_jax.estimation.accumulate import like_matrices, mean_over
from saap_jax.estimation.base import Statistic
from saap_jax.estimation.gradient_sums import gradient_sums
from saap_jax.llama.model import Llama, at_least_float32, param
from saap_jax.llama.product import Flat, flat_product, is_matrix


class Watched(Flat):
    """A matrix, or a bias, whose product also gives the sum over examples of their squared gradients."""

    def __init__(self, weight: nnx.Param, scale: Float[Array, "batch"]) -> None:
        super().__init__(weight)
        self.square = param(weight.axes, jnp.zeros(weight.shape, at_least_float32(weight.dtype)))
        self.scale = param(("layers", "batch"), jnp.broadcast_to(scale[None], (weight.shape[0], *scale.shape)))

    def product(self, equation: str, x: Array) -> Array:
        """Return what `einsum(equation, x, matrix)` is."""
        return _product(equation, self.axes[1:], x, self.weight[...], self.square[...], self.scale[...])

    def add(self, y: Array) -> Array:
        """Return y plus the bias."""
        ones, sizes = jnp.ones((*y.shape[:2], 1), y.dtype), "kgh"[: y.ndim - 2]
        weight, square = self.weight[...][None], self.square[...][None]
        each: Array = _product(
            f"bti,i{sizes}->bt{sizes}", ("embed", *self.axes[1:]), ones, weight, square, self.scale[...]
        )
        return y + each


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, axes: tuple[str, ...], x: Array, weight: Array, square: Array, scale: Array) -> Array:
    return flat_product(equation, x, weight)


def _forward(
    equation: str, axes: tuple[str, ...], x: Array, weight: Array, square: Array, scale: Array
) -> tuple[Array, Any]:
    return flat_product(equation, x, weight), (x, weight, scale)  # not `_product`: `remat` sees its dots


def _backward(
    equation: str, axes: tuple[str, ...], kept: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, Array, Array]:
    (x, weight, scale), embed_first = kept, axes[0] == "embed"
    (inputs, outputs), batch = flat_sizes(weight.shape, embed_first), x.shape[:2]
    of_x = cotangent.reshape(math.prod(batch), outputs) @ weight.reshape(inputs, outputs).T
    total, square = gradient_sums(
        x.reshape(*batch, inputs), cotangent.reshape(*batch, outputs), scale, 0 if embed_first else 1, axes
    )
    of_weight = total.reshape(weight.shape).astype(weight.dtype)
    return of_x.reshape(x.shape), of_weight, square.reshape(weight.shape), jnp.zeros_like(scale)


_product.defvjp(_forward, _backward)


def flat_sizes(shape: tuple[int, ...], embed_first: bool) -> tuple[int, int]:
    """Return the number of inputs and of outputs of a matrix of one layer, whose inputs or else outputs are `embed`."""
    split = 1 if embed_first else len(shape) - 1
    return math.prod(shape[:split]), math.prod(shape[split:])


def watched(model: Llama, scale: Float[Array, "batch"]) -> Llama:
    """Return a model with every matrix of its layers watched, and every bias that belongs to units.

    Args:
        scale: weight s_b of each example; 1 / tokens makes the gradient of a summed loss that of the mean one.
    """
    return _with_matrices(model, lambda matrix: Watched(matrix, scale))


def flattened(model: Llama) -> Llama:
    """Return a model whose matrices of the layers are `Flat`: the same function, its gradient made faster."""
    return _with_matrices(model, Flat)


def _with_matrices(model: Llama, make: Callable[[nnx.Param], Flat]) -> Llama:
    graph, rest = nnx.split(model)
    made = nnx.merge(graph, rest)
    for segment in made.segments:
        for block in (segment.attention, segment.mlp):
            for name, value in list(vars(block).items()):
                if is_matrix(value):
                    setattr(block, name, make(value))
    return made


def parts(gradients: Llama) -> tuple[Llama, Llama]:
    """Return the gradients of a flattened or watched model's weights as a model, and its squares as another.

    What is not watched, embeddings and norms, has a single 0 for its squares: no structure counts them.
    """

    def first(value: Any) -> Any:
        return value.weight if isinstance(value, Flat) else value

    def second(value: Any) -> Any:
        if isinstance(value, Watched):
            return value.square
        parameter = value.weight if isinstance(value, Flat) else value
        return parameter.replace(jnp.zeros((), at_least_float32(parameter.dtype)))

    def matrix_or_parameter(value: Any) -> bool:
        return isinstance(value, nnx.Variable | Flat)

    return (
        jax.tree.map(first, gradients, is_leaf=matrix_or_parameter),
        jax.tree.map(second, gradients, is_leaf=matrix_or_parameter),
    )


SQUARED_WEIGHT_GRADIENT = Statistic(
    name="squared_weight_gradient",
    init=like_matrices,
    source="squares",
    accumulation=mean_over("examples"),
    axes=lambda path: (),
)
"""Mean over examples of the squared gradient of its mean loss: a tree like the model's, of the matrices of its layers;
each other parameter has a single 0."""
