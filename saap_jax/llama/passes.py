"""Other forward passes: some of the layers, from a residual stream that is at hand; at the width that gates keep; and
packed rows.

What many variants of a model have in common is computed once; only the layers behind the first difference run again. Of
such a layer only the units that are kept are computed: they are taken together, some at a time, and a loop turns as
often as there are some left. So one program serves all widths, and its cost is that of the cut model.

A packed row holds several texts behind one another. Each sees itself alone, from position 0 on, so that every hidden
state is what it would be with the text in a row of its own. Padding is of segment -1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from saap_jax.llama.attention import Places, Sight, apart_of, at_least_float32, sight_of
from saap_jax.llama.model import DecoderLayer, Hidden, Llama, attend, decode, feed, post_normed, rms_norm
from saap_jax.llama.product import Matrix, added
from saap_jax.llama.segments import segment_bounds, split_gates
from saap_jax.llama.spec import Constants
from saap_jax.runtime.constraints import in_force
from saap_jax.types import PRUNABLE_AXES, Gates, LayerGates

PARTS = 8
"""Parts of a layer's units, one of which `decode_kept` computes at a time: the finer, the less is computed in vain, and
the narrower are the products."""


def run_layers(
    model: Llama,
    x: Hidden,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    gates: Gates | None = None,
    *,
    kept_width: bool = False,
) -> Hidden:
    """Return the residual stream behind the layers `start … stop - 1`; `x` is the one before layer `start`.

    The bounds are inputs: loops with dynamic bounds over the stacked parameters, one a segment, of which
    those outside turn zero times. The cost is that of the layers between, and no pair of bounds compiles anew.

    Args:
        gates: whole-model, `[layers, units]` or `[examples, layers, units]`; None stands for all ones.
        kept_width: compute only the units that `gates` keep, see `decode_kept`; of `[layers, units]` alone.
    """
    sight = sight_of(x.shape[1], model.head_dim, model.constants)
    bounds = segment_bounds(model.segments)
    parts = model.segments, split_gates(gates, bounds), apart_of(model.constants, bounds), bounds
    for segment, segment_gates, apart, place in zip(*parts, strict=True):

        def layer(
            index: Array, x: Array, segment: DecoderLayer = segment, own: tuple[Any, Any] = (segment_gates, apart)
        ) -> Array:
            own_gates, own_apart = (None if each is None else layer_of(each, index) for each in own)
            of_layer = layer_of(segment, index)
            seen = sight.of(own_apart)
            if kept_width and own_gates is not None:
                return decode_kept(of_layer, x, own_gates, seen, model.constants)
            return decode(of_layer, x, own_gates, seen, model.constants)[0]

        first, last = (jnp.clip(jnp.asarray(bound) - place.start, 0, segment.length) for bound in (start, stop))
        x = jax.lax.fori_loop(first, last, layer, x)
    return x


def layer_of(segment: Any, layer: Int[Array, ""]) -> Any:
    """Return the parameters of one layer of a segment, by its number within it."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), segment)


def fits_kept_width(model: Llama) -> bool:
    """Say whether `decode_kept` serves a model: one of plain matrices, without experts, on one device."""
    leaves = jax.tree.leaves(model.segments, is_leaf=lambda leaf: isinstance(leaf, Matrix))
    return not (in_force() or model.constants.traits.experts or any(isinstance(leaf, Matrix) for leaf in leaves))


def decode_kept(layer: DecoderLayer, x: Hidden, gates: LayerGates, sight: Sight, constants: Constants) -> Hidden:
    """Apply one decoder layer, as `decode` does, and compute only the units whose gates, `[units]`, are not 0.

    Sums over units are float32 (at least) and rounded once.
    """
    wide = at_least_float32(x.dtype)

    def attention(heads: Any, normed: Hidden, gate: Float[Array, "units"]) -> Hidden:
        middle = attend(heads, normed, sight, constants) * gate[None, None, :, None, None]
        return jnp.einsum("btkgh,kghd->btd", middle, heads.output[...], preferred_element_type=wide)

    def mlp(channels: Any, normed: Hidden, gate: Float[Array, "units"]) -> Hidden:
        active = feed(channels, normed, constants, gate)
        return jnp.einsum("btf,fd->btd", active, channels.down[...], preferred_element_type=wide)

    for name, write, bias in (
        ("attention", attention, layer.attention.output_bias),
        ("mlp", mlp, layer.mlp.down_bias),
    ):
        normed = rms_norm(x, getattr(layer, f"{name}_norm")[...], constants)
        written = added(_written_by_kept(getattr(layer, name), normed, gates[name], write), bias)
        x = x + post_normed(written, getattr(layer, f"{name}_post_norm"), constants)
    return x


def _written_by_kept(block: Any, normed: Hidden, gates: Float[Array, "units"], write: Callable[..., Hidden]) -> Hidden:
    """Sum up what the kept units of a block write, a part of them at a time."""
    if not len(gates):
        return jnp.zeros_like(normed)
    order = jnp.argsort(gates == 0, stable=True)
    count = jnp.sum(gates != 0)
    size = -(-len(gates) // PARTS)

    def part(number: Int[Array, ""], total: Array) -> Array:
        places = number * size + jnp.arange(size)
        units = order[jnp.minimum(places, len(gates) - 1)]  # what is too much in the last part has a gate of 0
        gate = jnp.where(places < count, gates[units], 0).astype(normed.dtype)
        return total + write(_taken(block, units), normed, gate)

    total = jnp.zeros(normed.shape, at_least_float32(normed.dtype))
    return jax.lax.fori_loop(0, -(-count // size), part, total).astype(normed.dtype)


def _taken(block: Any, units: Int[Array, "some"]) -> Any:
    """Take some units of a block of one layer."""

    def one(parameter: nnx.Param) -> nnx.Param:
        axis = next((number for number, name in enumerate(parameter.axes[1:]) if name in PRUNABLE_AXES), None)
        if axis is None:
            return parameter
        return nnx.Param(jnp.take(parameter[...], units, axis=axis), axes=parameter.axes)

    return jax.tree.map(one, block, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def packed_hidden(
    model: Llama, tokens: Places, positions: Places, segments: Places, **options: Any
) -> tuple[Hidden, list[Any]]:
    """Run packed rows as `Llama.hidden` does, with its options; `positions` are those of tokens within their texts."""
    sight = sight_of(tokens.shape[1], model.head_dim, model.constants, positions=positions, segments=segments)
    return model.hidden(tokens, sight=sight, **options)
