"""The product of activations with a matrix of the model, whatever stands in the matrix's place.

A matrix is an `nnx.Param`, or a module put into the tree instead of it: quantised, or with an adapter beside it. Every
use of a matrix in the model goes through `product`, so such a model runs wherever a dense one does.
"""

import abc
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


class Matrix(nnx.Module):
    """What stands in the tree in place of the `nnx.Param` of a matrix.

    Its array leaves all begin with `layers`, as a parameter does, so that `lax.scan` slices it like one. `matrix[...]`
    is the matrix in floats, as of a parameter: for what needs the numbers rather than the product.
    """

    axes: tuple[str, ...]
    """Names of the axes of the matrix, `layers` among them, as of its parameter."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Sizes of the matrix, read from the arrays; without `layers` where a scan took that axis."""

    @abc.abstractmethod
    def product(self, equation: str, x: Array) -> Array:
        """Compute `jnp.einsum(equation, x, matrix)`; see `product`."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """Return the matrix in floats."""

    def add(self, y: Array) -> Array:
        """Return y with this added to every token, of what stands in the place of a bias; see `added`."""
        return y + self.dense()[None, None]

    def __getitem__(self, index: Any) -> Array:
        """Return the matrix in floats, or a part of it."""
        return self.dense()[index]


Weight = nnx.Param | Matrix
"""What a layer has for a matrix."""


def product(equation: str, x: Array, weight: Weight) -> Array:
    """Return `einsum(equation, x, weight)`, with a matrix of one layer.

    `x` is `[batch, seq, *inputs]`; the equation contracts all inputs. One with fewer letters for the matrix than it has
    axes takes them as one: `x` is then `[batch, seq, inputs]`.
    """
    if isinstance(weight, Matrix):
        return weight.product(equation, x)
    value = weight[...]
    if value.ndim != len(equation.partition("->")[0].partition(",")[2]):
        value = value.reshape(x.shape[-1], -1 if x.shape[-1] else value.shape[-1])  # of no inputs -1 cannot be told
    return jnp.einsum(equation, x, value)


def flat_product(equation: str, x: Array, value: Array) -> Array:
    """Return `einsum(equation, x, value)` as a product of two matrices, tokens × inputs and inputs × outputs.

    For what is differentiated by the matrix: with more axes XLA writes operands of its gradient transposed, on a CPU.
    """
    of_matrix, of_result = equation.partition(",")[2].split("->")
    inputs = math.prod(x.shape[2:])
    outputs = value.shape[value.ndim - sum(letter in of_result for letter in of_matrix) :]
    y = x.reshape(math.prod(x.shape[:2]), inputs) @ value.reshape(inputs, math.prod(outputs))
    return y.reshape(*x.shape[:2], *outputs)


class Flat(Matrix):
    """A matrix, or a bias, whose products are those of `flat_product`."""

    def __init__(self, weight: nnx.Param) -> None:
        self.axes: tuple[str, ...] = weight.axes
        self.weight = weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def product(self, equation: str, x: Array) -> Array:
        return flat_product(equation, x, self.weight[...])

    def dense(self) -> Array:
        return self.weight[...]


def added(y: Array, bias: Weight | None) -> Array:
    """Return `[batch, seq, *sizes]` plus a bias of one layer, `[*sizes]`; without one, what was given."""
    if bias is None:
        return y
    if isinstance(bias, Matrix):  # one that is watched has a backward pass of its own
        return bias.add(y)
    return y + bias[...][None, None]


def sides(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split the sizes of a matrix of one layer into those of its inputs and of its outputs.

    A matrix has the residual stream (`embed`) on one side: it is the input where it comes first.

    >>> sides(("kv_heads", "q_per_kv", "head_dim", "embed"), (3, 3, 64, 576))
    ((3, 3, 64), (576,))
    """
    inputs = 1 if axes[0] == "embed" else len(shape) - 1
    return shape[:inputs], shape[inputs:]


def inputs_and_outputs(weight: Weight) -> tuple[int, int]:
    """Return the number of inputs and of outputs of a stacked matrix."""
    inputs, outputs = sides(weight.axes[1:], tuple(weight.shape[1:]))
    return math.prod(inputs), math.prod(outputs)


def is_parameter(leaf: Any) -> bool:
    """Say whether a node of a model's tree is a parameter, or stands in the place of one."""
    return isinstance(leaf, nnx.Variable | Matrix)


def is_matrix(value: Any) -> bool:
    """Say whether a variable of a segment is a matrix, or a bias of units: of two axes or more beside `layers`."""
    return isinstance(value, nnx.Param) and len(value.axes) > 2


def check_plain(model: Any, what: str) -> None:
    """Raise ValueError if a module stands in the place of a matrix, naming `what` cannot be done with it."""
    blocks = [block for segment in model.segments for block in (segment.attention, segment.mlp)]
    for name, value in (item for block in blocks for item in vars(block).items()):
        if isinstance(value, Matrix):
            raise ValueError(
                f"{what}: expected a model whose matrices are plain floats, got {type(value).__name__} for {name}; "
                "prune and compensate first, recover (quantise, adapt) the pruned model after that"
            )
