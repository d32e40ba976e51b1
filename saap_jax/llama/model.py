"""The LLaMA decoder with a gate on every prunable unit: one model in three states (dense, masked, cut).

What its relatives have beside LLaMA (`families.FAMILIES`) is optional: biases of query, key and value, norms of query
and key heads and of what sub-blocks write, windows, layers apart. A parameter that a family does not have is None.

Einsum letters: b batch, t query position, s key position, d embed, k kv_heads, g q_per_kv, h head_dim, f mlp,
e experts, c channels of an expert, v vocab. Parameters carry their logical axes, once, where they are created here;
sharding, discovery, surgery and counting read them from there.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from saap_jax.llama.attention import (
    Keys,
    Queries,
    Rotation,
    Seen,
    Sight,
    apart_of,
    at_least_float32,
    attended,
    rotate,
    sight_of,
)
from saap_jax.llama.product import Weight, added, product
from saap_jax.llama.segments import segment_bounds, split_gates
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec
from saap_jax.runtime.constraints import GATHERED, by_example, expert_shards, gathered, in_force
from saap_jax.types import Gates, LayerGates, Remat

Observe = Callable[[str, Array], Any]
"""Maps a point's name and activation to a pytree that the forward pass returns, stacked over layers.

Points: `attention` [batch, seq, kv_heads, q_per_kv, head_dim] and `mlp` [batch, seq, mlp], of a mixture [batch, seq,
experts, channels], the gated activations that enter the output projections; `attention_in`, `attention_out`, `mlp_in`,
`mlp_out` [batch, seq, embed], the residual stream before and after each sub-block; `attention_norms`, `mlp_norms`
[batch, seq, units], the L2 norm of what each unit writes. Before them, where there are gates, `attention_gates` and
`mlp_gates`, of the layer's units.
"""


Hidden = Float[Array, "batch seq embed"]
Heads = tuple[Queries, Keys, Keys]
"""Queries, keys and values of one layer."""


Make = Callable[[tuple[int, ...], int | None], Array]
"""Creates a parameter array of a shape; `fan_in` is None for a normalisation scale."""


def param(axes: tuple[str, ...], value: Array | np.ndarray) -> nnx.Param:
    """Wrap an array as a parameter that carries its logical axis names."""
    return nnx.Param(value, axes=axes)


class Attention(nnx.Module):
    """Grouped-query attention, stacked over the layers of a segment; an output bias only where it was compensated."""

    def __init__(self, layers: int, spec: LlamaSpec, widths: LayerWidths, make: Make) -> None:
        d = spec.embed
        k = widths.kv_heads
        g = widths.q_per_kv
        h = spec.head_dim
        self.query = param(("layers", "embed", "kv_heads", "q_per_kv", "head_dim"), make((layers, d, k, g, h), d))
        self.key = param(("layers", "embed", "kv_heads", "head_dim"), make((layers, d, k, h), d))
        self.value = param(("layers", "embed", "kv_heads", "head_dim"), make((layers, d, k, h), d))
        self.output = param(
            ("layers", "kv_heads", "q_per_kv", "head_dim", "embed"), make((layers, k, g, h, d), max(k * g * h, 1))
        )
        if spec.output_biases:
            self.output_bias = param(("layers", "embed"), make((layers, d), d))
        else:
            self.output_bias = None
        biases = spec.constants.traits.input_biases
        norms = spec.constants.traits.head_norms
        grouped = ("layers", "kv_heads", "q_per_kv", "head_dim")
        single = ("layers", "kv_heads", "head_dim")
        if biases:
            self.query_bias = param(grouped, make((layers, k, g, h), d))
        else:
            self.query_bias = None
        if biases:
            self.key_bias = param(single, make((layers, k, h), d))
        else:
            self.key_bias = None
        if biases:
            self.value_bias = param(single, make((layers, k, h), d))
        else:
            self.value_bias = None
        if norms:
            self.query_norm = param(("layers", "head_dim"), make((layers, h), None))
        else:
            self.query_norm = None
        if norms:
            self.key_norm = param(("layers", "head_dim"), make((layers, h), None))
        else:
            self.key_norm = None

    def heads(self, x: Hidden) -> Heads:
        """Return queries, keys and values of one layer, without biases, norms and positions."""
        query = product("btd,dkgh->btkgh", x, self.query)
        return query, product("bsd,dkh->bskh", x, self.key), product("bsd,dkh->bskh", x, self.value)


class Mlp(nnx.Module):
    """Gated feed-forward block (SwiGLU, GeGLU), stacked over the layers of a segment; or a mixture of such experts."""

    def __init__(self, layers: int, spec: LlamaSpec, widths: LayerWidths, make: Make) -> None:
        d = spec.embed
        experts = widths.channels is not None
        units = ("experts", "channels") if experts else ("mlp",)
        if widths.channels is None:
            inner = (widths.mlp,)
        else:
            inner = (widths.mlp, widths.channels)
        if experts:
            self.router = param(("layers", "embed", "experts"), make((layers, d, widths.mlp), d))
        else:
            self.router = None
        self.gate = param(("layers", "embed", *units), make((layers, d, *inner), d))
        self.up = param(("layers", "embed", *units), make((layers, d, *inner), d))
        self.down = param(("layers", *units, "embed"), make((layers, *inner, d), max(inner[-1], 1)))
        if spec.output_biases:
            self.down_bias = param(("layers", "embed"), make((layers, d), d))
        else:
            self.down_bias = None

    def halves(self, x: Hidden) -> tuple[Float[Array, "batch seq *units"], Float[Array, "batch seq *units"]]:
        """Return x W_gate and x W_up of one layer, `[batch, seq, mlp]` or `[batch, seq, experts, channels]`."""
        if self.router is None:
            equation = "btd,df->btf"
        else:
            equation = "btd,dec->btec"
        return product(equation, x, self.gate), product(equation, x, self.up)


class DecoderLayer(nnx.Module):
    """A segment: neighbouring layers of equal widths, each parameter stacked on a leading `layers` axis."""

    def __init__(self, layers: int, spec: LlamaSpec, widths: LayerWidths, make: Make) -> None:
        self.attention_norm = param(("layers", "embed"), make((layers, spec.embed), None))
        self.attention = Attention(layers, spec, widths, make)
        self.mlp_norm = param(("layers", "embed"), make((layers, spec.embed), None))
        self.mlp = Mlp(layers, spec, widths, make)
        posts = [None, None]
        if spec.constants.traits.post_norms:
            posts = [param(("layers", "embed"), make((layers, spec.embed), None)) for _ in posts]
        self.attention_post_norm, self.mlp_post_norm = posts

    @property
    def length(self) -> int:
        """Number of layers in the segment."""
        return self.attention_norm.shape[0]

    @property
    def widths(self) -> LayerWidths:
        """Sizes of each layer of the segment, read from the arrays."""
        _, kv_heads, q_per_kv, _, _ = self.attention.output.shape
        _, mlp, *channels, _ = self.mlp.down.shape
        return LayerWidths(kv_heads=kv_heads, q_per_kv=q_per_kv, mlp=mlp, channels=channels[0] if channels else None)


class Llama(nnx.Module):
    """A LLaMA-family causal language model; a plain pytree for `jax.jit`, `jax.grad` and `jax.vmap`.

    Its only static part is `constants`: every size is read from the arrays, so nothing goes stale after a cut.

    >>> model(jnp.asarray(windows.tokens)).shape
    (4, 16, 256)
    """

    def __init__(self, spec: LlamaSpec, make: Make) -> None:
        self.constants: Constants = spec.constants
        self.embedding = param(("vocab", "embed"), make((spec.vocab, spec.embed), 1))
        self.segments = nnx.List([DecoderLayer(length, spec, widths, make) for widths, length in spec.segments])
        self.norm = param(("embed",), make((spec.embed,), None))
        if spec.tied:
            self.unembedding = None
        else:
            self.unembedding = param(("embed", "vocab"), make((spec.embed, spec.vocab), spec.embed))

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.segments[0].attention.output.shape[-2]

    @property
    def spec(self) -> LlamaSpec:
        """Sizes and constants, read from the arrays."""
        vocab, embed = self.embedding.shape
        return LlamaSpec(
            vocab=vocab,
            embed=embed,
            head_dim=self.head_dim,
            layers=tuple(segment.widths for segment in self.segments for _ in range(segment.length)),
            tied=self.unembedding is None,
            output_biases=self.segments[0].mlp.down_bias is not None,
            constants=self.constants,
        )

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        gates: Gates | None = None,
        *,
        observe: Observe | None = None,
        remat: Remat = "none",
        sight: Sight | None = None,
        streams: bool = False,
    ) -> tuple[Hidden, list[Any]]:
        """Return the normalised last hidden states and, for each segment, what `observe` made, stacked over its layers;
        with `streams`, instead of that, the residual stream behind each layer.

        `gates` is whole-model, `[layers, units]` or with a leading batch axis; None stands for all ones. `sight` is of
        packed rows.
        """
        if sight is None:
            sight = sight_of(tokens.shape[1], self.head_dim, self.constants)
        bounds = segment_bounds(self.segments)
        x = self.embedded(tokens)
        observed = []
        parts = self.segments, split_gates(gates, bounds), apart_of(self.constants, bounds)

        def layer(x: Array, inputs: tuple[DecoderLayer, LayerGates | None, Any]) -> tuple[Array, Any]:
            z, seen = decode(inputs[0], x, inputs[1], sight.of(inputs[2]), self.constants, observe=observe)
            return z, z if streams else seen

        for part in zip(*parts, strict=True):
            x, seen = jax.lax.scan(rematerialised(layer, remat), x, part)
            observed.append(seen)
        return self.final(x), observed

    def embedded(self, tokens: Int[Array, "batch seq"]) -> Hidden:
        """Embed tokens."""
        x = by_example(gathered(self.embedding)[...][tokens])
        if self.constants.traits.scaled_words:
            return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)
        return x

    def final(self, x: Hidden) -> Hidden:
        """Return the normalised last hidden states from the residual stream behind all layers."""
        return rms_norm(x, self.norm[...], self.constants)

    def logits(self, hidden: Hidden) -> Float[Array, "batch seq vocab"]:
        """Project hidden states onto the vocabulary, accumulated and returned in float32 (at least)."""
        return projected(hidden, self.words(), self.unembedding is None)

    def words(self) -> Float[Array, "vocab embed"] | Float[Array, "embed vocab"]:
        """The matrix that hidden states are projected on: the embedding where that is tied, else `[embed, vocab]`."""
        return gathered(self.embedding if self.unembedding is None else self.unembedding)[...]

    def __call__(self, tokens: Int[Array, "batch seq"], gates: Gates | None = None) -> Float[Array, "batch seq vocab"]:
        """Return next-token logits. Padding goes on the right: attention is causal, so it changes nothing before it."""
        return self.logits(self.hidden(tokens, gates)[0])


def projected(hidden: Hidden, words: Array, tied: bool) -> Float[Array, "batch seq vocab"]:
    """Return logits, float32 (at least), from hidden states and `Llama.words`."""
    equation = "btd,vd->btv" if tied else "btd,dv->btv"
    return jnp.einsum(equation, hidden, words, preferred_element_type=at_least_float32(hidden.dtype))


def decode(
    layer: DecoderLayer,
    x: Hidden,
    gates: LayerGates | None,
    sight: Sight,
    constants: Constants,
    *,
    observe: Observe | None = None,
) -> tuple[Hidden, Any]:
    """Apply one decoder layer (parameters and gates without their `layers` axis), with its own `sight`."""
    layer = gathered(layer)
    normed = rms_norm(x, layer.attention_norm[...], constants)
    middle = attend(layer.attention, normed, sight, constants)
    if gates is not None:
        middle = middle * _per_token(gates["attention"], middle)[..., None, None]
    written = added(product("btkgh,kghd->btd", middle, layer.attention.output), layer.attention.output_bias)
    y = by_example(x + post_normed(written, layer.attention_post_norm, constants))
    gate = None if gates is None else gates["mlp"]
    channels = feed(layer.mlp, rms_norm(y, layer.mlp_norm[...], constants), constants, gate)
    z = by_example(y + post_normed(written_by(layer.mlp, channels), layer.mlp_post_norm, constants))
    if observe is None:
        return z, {}
    points = {"attention_in": x, "attention": middle, "attention_out": y, "mlp_in": y, "mlp": channels, "mlp_out": z}
    writers = {"attention": layer.attention.output, "mlp": layer.mlp.down}
    points |= {f"{name}_norms": written_norms(points[name], matrix) for name, matrix in writers.items()}
    points = {f"{name}_gates": each for name, each in (gates or {}).items()} | points
    return z, {point: observe(point, activation) for point, activation in points.items()}


def written_norms(active: Float[Array, "batch seq units *rest"], matrix: Weight) -> Float[Array, "batch seq units"]:
    """Return the L2 norm of what each unit writes for each token, before a norm behind the sub-block."""
    units = active.shape[2]
    embed = matrix.shape[-1]
    count = math.prod(active.shape[3:])
    rows = active.reshape(*active.shape[:2], units, count)
    own = matrix[...].reshape(units, count, embed)
    if count == 1:
        return jnp.abs(rows[..., 0]) * jnp.linalg.norm(own[:, 0], axis=-1)[None, None]
    return _norms_of_parts(rows, own, expert_shards(matrix.axes, units))


def _norms_of_parts(
    rows: Float[Array, "batch seq units count"], own: Float[Array, "units count embed"], shards: int
) -> Float[Array, "batch seq units"]:
    """Return `written_norms`, one unit at a time; of each part where devices hold parts of the units."""
    if shards <= 1:
        norms = jax.lax.map(lambda unit: jnp.linalg.norm(unit[0] @ unit[1], axis=-1), (jnp.moveaxis(rows, 2, 0), own))
        return jnp.moveaxis(norms, 0, -1)
    each = len(own) // shards
    split_rows = rows.reshape(*rows.shape[:2], shards, each, rows.shape[-1])
    split_own = own.reshape(shards, each, *own.shape[1:])

    def of_units(units: tuple[Array, Array]) -> Array:
        return jnp.linalg.norm(jnp.einsum("btsc,scd->btsd", *units), axis=-1)

    norms = jax.lax.map(of_units, (jnp.moveaxis(split_rows, 3, 0), jnp.moveaxis(split_own, 1, 0)))
    return jnp.moveaxis(norms, 0, -1).reshape(rows.shape[:3])


def attend(attention: Attention, x: Hidden, sight: Sight, constants: Constants) -> Queries:
    """Attention of whole rows up to, not including, the output projection; by the path of `attention.attending`."""
    assert isinstance(sight.seen, Seen)
    query, key, value = project(attention, x, sight.rotation, constants)
    return attended(query, key, value, sight.seen, (constants.query_scalar or query.shape[-1]) ** -0.5)


def project(attention: Attention, x: Hidden, rotation: Rotation, constants: Constants) -> Heads:
    """Return queries, keys and values; queries and keys normalised, if they have norms, and turned to positions."""
    query, key, value = attention.heads(x)
    query = added(query, attention.query_bias)
    key = added(key, attention.key_bias)
    if attention.query_norm is not None and attention.key_norm is not None:
        query = rms_norm(query, attention.query_norm[...], constants)
        key = rms_norm(key, attention.key_norm[...], constants)
    return rotate(query, rotation), rotate(key, rotation), added(value, attention.value_bias)


def feed(
    mlp: Mlp, x: Hidden, constants: Constants, gates: Float[Array, "*_rows units"] | None = None
) -> Float[Array, "batch seq *units"]:
    """Activations that enter the down projection: silu(x W_gate) * (x W_up), or with GELU, times the gates of units.

    Of a mixture `[batch, seq, experts, channels]`, those of each expert times its `routes`. All experts are computed
    for all tokens.
    """
    left, up = mlp.halves(x)
    active = ACTIVATIONS[constants.traits.activation](left) * up
    gates = None if gates is None else _per_token(gates, x)
    if mlp.router is None:
        return active if gates is None else active * gates
    scores = product("btd,de->bte", x, mlp.router)
    return active * routes(scores, gates, constants)[..., None]


def routes(
    scores: Float[Array, "batch seq experts"], gates: Float[Array, "_rows 1 experts"] | None, constants: Constants
) -> Float[Array, "batch seq experts"]:
    """Return the weight of each expert for each token: 0 but for the `experts_per_token` with the highest scores.

    Weights are those of a softmax over all experts, perhaps divided by their sum, in float32 (at least), then times the
    gates. A token is not routed to an expert whose gate is 0: the others share it, as if that one were not there.
    Source: Qwen3-MoE and Mixtral, as in transformers.
    """
    wide = at_least_float32(scores.dtype)
    open_scores = scores.astype(wide)
    if gates is not None:
        open_scores = jnp.where(gates == 0, jnp.finfo(wide).min, open_scores)
    shares = jax.nn.softmax(open_scores, axis=-1)
    count = min(constants.experts_per_token or 1, scores.shape[-1])
    if not count:
        return scores
    _, chosen = jax.lax.top_k(open_scores, count)
    taken = jnp.sum(jax.nn.one_hot(chosen, scores.shape[-1], dtype=wide), axis=-2) * shares
    if constants.route_scale == "sum_to_one":
        taken = taken / jnp.sum(taken, axis=-1, keepdims=True)
    weights = taken.astype(scores.dtype)
    if gates is None:
        return weights
    return weights * gates


def written_by(mlp: Mlp, active: Float[Array, "batch seq *units"]) -> Hidden:
    """Multiply by the MLP's output matrix of one layer, from the activations of `feed`."""
    flat = active.reshape(*active.shape[:2], math.prod(active.shape[2:]))
    return added(product("btf,fd->btd", flat, mlp.down), mlp.down_bias)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
"""By the name in transformers."""


def rms_norm(
    x: Float[Array, "batch seq *heads width"], scale: Float[Array, "width"], constants: Constants
) -> Float[Array, "batch seq *heads width"]:
    """Root-mean-square normalisation along the last axis, in float32 (at least), returned in the dtype of `x`."""
    wide = x.astype(at_least_float32(x.dtype))
    offset = constants.traits.norm_offset
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + constants.norm_eps)
    scale = scale[(None,) * (x.ndim - 1)]
    if offset:
        return (normed * (scale.astype(wide.dtype) + offset)).astype(x.dtype)
    return normed.astype(x.dtype) * scale


def post_normed(written: Hidden, scale: nnx.Param | None, constants: Constants) -> Hidden:
    """Normalise the output of a sub-block where the family does so."""
    if scale is None:
        return written
    return rms_norm(written, scale[...], constants)


def random_llama(spec: LlamaSpec, key: Array, dtype: Any = jnp.float32) -> Llama:
    """Return a model with normal weights of variance 1/fan_in and unit norm scales, for tests and planning."""
    count = iter(range(10**9))

    def make(shape: tuple[int, ...], fan_in: int | None) -> Array:
        if fan_in is None:
            return jnp.ones(shape, dtype)
        return jax.random.normal(jax.random.fold_in(key, next(count)), shape, dtype) * fan_in**-0.5

    return Llama(spec, make)


def abstract_llama(spec: LlamaSpec, dtype: Any = jnp.float32) -> Llama:
    """Return the model with `jax.ShapeDtypeStruct` leaves: axis names and shapes without memory."""
    return nnx.eval_shape(lambda: Llama(spec, lambda shape, fan_in: jnp.zeros(shape, dtype)))


def _per_token(gate: Float[Array, "*_rows units"], activation: Array) -> Array:
    """Broadcast a gate over the tokens: `[1 or batch, 1, units]` in the activation's dtype."""
    return (gate if gate.ndim == 2 else gate[None]).astype(activation.dtype)[:, None]


def rematerialised(layer: Callable, remat: Remat) -> Callable:
    """Return a layer whose backward pass recomputes what `remat` says."""
    policies = jax.checkpoint_policies
    if remat == "none" and not in_force():
        return layer
    known = {
        "none": policies.save_anything_except_these_names(GATHERED),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": None,
    }
    if remat not in known:
        raise ValueError(f"remat: expected 'none', 'dots' or 'full', got {remat!r}")
    return jax.checkpoint(layer, prevent_cse=False, policy=known[remat])
