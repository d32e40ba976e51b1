"""Other forward passes: some of the layers, from a residual stream that is at hand; and packed rows.

What many variants of a model have in common is computed once; only the layers behind the first difference run again.

A packed row holds several texts behind one another. Each sees itself alone, from position 0 on, so that every hidden
state is what it would be with the text in a row of its own. Padding is of segment -1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saap_jax.llama.attention import Places, apart_of, sight_of
from saap_jax.llama.model import DecoderLayer, Hidden, Llama, decode
from saap_jax.llama.segments import segment_bounds, split_gates
from saap_jax.types import Gates, Remat


def run_layers(
    model: Llama, x: Hidden, start: Int[Array, ""] | int, stop: Int[Array, ""] | int, gates: Gates | None = None
) -> Hidden:
    """Return the residual stream behind the layers `start … stop - 1`; `x` is the one before layer `start`.

    The bounds are inputs: loops with dynamic bounds over the stacked parameters, one a segment, of which
    those outside turn zero times. The cost is that of the layers between, and no pair of bounds compiles anew.

    Args:
        gates: whole-model, `[layers, units]` or `[examples, layers, units]`; None stands for all ones.
    """
    sight, bounds = sight_of(x.shape[1], model.head_dim, model.constants), segment_bounds(model.segments)
    parts = model.segments, split_gates(gates, bounds), apart_of(model.constants, bounds), bounds
    for segment, segment_gates, apart, place in zip(*parts, strict=True):

        def layer(
            index: Array, x: Array, segment: DecoderLayer = segment, own: tuple[Any, Any] = (segment_gates, apart)
        ) -> Array:
            own_gates, own_apart = (None if each is None else layer_of(each, index) for each in own)
            return decode(layer_of(segment, index), x, own_gates, sight.of(own_apart), model.constants)[0]

        first, last = (jnp.clip(jnp.asarray(bound) - place.start, 0, segment.length) for bound in (start, stop))
        x = jax.lax.fori_loop(first, last, layer, x)
    return x


def layer_of(segment: Any, layer: Int[Array, ""]) -> Any:
    """Return the parameters of one layer of a segment, by its number within it."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), segment)


def packed_hidden(
    model: Llama, tokens: Places, positions: Places, segments: Places, *, remat: Remat = "none"
) -> Hidden:
    """Return the normalised last hidden states of packed rows; `positions` are those of tokens within their texts."""
    sight = sight_of(tokens.shape[1], model.head_dim, model.constants, positions=positions, segments=segments)
    return model.hidden(tokens, sight=sight, remat=remat)[0]


def packed_streams(
    model: Llama, tokens: Places, positions: Places, segments: Places, *, remat: Remat = "none"
) -> tuple[Hidden, Float[Array, "layers batch seq embed"]]:
    """Compute the last hidden states of packed documents, as `packed_hidden`, and the stream behind each layer."""
    sight = sight_of(tokens.shape[1], model.head_dim, model.constants, positions=positions, segments=segments)
    hidden, streams = model.hidden(tokens, sight=sight, remat=remat, streams=True)
    return hidden, jnp.concatenate(streams)
