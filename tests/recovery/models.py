"""Small models whose widths are multiples of the group sizes that are tested, and adapters that have learned."""

import jax
import numpy as np
from flax import nnx

from saap_jax.llama.model import Llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from tests.helpers import VOCAB, random_model

WIDTHS = ((2, 16), (2, 16), (1, 0), (0, 8))
"""(kv_heads, mlp) of each layer: three runs, one without channels, one without attention."""


def spec_of(*widths: tuple[int, int], embed: int = 16, **options) -> LlamaSpec:
    """Return a spec with the given (kv_heads, mlp) of each layer; 2 query heads of 4 a KV head."""
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=2, mlp=mlp) for heads, mlp in widths)
    return LlamaSpec(vocab=VOCAB, embed=embed, head_dim=4, layers=layers, **({"tied": True} | options))


def pruned_model(**options) -> Llama:
    """Return a random model with layers of different widths."""
    return random_model(spec_of(*WIDTHS), **options)


def trained(model: Llama, kind: type[nnx.Variable], seed: int = 1) -> Llama:
    """Return the model with random numbers added to its variables of a type, as if it had learned something."""
    graph, learning, rest = nnx.split(model, kind, ...)
    random = np.random.default_rng(seed)

    def learn(value: jax.Array) -> jax.Array:
        return value + jax.numpy.asarray(0.3 * random.standard_normal(value.shape), value.dtype)

    return nnx.merge(graph, jax.tree.map(learn, learning), rest)


def constant_groups(model: Llama) -> Llama:
    """Return the model with a matrix of zeros, and one whose weights are all alike."""
    new = jax.tree.map(lambda leaf: leaf, model)
    new.segments[0].attention.value[...] = jax.numpy.zeros_like(new.segments[0].attention.value[...])
    new.segments[0].mlp.gate[...] = jax.numpy.full_like(new.segments[0].mlp.gate[...], 0.7)
    return new
