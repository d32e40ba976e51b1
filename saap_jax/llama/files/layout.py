"""How a model's parameters lie in a checkpoint: Hugging Face names, and matrices stored `[outputs, inputs]`.

Ours begin with the inputs and split heads into axes, so a stored matrix is the transpose of ours, flattened. Some
matrices lie side by side in a checkpoint (query, key and value of Phi-3), or apart (those of experts), where the model
has it the other way round: both are a `Fusion`, two lists of matrices that are the same once joined along an axis.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from saap_jax.llama.files.families import FAMILIES
from saap_jax.llama.model import Llama, abstract_llama
from saap_jax.llama.product import sides
from saap_jax.llama.quantized import Quantization, QuantizedArray
from saap_jax.llama.segments import segment_bounds
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.runtime.gather import fetched

UNEMBEDDING = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

_WHOLE = {"embedding": EMBEDDING, "norm": "model.norm.weight", "unembedding": UNEMBEDDING}

_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    **{f"attention/{name}": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value", "output")},
    **{f"attention/{name}_bias": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value", "output")},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "mlp/router": "mlp.gate",
    "mlp/down_bias": "mlp.down_proj",
}
"""Path of a parameter in a layer -> the name of its tensor in LLaMA; see `Family.layer_names` and `Mixture.names`."""

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


class Tensor(NamedTuple):
    """A tensor that is about to be written; `read` makes it, in its stored layout, and nothing keeps it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: np.dtype | None = None
    """How it is stored, where that is not up to the writer: of the arrays of a quantised matrix."""
    pieces: Callable[[], Iterator[np.ndarray]] | None = None
    """Makes it in pieces that follow each other along its first axis, where all of it at once would be large."""


class Stored(NamedTuple):
    """A parameter and the tensors that hold it: one, or one a layer in the order of its `layers` axis."""

    path: str
    variable: nnx.Variable
    names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """True when the parameter has a leading `layers` axis."""
        return self.variable.axes[0] == "layers"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of its axes without `layers`."""
        return self.variable.axes[self.stacked :]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of these axes."""
        return tuple(self.variable.shape[self.stacked :])

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the stored shape of a parameter of such sizes: `[outputs, inputs]` of a matrix, one of a vector."""
        if self.path == "embedding":
            return sizes
        if self._vector:
            return (math.prod(sizes),)
        inputs, outputs = sides(self.axes, sizes)
        return math.prod(outputs), math.prod(inputs)

    @property
    def _vector(self) -> bool:
        """True when it is stored as a vector, as a bias of heads is, whatever axes it has."""
        return len(self.axes) == 1 or not {"embed", "groups"} & set(self.axes)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """View a stored tensor in the layout of the parameter, without its `layers` axis."""
        return (tensor if self.path == "embedding" else tensor.T).reshape(self.sizes)

    def stored_part(self, part: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """Find the part of a stored tensor for a part of the parameter (without its `layers` axis).

        None where it is not one block of the stored matrix: where axes that are stored as one are split behind the
        first of them, and of quantised matrices.
        """
        if "groups" in self.axes:
            return None
        bounds = [each.indices(size)[:2] for each, size in zip(part, self.sizes, strict=True)]
        if self.path == "embedding":
            return tuple(slice(*each) for each in bounds)
        inputs = 0
        if not self._vector:
            inputs = len(sides(self.axes, self.sizes)[0])
        halves = [(bounds[inputs:], self.sizes[inputs:])]
        if self._vector:
            halves += []
        else:
            halves += [(bounds[:inputs], self.sizes[:inputs])]
        blocks = []
        for own, sizes in halves:
            if any(each != (0, size) for each, size in zip(own[1:], sizes[1:], strict=True)):
                return None
            rest = math.prod(sizes[1:])
            blocks.append(slice(own[0][0] * rest, own[0][1] * rest))
        return tuple(blocks)


def stored_parameters(model: Llama) -> tuple[list[Stored], Any]:
    """Place each parameter of a (possibly abstract) model in the checkpoint; beside it, the tree's definition."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    traits = model.constants.traits
    bounds = segment_bounds(model.segments)
    in_layer = _LAYER | dict(traits.layer_names) | (traits.mixture.names if traits.mixture is not None else {})
    stored = []
    for key_path, variable in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path in _WHOLE:
            names = (_WHOLE[path],)
        else:
            _, segment, name = path.split("/", 2)
            kind = "bias" if name.endswith("_bias") else "weight"
            whole, _, part = name.rpartition("/")
            if part in QUANTIZED:
                name = whole
                kind = QUANTIZED[part]
            layers = range(bounds[int(segment)].start, bounds[int(segment)].stop)
            names = tuple(f"model.layers.{layer}.{in_layer[name]}.{kind}" for layer in layers)
        stored.append(Stored(path, variable, names))
    return stored, treedef


def unread(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """List the tensors that nothing reads, with their shapes: of sub-blocks without heads or channels, matrices of no
    size and the norm before them. Files of others lack them."""
    found = {}
    for item in stored_parameters(abstract_llama(spec))[0]:
        structure = {"attention_norm": "kv_heads", "mlp_norm": "mlp"}.get(item.path.rpartition("/")[2])
        shape = item.shape(item.sizes)
        for name in item.names:
            if 0 in shape or (structure and not getattr(spec.layers[int(name.split(".")[2])], structure)):
                found[name] = shape
    return found


def model_tensors(model: Llama, layers: Sequence[LayerWidths] | None = None) -> list[Tensor]:
    """Return the tensors of a model under their Hugging Face names, in the layout of a Hugging Face checkpoint.

    With `layers`, one entry a layer, every layer is widened to the widths given there by units of zeros, which change
    no logit: an added channel or head enters an output projection whose rows for it are zero.

    The arrays of quantised matrices are as they are.

    Raises `ValueError` if a layer is wider than what is asked for, or a quantised matrix (that is not empty) would have
    to be widened.
    """
    own = model.spec.layers
    wanted = own if layers is None else tuple(layers)
    tensors = []
    for item in stored_parameters(model)[0]:
        start = 0
        if item.stacked:
            start = int(item.names[0].split(".")[2])
        for index, name in enumerate(item.names):
            size: dict[str, int | None] = {}
            if item.stacked:
                have = own[start + index]
                want = wanted[start + index]
                if "/mlp/" in item.path:
                    of_block = ("mlp",)
                else:
                    of_block = ("kv_heads", "q_per_kv")
                changed = any(getattr(have, each) != getattr(want, each) for each in of_block)
                if isinstance(item.variable, QuantizedArray) and changed and item.variable.size:
                    raise ValueError(
                        f"{item.path}: expected widths of {have} for a quantised matrix, got {want}; dequantise the "
                        "model"
                    )
                size = {name: getattr(want, name) for name in ("kv_heads", "q_per_kv", "mlp", "channels")}
            tensors.append(_tensor(item, index, name, size))
    return tensors


def _tensor(item: Stored, index: int, name: str, size: dict[str, int | None]) -> Tensor:
    """Return one layer of a parameter (or all of one without layers), widened along the axes in `size`."""
    have = item.sizes
    want = tuple(size.get(axis) or 0 if axis in size else own for axis, own in zip(item.axes, have, strict=True))
    if any(wide < length for wide, length in zip(want, have, strict=True)):
        raise ValueError(f"{name}: expected {dict(zip(item.axes, have, strict=True))} or wider, got {size}")
    shape = item.shape(want)

    def read() -> np.ndarray:
        # A view of memory that a CPU holds; never whole from an accelerator: jax keeps copies as long as a parameter.
        array = fetched(item.variable[...], index if item.stacked else None)
        if want != have:
            array = np.pad(array, [(0, wide - length) for wide, length in zip(want, have, strict=True)])
        if item.path == "embedding":
            return array
        return array.reshape(shape[::-1]).T

    return Tensor(
        name, shape, read, np.dtype(item.variable.dtype) if isinstance(item.variable, QuantizedArray) else None
    )


# --- matrices side by side -------------------------------------------------------------------------


class Fusion(NamedTuple):
    """Matrices of a layer: joined along `axis`, those of `ours` are those of `stored`."""

    axis: int
    ours: dict[str, int]
    """Name -> size along the axis."""
    stored: dict[str, int]
    across: int
    """Size along the other axis."""

    def shape(self, size: int) -> tuple[int, int]:
        """Return the shape of a member of a size along the axis."""
        if self.axis:
            return (self.across, size)
        return (size, self.across)


_FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def groups_of(spec: LlamaSpec, model_type: str) -> list[Fusion]:
    """List what a Hugging Face checkpoint of a `model_type` groups otherwise; one per layer fuses nothing."""
    groups = []
    if model_type in FAMILIES and FAMILIES[model_type].fused:
        groups = fused_groups(spec)
    if (mixture := spec.constants.traits.mixture) is None:
        return groups
    for layer, widths in enumerate(spec.layers):
        below = f"model.layers.{layer}.{mixture.experts}"
        each = widths.channels or 0
        for part, axis in zip(mixture.parts, mixture.sides.values(), strict=True):
            apart = {f"{below}.{number}.{part}.weight": each for number in range(widths.mlp)}
            groups.append(Fusion(axis, {f"{below}.{part}.weight": widths.mlp * each}, apart, spec.embed))
    return groups


def fused_groups(spec: LlamaSpec) -> list[Fusion]:
    """List the fused matrices of Phi-3, as Hugging Face and GGUF have them."""
    groups = []
    for layer, widths in enumerate(spec.layers):
        heads = widths.kv_heads * spec.head_dim
        for whole, parts in _FUSED.items():
            if len(parts) == 3:
                sizes = (heads * widths.q_per_kv, heads, heads)
            else:
                sizes = (widths.mlp, widths.mlp)
            block = f"model.layers.{layer}.{whole.partition('.')[0]}."
            ours = {f"{block}{part}.weight": size for part, size in zip(parts, sizes, strict=True)}
            groups.append(Fusion(0, ours, {f"model.layers.{layer}.{whole}.weight": sum(sizes)}, spec.embed))
    return groups


def regrouped(checkpoint: Checkpoint, groups: Iterable[Fusion]) -> Checkpoint:
    """View a checkpoint as one with our matrices; parts of fused ones are read as parts.

    Raises:
        ValueError: a stored matrix is missing or misshapen, or one of ours is there too.
    """
    where = checkpoint.where
    shapes = dict(checkpoint.shapes)
    owners: dict[str, tuple[Fusion, int]] = {}
    for group in groups:
        start = 0
        if extra := [name for name in group.ours if name in shapes]:
            raise ValueError(
                f"{where}: unknown tensors {', '.join(extra)}; expected their rows in {', '.join(group.stored)}"
            )
        for name, size in group.stored.items():
            if (found := shapes.pop(name, None)) != group.shape(size):
                if found:
                    got = f"{name} has shape {list(found)}"
                else:
                    got = f"missing tensors {name}"
                raise ValueError(f"{where}: {got}, expected {list(group.shape(size))}")
        for name, size in group.ours.items():
            shapes[name] = group.shape(size)
            owners[name] = (group, start)
            start += size

    def read_part(name: str, block: tuple[slice, ...]) -> np.ndarray:
        if name in owners:
            group, start = owners[name]
            if len(group.stored) != 1:
                return read(name)[block]
            name, ours = next(iter(group.stored)), block[group.axis].indices(group.ours[name])
            inner = slice(start + ours[0], start + ours[1])
            if group.axis:
                block = (block[0], inner)
            else:
                block = (inner, block[1])
        if checkpoint.read_part is None:
            return checkpoint.read(name)[block]
        return checkpoint.read_part(name, block)

    def read(name: str) -> np.ndarray:
        if name not in owners:
            return checkpoint.read(name)
        group, _ = owners[name]
        if len(group.stored) == 1:
            return read_part(name, (slice(None), slice(None)))
        parts = [checkpoint.read(each) for each in group.stored]
        if parts:
            return np.concatenate(parts, axis=group.axis)
        return np.zeros(shapes[name], np.float32)

    return checkpoint._replace(shapes=shapes, read=read, read_part=checkpoint.read_part and read_part)


def as_stored(tensors: Sequence[Tensor], groups: Iterable[Fusion]) -> list[Tensor]:
    """Group tensors as a checkpoint has them, each group in the place of its first matrix.

    Raises:
        ValueError: matrices of a group of which some are quantised and others not.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    groups = [group for group in groups if group.ours.keys() <= by_name.keys()]
    firsts = {next(iter(group.ours)): group for group in groups}
    others = {name for group in groups for name in group.ours} - firsts.keys()
    made = []
    for tensor in tensors:
        if (group := firsts.get(tensor.name)) is not None:
            made += _stored(group, [by_name[name] for name in group.ours])
        elif tensor.name not in others:
            made.append(tensor)
    return made


def _stored(group: Fusion, ours: list[Tensor]) -> list[Tensor]:
    """Make the stored tensors of a group from all of ours, which are read once for all of them."""
    axis = group.axis
    if len({part.dtype for part in ours}) > 1:
        kinds = ", ".join(f"{part.name} as {part.dtype or 'floats'}" for part in ours)
        raise ValueError(
            f"{', '.join(group.stored)}: expected its matrices all in floats or all quantised, got {kinds}; dequantise "
            "them"
        )
    size = sum(part.shape[axis] for part in ours) // max(len(group.stored), 1)
    if axis:
        shape = (ours[0].shape[0], size)
    else:
        shape = (size, ours[0].shape[1])
    kept: list[np.ndarray] = []  # those of experts are written one behind the other

    def part(number: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if kept:
                whole = kept.pop()
            else:
                whole = np.concatenate([each.read() for each in ours], axis=axis)
            if number + 1 < len(group.stored):
                kept.append(whole)
            return whole[(slice(None),) * axis + (slice(number * size, (number + 1) * size),)]

        return read

    return [Tensor(name, shape, part(number), ours[0].dtype) for number, name in enumerate(group.stored)]
