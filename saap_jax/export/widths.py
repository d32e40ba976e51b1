"""What the widths of a model become in a format that cannot hold them as they are."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from saap_jax.llama.model import DecoderLayer, Llama, abstract_llama
from saap_jax.llama.segments import segment_bounds
from saap_jax.llama.spec import LayerWidths, LlamaSpec

DECI_CHANNELS = 32
"""Channels of zeros that a layer without channels gets in GGUF; a whole block of Q8_0."""


def unfit(form: str, expected: str, got: object, instead: str) -> ValueError:
    """Make the error of a format that cannot hold a model, which says what can."""
    return ValueError(f"format {form}: expected {expected}, got {got}; {instead}")


def uniform_widths(spec: LlamaSpec) -> tuple[LayerWidths, ...]:
    """Find the narrowest widths, equal in all layers and none of them zero, that hold every layer.

    transformers refuses a LLaMA with a number of attention heads that does not divide `embed`, so there may be more
    heads than in any layer. Raises `ValueError` if no number does.

    >>> layers = (LayerWidths(kv_heads=3, q_per_kv=1, mlp=8), LayerWidths(kv_heads=0, q_per_kv=3, mlp=9))
    >>> widths = uniform_widths(LlamaSpec(vocab=9, embed=8, head_dim=4, layers=layers, tied=True))[0]
    >>> widths.kv_heads, widths.q_per_kv, widths.mlp
    (4, 1, 9)
    """
    widest = widest_layer(spec)
    kv_heads = widest.kv_heads
    q_per_kv = widest.q_per_kv
    if not spec.constants.traits.heads_divide:
        return (widest,) * len(spec.layers)
    fitting = [
        (kv * group, group, kv)
        for group in range(q_per_kv, spec.embed // kv_heads + 1)
        for kv in range(kv_heads, spec.embed // group + 1)
        if spec.embed % (kv * group) == 0
    ]
    if not fitting:
        expected = f"a number of heads of at least {kv_heads} x {q_per_kv} that divides the embeddings' {spec.embed}"
        raise unfit("padded", expected, "none", "choose --format ragged or gguf")
    _, q_per_kv, kv_heads = min(fitting)
    return (LayerWidths(kv_heads=kv_heads, q_per_kv=q_per_kv, mlp=widest.mlp),) * len(spec.layers)


def widest_layer(spec: LlamaSpec) -> LayerWidths:
    """Find the narrowest widths, none of them zero, that hold every layer."""
    attending = [layer for layer in spec.layers if layer.kv_heads] or [LayerWidths(kv_heads=1, q_per_kv=1, mlp=1)]
    return LayerWidths(
        kv_heads=max(layer.kv_heads for layer in attending),
        q_per_kv=max(layer.q_per_kv for layer in attending),
        mlp=max(1, *(layer.mlp for layer in spec.layers)),
        channels=max(channels) if (channels := [layer.channels for layer in spec.layers if layer.channels]) else None,
    )


def gguf_widths(spec: LlamaSpec, architecture: str) -> tuple[LayerWidths, ...]:
    """Find the narrowest widths of each layer that an architecture of GGUF holds.

    Some want heads that are together as wide as the residual stream. Raises `ValueError` if none are.

    Source: llama.cpp, `load_tensors` of each architecture.
    """
    gguf = spec.constants.traits.gguf
    if not gguf.equal_layers:
        if architecture == "deci":
            return deci_widths(spec)
        return spec.layers
    widest = widest_layer(spec)
    if gguf.whole_heads:
        heads = spec.embed // spec.head_dim
        fitting = [n for n in range(widest.kv_heads, heads // widest.q_per_kv + 1) if heads % n == 0]
        if spec.embed % spec.head_dim or not fitting:
            expected = f"heads of a {architecture} to be together as wide as its embeddings, {spec.embed}"
            got = f"at least {widest.kv_heads} x {widest.q_per_kv} of {spec.head_dim}"
            raise unfit("gguf", expected, got, "choose --format padded or ragged")
        widest = dataclasses.replace(widest, kv_heads=fitting[0], q_per_kv=heads // fitting[0])
    return (widest,) * len(spec.layers)


def deci_widths(spec: LlamaSpec) -> tuple[LayerWidths, ...]:
    """Find the narrowest widths of each layer that llama.cpp's `deci` computes rightly.

    Its graph skips a layer without channels as a whole, its attention too, so such a layer gets channels of zeros. It
    takes the head width from the first layer, and adds the bias of an attention output only where there is attention:
    there a layer without heads gets one KV head of zeros.

    Source: llama.cpp, `src/models/deci.cpp` and `load_hparams` in `src/llama-model.cpp`.
    """
    layers = []
    for index, layer in enumerate(spec.layers):
        kv_heads = layer.kv_heads or int(index == 0 or spec.output_biases)
        layers.append(LayerWidths(kv_heads=kv_heads, q_per_kv=layer.q_per_kv, mlp=layer.mlp or DECI_CHANNELS))
    return tuple(layers)


def nas_widths(spec: LlamaSpec) -> tuple[LayerWidths, ...]:
    """Find the narrowest widths of each layer that vLLM's `nemotron_nas` computes.

    It has one number of query heads, so attention is alike in all layers that have any. The first has to be one of
    them, since its norm opens the residual stream.
    """
    widest = widest_layer(spec)
    attending = dataclasses.replace(spec.layers[0], kv_heads=widest.kv_heads, q_per_kv=widest.q_per_kv)
    return tuple(
        dataclasses.replace(attending if layer.kv_heads or not index else layer, mlp=layer.mlp)
        for index, layer in enumerate(spec.layers)
    )


def added_parameters(spec: LlamaSpec, layers: Sequence[LayerWidths]) -> int:
    """Count the parameters, all zero, that widening a model to `layers` adds."""
    wide = dataclasses.replace(spec, layers=tuple(layers))
    most, own = (sum(leaf.size for leaf in jax.tree.leaves(abstract_llama(each))) for each in (wide, spec))
    return most - own


def without_empty_layers(model: Llama) -> Llama:
    """Leave out the layers that have neither heads nor channels, which compute nothing; neighbours that
    are alike then are stacked."""
    kept: list[tuple[int, DecoderLayer]] = []
    for segment, at in zip(model.segments, segment_bounds(model.segments), strict=True):
        biased = segment.mlp.down_bias is not None
        if segment.widths.kv_heads or segment.widths.mlp or biased:
            kept.append((at.start, segment))
    if len(kept) == len(model.segments) or not kept:
        return model
    new = jax.tree.map(lambda x: x, model)
    stacked: list[DecoderLayer] = []
    for _, segment in kept:
        if stacked and stacked[-1].widths == segment.widths:
            stacked[-1] = jax.tree.map(lambda *parts: jnp.concatenate(parts), stacked[-1], segment)
        else:
            stacked.append(segment)
    new.segments = nnx.List(stacked)
    numbers = [start + layer for start, segment in kept for layer in range(segment.length)]
    if (apart := model.constants.apart) is not None:
        own = tuple(new for new, old in enumerate(numbers) if old in apart.layers)
        found = None
        if own:
            found = dataclasses.replace(apart, layers=own)
        new.constants = dataclasses.replace(model.constants, apart=found)
    return new
