"""How a model's parameters lie in a checkpoint: Hugging Face names, and matrices stored `[outputs, inputs]`.

Ours begin with the inputs and split heads into axes, so a stored matrix is the transpose of ours, flattened. Which
axes are inputs follows from the axis names: a matrix has the residual stream (`embed`) on one side.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from saap_jax.llama.model import Llama
from saap_jax.llama.product import sides
from saap_jax.llama.quantized import Quantization
from saap_jax.llama.segments import segment_bounds
from saap_jax.llama.spec import LlamaSpec

UNEMBEDDING = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

_WHOLE = {"embedding": EMBEDDING, "norm": "model.norm.weight", "unembedding": UNEMBEDDING}

_LAYER = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/query_bias": "self_attn.q_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key": "self_attn.k_proj",
    "attention/key_bias": "self_attn.k_proj",
    "attention/key_norm": "self_attn.k_norm",
    "attention/value": "self_attn.v_proj",
    "attention/value_bias": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/output_bias": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/router": "mlp.gate",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp/down_bias": "mlp.down_proj",
}

PACKED = "weight_packed"

QUANTIZED = {"packed": PACKED, "scale": "weight_scale", "offset": "weight_offset"}
"""Array of a quantised matrix -> the last part of the name of its tensor, `[outputs, groups * bytes or groups]`."""


class Checkpoint(NamedTuple):
    """An opened source of tensors under Hugging Face names; `read` returns one of them, in a dtype of its own."""

    where: str
    spec: LlamaSpec
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    read_part: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None
    """Reads a part of a tensor without the rest; None where the source cannot."""
    quantization: Quantization | None = None


class Stored(NamedTuple):
    """A parameter and the tensors that hold it: one, or one a layer in the order of its `layers` axis."""

    path: str
    variable: nnx.Variable
    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """True when the parameter has a leading `layers` axis."""
        return self.variable.axes[0] == "layers"

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """View a stored tensor in the layout of the parameter, without its `layers` axis."""
        shape = self.variable.shape[1:] if self.stacked else self.variable.shape
        return (tensor if self.path == "embedding" else tensor.T).reshape(shape)

    def stored_part(self, part: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """Return which part of a stored tensor holds a part of the parameter (without its `layers` axis).

        None where it is not one block of the stored matrix: where axes that are stored as one are split behind the
        first of them, and of quantised matrices.
        """
        if "groups" in self.variable.axes:
            return None
        shape = self.variable.shape[1:] if self.stacked else self.variable.shape
        bounds = [each.indices(size)[:2] for each, size in zip(part, shape, strict=True)]
        if self.path == "embedding" or len(shape) == 1:
            return tuple(slice(*each) for each in bounds)
        axes = self.variable.axes[1:] if self.stacked else self.variable.axes
        if _is_vector(axes):
            rows = _block(bounds, shape)
            return None if rows is None else (rows,)
        inputs = len(sides(axes, shape)[0])
        rows, columns = _block(bounds[inputs:], shape[inputs:]), _block(bounds[:inputs], shape[:inputs])
        return None if rows is None or columns is None else (rows, columns)


def stored_parameters(model: Llama) -> tuple[list[Stored], Any]:
    """Return where each parameter of a (possibly abstract) model is stored, and the tree's definition."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    traits, bounds = model.constants.traits, segment_bounds(model.segments)
    in_layer = _LAYER | dict(traits.layer_names) | (traits.mixture.names if traits.mixture is not None else {})
    stored = []
    for key_path, variable in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path in _WHOLE:
            names, shape, axes = (_WHOLE[path],), variable.shape, variable.axes
        else:
            _, segment, name = path.split("/", 2)
            layers = range(bounds[int(segment)].start, bounds[int(segment)].stop)
            whole, _, part = name.rpartition("/")
            if part in QUANTIZED:
                name, kind = whole, QUANTIZED[part]
            else:
                kind = "bias" if name.endswith("_bias") else "weight"
            names = tuple(f"model.layers.{layer}.{in_layer[name]}.{kind}" for layer in layers)
            shape, axes = variable.shape[1:], variable.axes[1:]
        stored.append(Stored(path, variable, names, shape if path == "embedding" else stored_shape(axes, shape)))
    return stored, treedef


def tensor_shapes(stored: list[Stored]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every stored tensor."""
    for item in stored:
        for name in item.names:
            yield name, item.shape


def stored_shape(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stored shape `[outputs, inputs]` of a matrix with the given axes and sizes; of a vector, its length.

    A bias of heads is a vector too, whatever axes it has.
    """
    if _is_vector(axes):
        return (math.prod(shape),)
    inputs, outputs = sides(axes, shape)
    return math.prod(outputs), math.prod(inputs)


def _is_vector(axes: Sequence[str]) -> bool:
    """Say whether a parameter with these axes, without `layers`, is stored as a vector."""
    return len(axes) == 1 or not {"embed", "groups"} & set(axes)


def _block(bounds: Sequence[tuple[int, int]], shape: Sequence[int]) -> slice | None:
    """Return the stretch of the flattened axes that a part of them is, or None if it is not one."""
    if any(each != (0, size) for each, size in zip(bounds[1:], shape[1:], strict=True)):
        return None
    rest = math.prod(shape[1:])
    return slice(bounds[0][0] * rest, bounds[0][1] * rest)
