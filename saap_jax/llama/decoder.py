"""A model that decodes: its cache of keys and values, draws of tokens, and the form that a CPU reads fastest.

A cache has one pair of arrays a segment. What a layer's query heads share (GQA) is stored once, and a layer without
heads stores nothing. Prompts of one batch end at the same slot, with their padding on the left: row b starts at slot
`start[b]`, which is its position 0. So every row writes to the same slot, and one update in place serves all. The
shapes are chosen for XLA on a CPU, which works in place only where no reshape stands between an update and the product
that reads it: a layer's keys are `[batch * kv_heads, slots, head_dim]`, as a batched product wants them.

One token a row makes every product of a layer a matrix times a vector, to which XLA gives one core where the matrix is
small. So matrices that read the same are put side by side, and each is split in as many parts as there are cores, of
which one product each is a batch: a narrow (cut) layer is read as fast as a wide one, as
`experiments/benchmarks/matrix_vector.py` measures.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from saap_jax.llama.attention import Seen, Sight, apart_of, rotary
from saap_jax.llama.model import (
    Attention,
    DecoderLayer,
    Heads,
    Hidden,
    Llama,
    Mlp,
    at_least_float32,
    feed,
    param,
    post_normed,
    project,
    rms_norm,
    written_by,
)
from saap_jax.llama.product import Matrix, added, product, sides
from saap_jax.llama.segments import segment_bounds
from saap_jax.llama.spec import Apart, Constants
from saap_jax.runtime.gather import concatenated, put_beside, read_in_place
from saap_jax.runtime.programs import cores


class SegmentCache(NamedTuple):
    """Keys (turned to their positions) and values of a segment; one of a single layer has no `layers` axis.

    An entry of the axis `heads` is a key/value head of a row of the batch: batch * kv_heads of them.
    """

    keys: Float[Array, "*layers heads slots head_dim"]
    values: Float[Array, "*layers heads slots head_dim"]


Cache = list[SegmentCache]
"""One for each segment of the model."""


def empty_cache(model: Llama, batch: int, slots: int) -> Cache:
    """Return a cache for `slots` tokens a row, zeros in the dtype of the model."""

    def zeros(segment: DecoderLayer) -> Array:
        shape = (batch * segment.widths.kv_heads, slots, segment.attention.output.shape[-2])
        return jnp.zeros(shape if segment.length == 1 else (segment.length, *shape), model.embedding.dtype)

    return [SegmentCache(zeros(segment), zeros(segment)) for segment in model.segments]


def cache_bytes(model: Llama, batch: int, slots: int) -> int:
    """Return the bytes of such a cache."""
    shapes = jax.eval_shape(lambda: empty_cache(model, batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def single_layers(model: Llama) -> Llama:
    """Give every layer a segment of its own: a scan would copy each layer out of its stack before it uses it.

    Memory: one more copy of the layers' weights as long as `model` is kept; embeddings are shared with it. A model
    whose segments are single layers already is returned as it is.
    """
    if all(segment.length == 1 for segment in model.segments):
        return model
    single = nnx.merge(*nnx.split(model))
    layers = [
        jax.tree.map(lambda leaf, index=index: read_in_place(leaf)[index : index + 1], segment)
        for segment in model.segments
        for index in range(segment.length)
    ]
    single.segments = put_beside(model.embedding[...], nnx.List(layers))
    return single


def extend(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    cache: Cache,
    start: Int[Array, "batch"],
    slot: Int[Array, ""],
    *,
    empty: bool,
) -> tuple[Hidden, Cache]:
    """Write `tokens` to the slots from `slot` on; return their normalised last hidden states, and the cache.

    `empty` says that nothing is in the cache yet, so that the tokens have only each other to look at.
    """
    slots = slot + jnp.arange(tokens.shape[1], dtype=slot.dtype)  # as wide as the slot, in double precision too
    positions = jnp.maximum(slots[None] - start[:, None], 0)
    count = max(segment.keys.shape[-2] for segment in cache)
    if empty:
        seen = slots
    else:
        seen = jnp.arange(count, dtype=slot.dtype)
    visible = (seen[None, None] >= start[:, None, None]) & (seen[None, None] <= slots[None, :, None])
    constants = model.constants

    def one(how: Constants | Apart) -> Sight:
        allowed = visible
        if (window := how.sliding_window) is not None and window < count:  # slots are as far apart as positions
            allowed = visible & (seen[None, None] > slots[None, :, None] - window)
        # A table, made when the program is traced: XLA would take sines and cosines into every layer that uses them, a
        # twentieth of the time of a prompt on a CPU.
        with jax.ensure_compile_time_eval():
            cos, sin = rotary(jnp.arange(count), model.head_dim, how)
        return Sight((cos[positions], sin[positions]), allowed)

    sight = one(constants)._replace(apart=None if constants.apart is None else one(constants.apart))

    def step(x: Array, inputs: tuple[DecoderLayer, SegmentCache, Any]) -> tuple[Array, SegmentCache]:
        layer, own, apart = inputs
        attention = layer.attention
        written = None
        if own.keys.size:
            normed = rms_norm(x, layer.attention_norm[...], constants)
            heads, own = _attend(attention, normed, own, sight.of(apart), slot, constants, empty)
            # As a matrix, because with several axes to sum over XLA may reorder the weights instead of the activations.
            written = added(product("btf,fd->btd", heads, attention.output), attention.output_bias)
        elif attention.output_bias is not None:
            written = jnp.broadcast_to(attention.output_bias[...][None, None], x.shape)
        if written is not None:
            x = x + post_normed(written, layer.attention_post_norm, constants)
        written = written_by(layer.mlp, feed(layer.mlp, rms_norm(x, layer.mlp_norm[...], constants), constants))
        return x + post_normed(written, layer.mlp_post_norm, constants), own

    x = model.embedded(tokens)
    extended = []
    for segment, segment_cache, apart in zip(
        model.segments, cache, apart_of(constants, segment_bounds(model.segments)), strict=True
    ):
        if segment.length == 1:  # no loop: a scan would copy the layer out of its stack before using it
            one_layer = jax.tree.map(lambda leaf: leaf[0], segment)
            x, segment_cache = step(x, (one_layer, segment_cache, None if apart is None else bool(apart[0])))
        else:
            x, segment_cache = jax.lax.scan(step, x, (segment, segment_cache, apart))
        extended.append(segment_cache)
    return model.final(x), extended


def _attend(
    attention: Attention,
    x: Hidden,
    cache: SegmentCache,
    sight: Sight,
    slot: Int[Array, ""],
    constants: Constants,
    empty: bool,
) -> tuple[Float[Array, "batch seq heads_times_dim"], SegmentCache]:
    """Attention of new tokens, up to, not including, the output projection; scores and softmax in float32.

    Letters: r a key/value head of a row, s a slot, q a query (of g query heads and t tokens), h head_dim.
    """
    assert not isinstance(sight.seen, Seen)
    query, key, value = project(attention, x, sight.rotation, constants)
    batch, seq, kv_heads, q_per_kv, head_dim = query.shape
    new = [jnp.swapaxes(array, 1, 2).reshape(-1, seq, head_dim) for array in (key, value)]
    place = (jnp.zeros_like(slot), slot, jnp.zeros_like(slot))
    cache = SegmentCache(*(jax.lax.dynamic_update_slice(c, n, place) for c, n in zip(cache, new, strict=True)))
    keys, values = new if empty else cache
    wide = at_least_float32(x.dtype)
    queries = query.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, q_per_kv * seq, head_dim)
    scores = jnp.einsum("rsh,rqh->rsq", keys, queries, preferred_element_type=wide)
    scores = scores * (constants.query_scalar or head_dim) ** -0.5
    scores = jnp.swapaxes(scores, 1, 2).reshape(batch, kv_heads, q_per_kv, seq, -1)
    # Not -inf: a padding token sees nothing, and its NaN would spread to the rows that multiply it by zero.
    scores = jnp.where(sight.seen[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype).reshape(*queries.shape[:2], -1)
    mixed = jnp.einsum("rqs,rsh->rqh", weights, values).reshape(batch, kv_heads, q_per_kv, seq, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, seq, -1), cache


# --- draws -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits; the default takes the most probable one.

    Temperature first, then top-k, then top-p of what top-k left, as in `transformers`. Tokens that are exactly as
    probable as the last one kept are kept too.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token and ignores the rest."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the draws. Each prompt has a stream of its own, which its place in the list chooses."""
    stop_tokens: Sequence[int] | None = None
    """Tokens that end a row; None for those that the model's configuration names."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a number of at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 1, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number in [0, 2^32), got {self.seed}")


class Settings(NamedTuple):
    """`Sampling` as arrays, so that other settings need no other program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def settings_of(sampling: Sampling) -> Settings:
    """Return the settings as the compiled programs take them."""
    return Settings(jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))


def draw(logits: Float[Array, "batch vocab"], settings: Settings, keys: Key[Array, "batch"]) -> Int[Array, "batch"]:
    """Draw one token a row, int32; a row depends on its own logits and key alone."""

    def drawn(logits: Array) -> Array:
        given = logits.astype(jnp.float32) / settings.temperature, settings.top_k, settings.top_p
        among_some = (settings.top_k > 0) | (settings.top_p < 1)
        cut = jax.lax.cond(among_some, truncate, lambda logits, *_: logits, *given)
        return jax.vmap(jax.random.categorical)(keys, cut).astype(jnp.int32)

    def most_probable(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(settings.temperature > 0, drawn, most_probable, logits)


def truncate(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Set the logits outside top-k and top-p to -inf.

    Both thresholds are found by bisection over the bits of a float32, 32 counts of the row: no sort, which takes
    longer than a forward pass of a small model (of 49,152 logits on a CPU 15 ms, the counts 1.7 ms), and `top_k` need
    not be known when the program is compiled.
    """

    def ordered(x: Array) -> Array:
        """Map float32 to int32 so that order is kept."""
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
        return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    rank = ordered(logits)
    wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])
    least = _largest(lambda t: jnp.sum(rank >= t[:, None], axis=-1, dtype=jnp.int32) >= wanted, logits.shape[0])
    logits = jnp.where(rank >= least[:, None], logits, -jnp.inf)
    share = jax.nn.softmax(logits, axis=-1)
    bits = ordered(share)
    least = _largest(lambda t: jnp.sum(jnp.where(bits >= t[:, None], share, 0.0), axis=-1) >= top_p, logits.shape[0])
    return jnp.where((bits >= least[:, None]) | (top_p >= 1), logits, -jnp.inf)


def _largest(holds: Callable[[Array], Array], rows: int) -> Int[Array, "rows"]:
    """Find for each row the largest int32 that a condition holds for, which holds up to some number and then not.

    Where it holds nowhere: the smallest int32.
    """
    limits = jnp.iinfo(jnp.int32)
    low = jnp.full(rows, limits.min, jnp.int32)
    high = jnp.full(rows, limits.max, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        held = holds(middle)
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]


# --- the form of a CPU --------------------------------------------------------------------------


class Shared(Matrix):
    """A matrix in as many parts as there are cores, each for as many inputs; what does not divide is a part of its own.

    A product with one row of activations is a batch of one product a part; with more rows, for which that is slower, it
    is the ordinary one.
    """

    def __init__(self, axes: tuple[str, ...], value: Float[Array | np.ndarray, "layers *sizes"], parts: int) -> None:
        self.axes = axes
        self.sizes = value.shape[1:]
        inputs, outputs = (math.prod(side) for side in sides(axes[1:], self.sizes))
        each = inputs // parts
        flat = value.reshape(value.shape[0], inputs, outputs)
        whole = flat[:, : each * parts].reshape(value.shape[0], parts, each, outputs)
        self.parts = param(("layers", "parts", "inputs", "outputs"), whole)
        self.rest = param(("layers", "inputs", "outputs"), flat[:, each * parts :])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.parts.shape[:-3], *self.sizes)

    def product(self, equation: str, x: Array) -> Array:
        batch, seq = x.shape[:2]
        parts, each, outputs = self.parts.shape
        flat = x.reshape(batch * seq, math.prod(x.shape[2:]))
        main, rest = jnp.split(flat, [parts * each], axis=-1)
        if batch * seq == 1:
            y = jnp.einsum("pi,pio->po", main.reshape(parts, each), self.parts[...]).sum(axis=0, keepdims=True)
        else:
            y = main @ self.parts[...].reshape(parts * each, outputs)
        if rest.size:
            y = y + rest @ self.rest[...]
        return y.reshape(batch, seq, *sides(self.axes[1:], self.sizes)[1])

    def dense(self) -> Array:
        layers = self.parts.shape[:-3]
        parts, each, outputs = self.parts.shape[-3:]
        flat = self.parts[...].reshape(*layers, parts * each, outputs)
        return jnp.concatenate([flat, self.rest[...]], axis=-2).reshape(self.shape)


class FusedAttention(Attention):
    """Attention whose query, key and value heads are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, attention: Attention, parts: int) -> None:
        layers, embed = attention.query.shape[:2]
        columns = [part[...].reshape(layers, embed, -1) for part in (attention.query, attention.key, attention.value)]
        self.inputs = Shared(("layers", "embed", "heads"), concatenated(columns, axis=-1), parts)
        for name in ("output", "output_bias", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm"):
            setattr(self, name, getattr(attention, name))

    def heads(self, x: Hidden) -> Heads:
        kv_heads, q_per_kv, head_dim, _ = self.output.shape
        columns = product("btd,df->btf", x, self.inputs)
        queries = kv_heads * q_per_kv * head_dim
        own = kv_heads * head_dim
        query, key, value = jnp.split(columns, (queries, queries + own), axis=-1)
        single = (*x.shape[:2], kv_heads, head_dim)
        return query.reshape(*x.shape[:2], kv_heads, q_per_kv, head_dim), key.reshape(single), value.reshape(single)


class FusedMlp(Mlp):
    """Feed-forward block whose gate and up matrices are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, mlp: Mlp, parts: int) -> None:
        columns = concatenated([mlp.gate[...], mlp.up[...]], axis=-1)
        self.inputs = Shared(("layers", "embed", "mlp"), columns, parts)
        self.down = mlp.down
        self.down_bias = mlp.down_bias
        self.router = None

    def halves(self, x: Hidden) -> tuple[Float[Array, "batch seq mlp"], Float[Array, "batch seq mlp"]]:
        gate, up = jnp.split(product("btd,df->btf", x, self.inputs), 2, axis=-1)
        return gate, up


def fused_layers(model: Llama, parts: int | None = None) -> Llama:
    """Return the same function for `prefill` and `decode_steps`: `single_layers`, their matrices fused and shared out.

    A matrix that is not plain (quantised, adapted) stays as it is, and so do those beside it that read the same. For
    decoding only: what reads matrices by name (pruning, saving, compensation) wants the model that this was made of.

    Args:
        model: dense or cut.
        parts: in how many parts inputs are split; None for the number of cores.
    """
    if all(isinstance(segment.attention, FusedAttention) for segment in model.segments):
        return model
    parts = parts or cores()

    def plain(block: nnx.Module, *names: str) -> bool:
        return all(isinstance(getattr(block, name), nnx.Param) for name in names)

    fused = nnx.merge(*nnx.split(single_layers(model)))
    fused.segments = jax.tree.map(read_in_place, fused.segments)
    for segment in fused.segments:
        if plain(segment.attention, "query", "key", "value"):
            segment.attention = FusedAttention(segment.attention, parts)
        if segment.mlp.router is None and plain(segment.mlp, "gate", "up"):
            segment.mlp = FusedMlp(segment.mlp, parts)
        for block, name in ((segment.attention, "output"), (segment.mlp, "down")):
            if plain(block, name):
                matrix = getattr(block, name)
                setattr(block, name, Shared(matrix.axes, matrix[...], parts))
    fused.segments = put_beside(model.embedding[...], fused.segments)
    return fused
