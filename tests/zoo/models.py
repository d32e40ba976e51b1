"""Models of other libraries in tiny configurations: a problem of each, and what an expert counts in it.

A structure is (role, units, copies); copies are layers, experts or heads of one array. Models that the libraries build
from a configuration are built by them; nothing here knows how they compute.
"""

import dataclasses
import functools
import importlib
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.trace.adapters import from_equinox, from_haiku, from_keras, from_linen, from_nnx
from saap_jax.trace.own_code import nearby
from saap_jax.trace.problem import Problem
from tests.models_for_tracing import drawn
from tests.trace.subject.problems import square

COUNT = 4
"""Examples of calibration, and as many held out."""


@dataclasses.dataclass(frozen=True)
class Animal:
    """A model and what is to be found in it."""

    problem: Problem
    structures: str
    """Prunable ones that no norm averages over: how many of a role, with how many units x copies."""
    takes: str = ""
    """Role and units of those of which the library's own code takes fewer."""
    other: Callable[[int], Any] | None = None
    """Inputs of another length (or size of images), of so many examples."""
    statistics: str = "batch_stats|moving_|^1/"
    """What of the parameters' paths (a pattern) is not trained: statistics of batch norm, state beside parameters."""


def tokens(count: int, length: int, vocabulary: int = 13, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, (count, length)), jnp.int32)


def next_token(logits: Any, targets: Any) -> Any:
    logits = jnp.asarray(logits, jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), targets[:, 1:, None], -1).mean()


def shaken(problem: Problem) -> Problem:
    """Make a problem with values near the initial ones: of heads that begin with zeros, nothing is seen."""
    return dataclasses.replace(problem, params=nearby(problem.params))


def of_tokens(length: int = 6) -> dict[str, Any]:
    parts = [tokens(COUNT, length, seed=seed) for seed in (1, 2)]
    return {"loss": next_token, "calibration": (parts[0], parts[0]), "held_out": (parts[1], parts[1])}


def of_arrays(inputs: tuple[int, ...], targets: tuple[int, ...]) -> dict[str, Any]:
    parts = [(drawn(COUNT, *inputs, seed=s), drawn(COUNT, *targets, seed=s + 5)) for s in (1, 2)]
    return {"loss": square, "calibration": parts[0], "held_out": parts[1]}


def causal(model: Any, tokens: Any) -> Any:
    """Call a model of Tunix: positions and a causal mask, no cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)), (*tokens.shape, tokens.shape[1]))
    return model(tokens, positions, None, mask)


# --- Tunix: weights are [embed, heads, width], layers are unrolled --------------------------------


def tunix(module: str, kind: str, structures: str = "", takes: str = "", **further: Any) -> Animal:
    from flax import nnx

    library = importlib.import_module(f"tunix.models.{module}.model")
    config = {"num_layers": 2, "vocab_size": 13, "embed_dim": 8, "hidden_dim": 12, "num_heads": 4, "head_dim": 6}
    config |= {"num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5} | further
    config = {name: value for name, value in config.items() if value is not None}
    usual = "N heads 2x1, N query heads 2x1, N head width 6x1, N channels 12x1".replace("N", str(config["num_layers"]))
    return Animal(
        from_nnx(getattr(library, kind)(library.ModelConfig(**config), rngs=nnx.Rngs(0)), call=causal, has_aux=True,
                 **of_tokens()),
        structures or usual,
        takes or "heads 2, query heads 2, channels 12",
        lambda count: tokens(count, 9),
    )  # fmt: skip


def tunix_llama() -> Animal:
    return tunix("llama3", "Llama3")


def tunix_qwen2() -> Animal:
    return tunix("qwen2", "Qwen2")


def tunix_qwen3_moe() -> Animal:
    return tunix("qwen3", "Qwen3", num_layers=1, num_experts=4, num_experts_per_tok=2)


def tunix_gemma() -> Animal:
    from tunix.models.gemma.model import AttentionType

    return tunix(
        "gemma", "Gemma", "2 query heads 4x1, 2 channels 12x1", "query heads 4, channels 12", num_kv_heads=1,
        vocab_size=None, num_embed=13, rope_theta=None, norm_eps=None, final_logit_softcap=30.0,
        attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL), use_post_attn_norm=True,
        use_post_ffw_norm=True, sliding_window_size=4, attn_logits_soft_cap=50.0,
    )  # fmt: skip


# --- Equinox -------------------------------------------------------------------------------------


def equinox_attention() -> Animal:
    """A vision transformer's encoder of Equinox's parts: flat projections, reshaped by a number of heads."""
    import equinox

    keys = jax.random.split(jax.random.key(0), 4)

    class Block(equinox.Module):
        norm: equinox.nn.LayerNorm
        attention: equinox.nn.MultiheadAttention
        mlp: equinox.nn.MLP
        dropout: equinox.nn.Dropout
        head: equinox.nn.Linear

        def __call__(self, x):
            h = jax.vmap(self.norm)(x)
            x = x + self.attention(h, h, h)
            x = x + self.dropout(jax.vmap(self.mlp)(x))
            return jax.vmap(self.head)(x)

    model = Block(
        equinox.nn.LayerNorm(8),
        equinox.nn.MultiheadAttention(4, 8, qk_size=4, vo_size=4, key=keys[0]),
        equinox.nn.MLP(8, 8, 12, 1, key=keys[1]),
        equinox.nn.Dropout(0.5),
        equinox.nn.Linear(8, 3, key=keys[2]),
    )
    return Animal(
        from_equinox(model, **of_arrays((6, 8), (6, 3))),
        "1 heads 4x1, 2 head width 4x1, 1 channels 12x1",
        "channels 12, head width 4",
        lambda count: drawn(count, 9, 8),
    )


def equinox_conv() -> Animal:
    """Convolutions with batch norm: a stateful model."""
    import equinox

    class Network(equinox.Module):
        first: equinox.nn.Conv2d
        norm: equinox.nn.BatchNorm
        second: equinox.nn.Conv2d
        head: equinox.nn.Linear

        def __call__(self, x, state):
            x, state = self.norm(self.first(x), state)
            x = jax.nn.relu(self.second(jax.nn.relu(x)))
            return self.head(x.mean((1, 2))), state

    keys = jax.random.split(jax.random.key(0), 3)

    def make():
        return Network(
            equinox.nn.Conv2d(3, 8, 3, key=keys[0]),
            equinox.nn.BatchNorm(8, "batch", mode="ema"),
            equinox.nn.Conv2d(8, 6, 3, key=keys[1]),
            equinox.nn.Linear(6, 4, key=keys[2]),
        )

    model, state = equinox.nn.make_with_state(make)()
    return Animal(
        shaken(from_equinox(model, state=state, **of_arrays((3, 8, 8), (4,)))),
        "1 channels 8x1, 1 channels 6x1",
        "channels 8, channels 6",
        lambda count: drawn(count, 3, 11, 9),
    )


# --- Haiku ---------------------------------------------------------------------------------------


def haiku_resnet() -> Animal:
    import haiku

    def network(x, is_training):
        net = haiku.nets.ResNet(
            (1, 1, 1, 1), 4, bottleneck=True, channels_per_group=(16, 16, 32, 32), resnet_v2=False,
            strides=(1, 2, 2, 2),
        )  # fmt: skip
        return net(x, is_training)

    transformed = haiku.transform_with_state(network)
    params, state = transformed.init(jax.random.key(0), drawn(2, 16, 16, 3), True)
    given = {"arguments": {"is_training": False}, **of_arrays((16, 16, 3), (4,))}
    return Animal(
        shaken(from_haiku(transformed, params, state=state, **given)),
        "4 channels 4x1, 4 channels 8x1, 1 channels 64x1, 2 stream 16x1, 1 stream 32x1, 1 channels 32x1",
        other=lambda count: drawn(count, 24, 20, 3),
    )


def haiku_transformer() -> Animal:
    import haiku

    def network(x):
        h = haiku.LayerNorm(-1, True, True)(x)
        attention = haiku.MultiHeadAttention(4, 4, w_init=haiku.initializers.VarianceScaling(1.0), model_size=8)
        x = x + attention(h, h, h)
        x = x + haiku.Linear(8)(jax.nn.gelu(haiku.Linear(12)(x)))
        return haiku.Linear(3)(x)

    transformed = haiku.transform(network)
    params = transformed.init(jax.random.key(0), drawn(2, 6, 8))
    return Animal(
        from_haiku(transformed, params, **of_arrays((6, 8), (6, 3))),
        "1 heads 4x1, 2 head width 4x1, 1 channels 12x1",
        other=lambda count: drawn(count, 9, 8),
    )


# --- Penzai --------------------------------------------------------------------------------------


def penzai_language_model(build: Callable[..., Any], config: Any) -> Problem:
    from penzai import pz

    model = build(config, init_base_rng=jax.random.key(0))
    frozen, variables = pz.unbind_variables(model, freeze=True)

    def function(params: Any, tokens: Any) -> Any:
        built = pz.bind_variables(
            frozen, [dataclasses.replace(each, value=params[str(each.label)]) for each in variables]
        )
        batch = pz.nx.wrap(tokens).tag("batch", "seq")
        positions = pz.nx.arange("seq", tokens.shape[1])
        return built(batch, token_positions=positions).unwrap("batch", "seq", "vocabulary")

    return Problem(function=function, params={str(each.label): each.value for each in variables}, **of_tokens())


def penzai_llama() -> Animal:
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=8, projection_dim=6, mlp_hidden_dim=12,
        num_decoder_blocks=2, vocab_size=13, mlp_variant="swiglu", tie_embedder_and_logits=False,
    )  # fmt: skip
    problem = penzai_language_model(llamalike_common.build_llamalike_transformer, config)
    return Animal(
        problem,
        "2 heads 2x1, 2 query heads 2x1, 2 head width 6x2, 2 channels 12x1",
        other=lambda count: tokens(count, 9),
    )


def penzai_neox() -> Animal:
    from penzai.models.transformer.variants import gpt_neox

    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=4, embedding_dim=16, projection_dim=4, mlp_hidden_dim=12, num_decoder_blocks=2,
        vocab_size=13, activation_fn="gelu_exact", rope_subset_size=2, rope_wavelength=10_000, layernorm_epsilon=1e-5,
        parameter_dtype=jnp.float32, activation_dtype=jnp.float32,
    )  # fmt: skip
    return Animal(
        penzai_language_model(gpt_neox.build_gpt_neox_transformer, config),
        "2 heads 4x1, 2 head width 4x4, 2 channels 12x1",
        other=lambda count: tokens(count, 9),
    )


# --- flaxmodels ----------------------------------------------------------------------------------


def flaxmodels_gpt2() -> Animal:
    from flax import linen
    from flaxmodels.gpt2.gpt2 import GPT2Block

    config = types.SimpleNamespace(
        vocab_size=13, n_positions=16, n_embd=8, n_layer=2, n_head=4, n_inner=12, embd_pdrop=0.1, attn_pdrop=0.1,
        resid_pdrop=0.1, layer_norm_epsilon=1e-5, scale_attn_weights=True, activation_function="gelu_new", n_ctx=16,
        initializer_range=0.02,
    )  # fmt: skip

    class Blocks(linen.Module):
        """The library's blocks between embeddings: its whole model calls `jnp.reshape` as jax no longer knows it."""

        @linen.compact
        def __call__(self, tokens, training: bool):
            embed = linen.Embed(13, 8)
            x = embed(tokens)
            for _ in range(2):
                x, _ = GPT2Block(config)(x, training=training)
            return embed.attend(x)

    module = Blocks()
    variables = module.init(jax.random.key(0), tokens(1, 6), training=False)
    problem = from_linen(module, variables, **of_tokens())
    return Animal(
        problem,
        "2 heads 4x1, 2 head width 2x1, 2 channels 12x1",
        other=lambda count: tokens(count, 9),
    )


def flaxmodels_resnet() -> Animal:
    import flaxmodels

    module = flaxmodels.ResNet18(output="logits", pretrained=None, normalize=True, num_classes=4)
    variables = module.init(jax.random.key(0), drawn(1, 32, 32, 3), train=False)
    problem = from_linen(module, variables, **of_arrays((32, 32, 3), (4,)))
    return Animal(
        problem,
        ", ".join(f"1 stream {width}x1, 2 channels {width}x1" for width in (64, 128, 256, 512)),
        other=lambda count: drawn(count, 40, 36, 3),
    )


# --- Keras ---------------------------------------------------------------------------------------


def keras_transformer() -> Animal:
    import keras

    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(13, 8)(inputs)
    h = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(4, 6, dropout=0.1)(h, h, use_causal_mask=True)
    x = x + keras.layers.Dense(8)(keras.layers.Dense(12, activation="gelu")(x))
    model = keras.Model(inputs, keras.layers.Dense(13)(keras.layers.Dropout(0.5)(x)))
    return Animal(
        from_keras(model, **of_tokens()),
        "1 heads 4x1, 2 head width 6x4, 1 channels 12x1",
        other=lambda count: tokens(count, 9),
    )


def keras_mobilenet() -> Animal:
    import keras

    model = keras.applications.MobileNet(
        input_shape=(32, 32, 3), alpha=0.25, weights=None, classes=4, classifier_activation=None
    )
    return Animal(
        shaken(from_keras(model, **of_arrays((32, 32, 3), (4,)))),
        "1 channels 8x1, 1 channels 16x1, 2 channels 32x1, 2 channels 64x1, 6 channels 128x1, 2 channels 256x1",
    )


ZOO: dict[str, Callable[[], Animal]] = {
    function.__name__: functools.cache(function)
    for function in (
        tunix_llama, tunix_qwen2, tunix_qwen3_moe, tunix_gemma, equinox_attention, equinox_conv, haiku_resnet,
        haiku_transformer, penzai_llama, penzai_neox, flaxmodels_gpt2, flaxmodels_resnet, keras_transformer,
        keras_mobilenet,
    )
}  # fmt: skip


def counted(structures: Any) -> set[str]:
    """Count the structures of each role, number of units and of copies."""
    found = Counter(f"{each.role} {each.units}x{each.copies}" for each in structures)
    return {f"{count} {each}" for each, count in found.items()}
