"""Tiny models, and a second implementation of them in numpy to compare with."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saap_jax.estimation.registry import STATISTICS
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec
from saap_jax.structures.discovery import parameters_by_path
from saap_jax.types import PRUNABLE_AXES, Keep

VOCAB = 24
HEADS = {"mha": (4, 1), "gqa": (2, 2), "mqa": (1, 4)}
"""(kv_heads, q_per_kv) of each kind of attention; four query heads."""

RELATIVES = {
    "qwen2": Constants(family="qwen2"),
    "mistral": Constants(family="mistral", sliding_window=3),
    "qwen3": Constants(family="qwen3"),
    "phi3": Constants(family="phi3", sliding_window=4),
    "gemma3_text": Constants(
        family="gemma3_text",
        rope_theta=1_000_000.0,
        query_scalar=7,
        apart=Apart(layers=(0,), sliding_window=3, rope_theta=100.0),
    ),
    "qwen3_moe": Constants(family="qwen3_moe", experts_per_token=2, route_scale="kept"),
    "mixtral": Constants(family="mixtral", experts_per_token=2),
}
"""What is not LLaMA, with windows that a short text is longer than."""

PLAIN = frozenset(statistic for statistic in STATISTICS.values() if statistic.objective == "loss")
"""The statistics of one backward pass and of the gate Hessian; those of other objectives take a pass each."""

forward = jax.jit(lambda model, tokens, gates=None: model(tokens, gates))
losses_of = jax.jit(lambda model, tokens, mask, gates=None: next_token_losses(model, tokens, mask, gates)[0])


def spec_of(*widths: tuple[int, int], q_per_kv: int = 2, tied: bool = False, **constants) -> LlamaSpec:
    """Return a small spec with the given (kv_heads, mlp) of each layer; of a mixture, experts of three channels."""
    channels = 3 if constants.get("constants", Constants()).traits.experts else None
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=q_per_kv, mlp=mlp, channels=channels) for heads, mlp in widths)
    return LlamaSpec(vocab=VOCAB, embed=8, head_dim=4, layers=layers, tied=tied, **constants)


def random_model(spec: LlamaSpec, seed: int = 0, dtype=np.float32) -> Llama:
    """Return a model of random numbers, norm scales too; drawn by numpy, because each of jax's draws compiles."""
    random = np.random.default_rng(seed)

    def make(shape: tuple[int, ...], fan_in: int | None) -> jax.Array:
        draw = random.standard_normal(shape)
        return jnp.asarray(1 + 0.2 * draw if fan_in is None else draw * fan_in**-0.5, dtype)

    return Llama(spec, make)


def dense_model(
    heads: str = "gqa", layers: int = 2, mlp: int = 6, tied: bool = False, output_biases: bool = False, **options
) -> Llama:
    """Return a random model whose layers are all alike."""
    kv_heads, q_per_kv = HEADS[heads]
    spec = spec_of(*[(kv_heads, mlp)] * layers, q_per_kv=q_per_kv, tied=tied, output_biases=output_biases)
    return random_model(spec, **options)


def ragged_model(**options) -> Llama:
    """Return a random model as after a cut: three runs, a layer without attention."""
    return random_model(spec_of((2, 6), (2, 6), (1, 3), (0, 5)), **options)


def relative(family: str, *widths: tuple[int, int], **options) -> Llama:
    """Return a random model of a family of `RELATIVES`; of two equal layers unless (kv_heads, mlp) are given."""
    return random_model(spec_of(*(widths or ((2, 6), (2, 6))), constants=RELATIVES[family]), **options)


def random_tokens(batch: int, seq: int, seed: int = 0) -> np.ndarray:
    """Return tokens, int32 [batch, seq]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, seq), np.int32)


def length_mask(*lengths: int, seq: int) -> np.ndarray:
    """Return the mask of examples of the given lengths, bool [batch, seq]."""
    return np.arange(seq) < np.asarray(lengths)[:, None]


def changed(model: Llama, path: str, function: Callable) -> Llama:
    """Return a copy whose parameter at a path (`segments/0/mlp/down`) is `function` of its array."""
    assert path in parameters_by_path(model)

    def change(key, parameter):
        here = jax.tree_util.keystr(key, simple=True, separator="/")
        value = function(parameter[...]) if here == path else parameter[...]
        return nnx.Param(value, axes=parameter.axes)

    return jax.tree_util.tree_map_with_path(change, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def permuted(model: Llama, order: dict[str, np.ndarray]) -> Llama:
    """Return the same function of tokens with the units of a one-run model in another order, [layers, units]."""
    for path, parameter in parameters_by_path(model).items():
        for position, axis in enumerate(parameter.axes):
            if axis in PRUNABLE_AXES:
                rows = order[PRUNABLE_AXES[axis]]

                def reorder(value, rows=rows, position=position):
                    return jnp.stack([jnp.take(v, r, axis=position - 1) for v, r in zip(value, rows, strict=True)])

                model = changed(model, path, reorder)
    return model


def random_keep(existing: Keep, share: float, seed: int = 0) -> Keep:
    """Keep about `share` of the units, at random."""
    random = np.random.default_rng(seed)
    return {name: units & (random.random(units.shape) < share) for name, units in existing.items()}


def same(first, second) -> bool:
    """Say whether keep-sets, or other trees of arrays, are equal to the last bit."""
    both = (jax.tree.leaves(dict(each) if isinstance(each, Mapping) else each) for each in (first, second))
    return all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


# --- the same model in numpy, float64, by loops -------------------------------------------------


def layers_of(model: Llama) -> list[dict[str, np.ndarray]]:
    """Return the parameters of each layer by path (`mlp/down`), float64."""
    return [
        {path: np.asarray(value[...][index], np.float64) for path, value in parameters_by_path(segment).items()}
        for segment in model.segments
        for index in range(segment.length)
    ]


def reference(model: Llama, tokens: np.ndarray) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Return the logits [seq, vocab] of one example, and each layer's activations {structure: [seq, units, …]}.

    The plain rotary embedding only, one head at a time; with what the relatives of LLaMA have beside it.
    """
    constants, offset = model.constants, model.constants.traits.norm_offset
    eps = constants.norm_eps
    position = np.arange(len(tokens))
    distance = position[:, None] - position
    embedding = np.asarray(model.embedding[...], np.float64)
    x, activations = embedding[tokens], []
    if constants.traits.scaled_words:
        x = x * np.sqrt(embedding.shape[1])
    for number, layer in enumerate(layers_of(model)):
        layer = {name: value + offset if name.endswith("norm") else value for name, value in layer.items()}
        how = constants.apart if constants.apart is not None and number in constants.apart.layers else constants
        theta, hidden = how.rope_theta, (distance < 0) | (distance >= (how.sliding_window or len(tokens)))
        normed = _norm(x, layer["attention_norm"], eps)
        query, key, value, output = (layer[f"attention/{name}"] for name in ("query", "key", "value", "output"))
        nothing = {"query": np.zeros(query.shape[1:]), "key": np.zeros(key.shape[1:]), "value": np.zeros(key.shape[1:])}
        bias = {name: layer.get(f"attention/{name}_bias", zeros) for name, zeros in nothing.items()}
        heads, written = np.zeros((len(tokens), *output.shape[:3])), np.zeros(x.shape)
        for k in range(query.shape[1]):
            for g in range(query.shape[2]):
                queries, keys = normed @ query[:, k, g] + bias["query"][k, g], normed @ key[:, k] + bias["key"][k]
                if "attention/query_norm" in layer:
                    queries = _norm(queries, layer["attention/query_norm"], eps)
                    keys = _norm(keys, layer["attention/key_norm"], eps)
                scores = _rotate(queries, theta) @ _rotate(keys, theta).T
                scores[hidden] = -np.inf
                weights = np.exp(scores / np.sqrt(constants.query_scalar or query.shape[-1]))
                heads[:, k, g] = (
                    weights / weights.sum(axis=1, keepdims=True) @ (normed @ value[:, k] + bias["value"][k])
                )
                written = written + heads[:, k, g] @ output[k, g]
        x = x + (_norm(written, layer["attention_post_norm"], eps) if "attention_post_norm" in layer else written)
        normed = _norm(x, layer["mlp_norm"], eps)
        gate = np.tensordot(normed, layer["mlp/gate"], 1)
        if constants.traits.activation == "silu":
            acted = gate / (1 + np.exp(-gate))
        else:
            acted = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        channels = acted * np.tensordot(normed, layer["mlp/up"], 1)
        if "mlp/router" in layer:
            channels = channels * _routes(normed @ layer["mlp/router"], constants)[..., None]
        written = np.tensordot(channels, layer["mlp/down"], channels.ndim - 1)
        x = x + (_norm(written, layer["mlp_post_norm"], eps) if "mlp_post_norm" in layer else written)
        activations.append({"attention": heads, "mlp": channels})
    head = embedding.T if model.unembedding is None else np.asarray(model.unembedding[...], np.float64)
    return _norm(x, np.asarray(model.norm[...], np.float64) + offset, eps) @ head, activations


def reference_losses(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """Return the loss of each predicted token of one example, [seq - 1]."""
    logits = reference(model, tokens)[0][:-1]
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -np.log([row[token] for row, token in zip(probability, tokens[1:], strict=True)])


def _routes(scores: np.ndarray, constants: Constants) -> np.ndarray:
    """Return the weight of each expert for each token, one token at a time."""
    weights = np.zeros(scores.shape)
    for row, each in zip(weights, scores, strict=True):
        chosen = np.argsort(-each, kind="stable")[: constants.experts_per_token]
        row[chosen] = np.exp(each[chosen]) / np.exp(each).sum()
        if constants.route_scale == "sum_to_one" and len(chosen):
            row /= row.sum()
    return weights


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * scale


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Turn pair i of position t by t · theta^(-2i/head_dim), as a complex number."""
    half = x.shape[1] // 2
    angle = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)
