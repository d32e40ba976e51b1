"""Small models that have never heard of this library, as `function(params, *inputs)`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.interpret import gated


@dataclasses.dataclass(frozen=True)
class Example:
    """A model, and shapes of its parameters and inputs."""

    function: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]


def removed_shapes(traced, members) -> dict[str, tuple[int, ...]]:
    """Tell the shape of each parameter when one unit of some members of a structure is removed."""
    shapes = {path: list(shape) for path, shape in traced.shapes.items()}
    for member in members:
        shapes[member.path][member.axis] -= len({index for place in member.places for index in place.indices(0)})
    return {path: tuple(shape) for path, shape in shapes.items()}


def masked_as_cut(traced, keep, params, *inputs, run=None, own=(), atol=1e-4):
    """Mask units by gates; the smaller program, and functions of their owner's, give the same from smaller parameters.

    Returns the outputs; `run` is the gated program, compiled.
    """
    run = run or jax.jit(gated(traced))
    masked = run({name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}, params, *inputs)
    less = keep_units(traced, keep, params)
    for after in jax.jit(lambda *given: [each(*given) for each in (smaller(traced, keep), *own)])(less, *inputs):
        np.testing.assert_allclose(masked, after, rtol=1e-4, atol=atol, err_msg=", ".join(keep))
    return masked


def all_ones(structures) -> dict[str, jax.Array]:
    """Make the gates of the dense model."""
    return {structure.name: jnp.ones((*structure.copied, structure.units)) for structure in structures}


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def drawn(*shape: int, seed: Any = 0) -> jax.Array:
    """Draw normal numbers by a seed, or by a generator that goes on."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: floats(*shape) for name, shape in sizes.items()}


def affine(x, w, b):
    y = jnp.tensordot(x, w, 1)
    return y + b.reshape((1,) * (y.ndim - 1) + (-1,))


def layer_norm(x, scale, bias):
    ones = (1,) * (x.ndim - 1) + (-1,)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale.reshape(
        ones
    ) + bias.reshape(ones)


def attend(q, k, v, causal=False):
    scores = jnp.einsum("bthe,bshe->bhts", q, k) * 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores), v)


def gpt2(heads: int, params, tokens):
    x = params["tokens"][tokens] + params["positions"][None, : tokens.shape[1]]
    h = affine(layer_norm(x, params["scale1"], params["bias1"]), params["fused"], params["fused_bias"])
    q, k, v = (part.reshape(*part.shape[:2], heads, -1) for part in jnp.split(h, 3, -1))
    y = attend(q, k, v, causal=True)
    x = x + affine(y.reshape(*y.shape[:2], -1), params["out"], params["out_bias"])
    h = jax.nn.gelu(affine(layer_norm(x, params["scale2"], params["bias2"]), params["up"], params["up_bias"]))
    x = x + affine(h, params["down"], params["down_bias"])
    return jnp.einsum("btd,vd->btv", x, params["tokens"])


def gpt2_block() -> Example:
    d, f, heads, width = 10, 14, 3, 4
    params = shapes(
        tokens=(30, d), positions=(8, d), scale1=(d,), bias1=(d,), fused=(d, 3 * heads * width),
        fused_bias=(3 * heads * width,), out=(heads * width, d), out_bias=(d,), scale2=(d,), bias2=(d,), up=(d, f),
        up_bias=(f,), down=(f, d), down_bias=(d,),
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return Example(functools.partial(gpt2, heads), params, (tokens,))


def phi(q_per_kv: int, width: int, params, x):
    fused = jnp.einsum("btd,dn->btn", x, params["fused"])
    kv_heads = fused.shape[-1] // width // (q_per_kv + 2)
    q, k, v = jnp.split(fused, [kv_heads * q_per_kv * width, kv_heads * (q_per_kv + 1) * width], -1)
    q = q.reshape(*q.shape[:2], kv_heads, q_per_kv, width)
    k, v = (part.reshape(*part.shape[:2], kv_heads, width) for part in (k, v))
    weights = jax.nn.softmax(jnp.einsum("btkge,bske->bkgts", q, k))
    y = jnp.einsum("bkgts,bske->btkge", weights, v)
    x = x + jnp.einsum("btn,nd->btd", y.reshape(*y.shape[:2], -1), params["out"])
    gate, up = jnp.split(jnp.einsum("btd,df->btf", x, params["gate_up"]), 2, -1)
    return jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, params["down"])


def phi_block() -> Example:
    d, f, kv_heads, q_per_kv, width = 10, 14, 3, 2, 4
    params = shapes(
        fused=(d, kv_heads * (q_per_kv + 2) * width),
        out=(kv_heads * q_per_kv * width, d),
        gate_up=(d, 2 * f),
        down=(f, d),
    )
    return Example(functools.partial(phi, q_per_kv, width), params, (floats(2, 5, d),))


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(x, norm):
    mean, variance, scale, bias = (norm[name][None, None, None] for name in ("mean", "variance", "scale", "bias"))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def resnet(params, images):
    x = jax.nn.relu(batch_norm(conv(images, params["stem"]), params["norm0"]))
    h = jax.nn.relu(batch_norm(conv(x, params["conv1"]), params["norm1"]))
    x = jax.nn.relu(x + batch_norm(conv(h, params["conv2"]), params["norm2"]))
    down = jax.nn.relu(batch_norm(conv(x, params["conv3"], 2), params["norm3"]))
    x = down + conv(x, params["shortcut"], 2)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.einsum("bc,cn->bn", x.mean((1, 2)), params["head"])


def convnet() -> Example:
    norm = lambda c: shapes(mean=(c,), variance=(c,), scale=(c,), bias=(c,))  # noqa: E731
    params = shapes(
        stem=(3, 3, 3, 6),
        conv1=(3, 3, 6, 8),
        conv2=(3, 3, 8, 6),
        conv3=(3, 3, 6, 9),
        shortcut=(1, 1, 6, 9),
        head=(9, 4),
    )
    params |= {"norm0": norm(6), "norm1": norm(8), "norm2": norm(6), "norm3": norm(9)}
    return Example(resnet, params, (floats(2, 8, 8, 3),))


def mixture(params, x):
    probabilities = jax.nn.softmax(jnp.einsum("btd,de->bte", x, params["router"]))
    least = jax.lax.top_k(probabilities, 2)[0][..., -1:]
    weights = jnp.where(probabilities >= least, probabilities, 0.0)
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, params["up"]))
    return jnp.einsum("btef,efd,bte->btd", h, params["down"], weights)


def moe() -> Example:
    return Example(mixture, shapes(router=(5, 4), up=(4, 5, 7), down=(4, 7, 5)), (floats(2, 3, 5),))


def translate(params, source, target):
    memory = affine(
        jax.nn.relu(affine(source, params["enc_up"], params["enc_up_bias"])), params["enc"], params["enc_bias"]
    )
    q = jnp.einsum("btd,dhe->bthe", target, params["query"])
    k, v = (jnp.einsum("bsd,dhe->bshe", memory, params[name]) for name in ("key", "value"))
    x = target + jnp.einsum("bthe,hed->btd", attend(q, k, v), params["out"])
    return jnp.einsum("btd,dn->btn", x, params["head"])


def cross_attention() -> Example:
    heads, width = 3, 4
    params = shapes(
        enc_up=(8, 9), enc_up_bias=(9,), enc=(9, 10), enc_bias=(10,), query=(7, heads, width), key=(10, heads, width),
        value=(10, heads, width), out=(heads, width, 7), head=(7, 5),
    )  # fmt: skip
    return Example(translate, params, (floats(2, 6, 8), floats(2, 4, 7)))


def unrolled(params, x):
    @jax.checkpoint
    def layer(x, layer):
        return x + jnp.einsum("bf,fd->bd", jax.nn.relu(jnp.einsum("bd,df->bf", x, layer["up"])), layer["down"])

    x = jnp.einsum("bn,nd->bd", x, params["in"])
    for each in params["layers"]:
        x = layer(x, each)
    x, _ = jax.lax.scan(lambda x, each: (layer(x, each), None), x, params["stacked"])
    x = jax.lax.cond(x.sum() > 0, jnp.sin, lambda x: x * params["scale"][None], x)
    x = jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)
    return jnp.einsum("bd,dn->bn", x, params["out"])


def control_flow() -> Example:
    params = {
        **shapes(out=(6, 4), scale=(6,)),
        "in": floats(5, 6),
        "layers": [shapes(up=(6, n), down=(n, 6)) for n in (7, 8)],
        "stacked": shapes(up=(3, 6, 9), down=(3, 9, 6)),
    }
    return Example(unrolled, params, (floats(2, 5),))


def state_space(params, x):
    h, z = jnp.split(jnp.einsum("btd,dn->btn", x, params["in"]), 2, -1)
    decay, b = jnp.exp(-jnp.exp(params["decay"])), jnp.einsum("btn,ns->bts", h, params["write"])

    def step(state, row):
        state = state * decay[None] + row[0][:, :, None] * row[1][:, None, :]
        return state, state.sum(-1)

    state = jnp.zeros((x.shape[0], *decay.shape))
    _, y = jax.lax.scan(step, state, (h.swapaxes(0, 1), b.swapaxes(0, 1)))
    return jnp.einsum("btn,nd->btd", y.swapaxes(0, 1) * jax.nn.silu(z) * params["skip"][None, None], params["out"])


def mamba() -> Example:
    params = {"in": floats(8, 12), **shapes(decay=(6, 3), write=(6, 3), skip=(6,), out=(6, 8))}
    return Example(state_space, params, (floats(2, 5, 8),))


def repeated(params, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in ("query", "key", "value"))
    angle = jnp.arange(q.shape[1], dtype=jnp.float32)[:, None] * jnp.arange(q.shape[3] // 2, dtype=jnp.float32)[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]

    def rotate(x):
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

    k, v = jnp.repeat(rotate(k), 2, axis=2), jnp.repeat(v, 2, axis=2)
    return jnp.einsum("bthe,hed->btd", attend(rotate(q), k, v, causal=True), params["out"])


def repeated_heads() -> Example:
    params = shapes(query=(8, 6, 4), key=(8, 3, 4), value=(8, 3, 4), out=(6, 4, 7))
    return Example(repeated, params, (floats(2, 5, 8),))  # two query heads a key head, by number


class NnxDecoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(30, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, qkv_features=12, decode=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 20, rngs=rngs)
        self.down = nnx.Linear(20, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens))
        x = x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))
        return self.embed.attend(x)


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.group_norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.second = nnx.Conv(8, 6, (1, 1), rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = self.group_norm(self.depthwise(nnx.relu(self.batch_norm(self.first(x)))))
        x = nnx.relu(self.second(nnx.max_pool(x, (2, 2), strides=(2, 2))))
        return self.head(x.mean((1, 2)))


def nnx_example(kind: type[nnx.Module], *inputs: jax.ShapeDtypeStruct) -> Example:
    model = nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)

    def function(params, *inputs):
        return nnx.merge(graph, params, rest)(*inputs)

    return Example(function, params, inputs)


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = x + linen.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)(linen.LayerNorm()(x))
        return x + linen.Dense(x.shape[-1])(linen.gelu(linen.Dense(20)(linen.LayerNorm()(x)))), None


class LinenEncoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(16)(x)
        layers = linen.scan(linen.remat(LinenLayer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = linen.Conv(8, (3,))(layers()(x, None)[0])
        return linen.Dense(5)(linen.RNN(linen.LSTMCell(10))(x))


def linen_encoder() -> Example:
    x = floats(2, 7, 6)
    return Example(LinenEncoder().apply, jax.eval_shape(LinenEncoder().init, jax.random.key(0), x), (x,))


EXAMPLES = {
    "gpt2": gpt2_block,
    "phi": phi_block,
    "convnet": convnet,
    "moe": moe,
    "cross_attention": cross_attention,
    "control_flow": control_flow,
    "mamba": mamba,
    "repeated_heads": repeated_heads,
    "nnx_decoder": lambda: nnx_example(NnxDecoder, jax.ShapeDtypeStruct((2, 7), jnp.int32)),
    "nnx_cnn": lambda: nnx_example(NnxCnn, floats(2, 8, 8, 3)),
    "linen_encoder": linen_encoder,
}
