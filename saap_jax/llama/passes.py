"""Other forward passes: some of the layers, from a residual stream that is at hand; and packed rows.

What many variants of a model have in common is computed once; only the layers behind the first difference run again.

A packed row holds a shared beginning and then the rest of each sequence, its *branches*:

    tokens      The  cat  sat  |  on  the  mat  |  down
    segments     0    0    0      1    1    1       2
    positions    0    1    2      3    4    5       3

A branch sees the beginning and itself, and its positions go on from the beginning's, so that every hidden state is what
it would be with the sequence alone in a row. Padding has segment -1.
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
    model: Llama, tokens: Places, positions: Places, segments: Places, *, remat: Remat = "none", shared: bool = True
) -> Hidden:
    """Return the normalised last hidden states of packed rows.

    Args:
        positions: of each token within its own sequence.
        segments: 0 for the shared beginning, 1, 2, … for the branches, -1 for padding. Without any 0 the branches have
            nothing in common: each is a document of its own.
        shared: whether rows may have a segment 0; False where each segment is known to be a document of its own.
    """
    sight = sight_of(
        tokens.shape[1], model.head_dim, model.constants, positions=positions, segments=segments, shared=shared
    )
    return model.hidden(tokens, sight=sight, remat=remat)[0]


def packed_streams(
    model: Llama, tokens: Places, positions: Places, segments: Places, *, remat: Remat = "none"
) -> tuple[Hidden, Float[Array, "layers batch seq embed"]]:
    """Compute the last hidden states of packed documents, as `packed_hidden`, and the stream behind each layer."""
    sight = sight_of(tokens.shape[1], model.head_dim, model.constants, positions=positions, segments=segments)
    hidden, streams = model.hidden(tokens, sight=sight, remat=remat, streams=True)
    return hidden, jnp.concatenate(streams)
