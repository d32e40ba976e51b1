"""Small models of every shape that an export meets, and what is in the files that are written of them."""

import dataclasses
import json

import gguf
import jax.numpy as jnp

from saap_jax.export.gguf_file import write_gguf
from saap_jax.export.gguf_vocabulary import no_vocabulary
from saap_jax.export.hf import write_hf
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling

LINEAR = RopeScaling(kind="linear", factor=4.0)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)


def spec_of(*widths: tuple[int, int, int], vocab: int = 300, embed: int = 32, **options) -> LlamaSpec:
    """Return a spec with the given (kv_heads, q_per_kv, mlp) of each layer, head_dim 8."""
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=group, mlp=mlp) for heads, group, mlp in widths)
    options = {"tied": False} | options
    return LlamaSpec(vocab=vocab, embed=embed, head_dim=8, layers=layers, **options)


def gemma(layers: int) -> Constants:
    """Return the constants of a Gemma 3: each sixth layer sees all positions, turned by another base."""
    if layers < 6:
        return Constants(family="gemma3_text", sliding_window=9)
    apart = Apart(layers=tuple(n for n in range(layers) if (n + 1) % 6), sliding_window=9)
    return Constants(family="gemma3_text", rope_theta=1e6, apart=apart)


UNIFORM = spec_of((2, 2, 24), (2, 2, 24))
RAGGED = spec_of((2, 2, 24), (1, 2, 17), (1, 2, 17), (3, 2, 5))
EMPTY = spec_of((0, 1, 8), (2, 3, 0), (0, 2, 0), (1, 1, 40), (0, 1, 9), (2, 1, 0))


def with_scaling(spec: LlamaSpec, scaling: RopeScaling) -> LlamaSpec:
    """Return the spec with rescaled rotary frequencies and a longer context."""
    return dataclasses.replace(spec, constants=Constants(rope_scaling=scaling, max_positions=512))


PLAIN = {
    "uniform": UNIFORM,
    "tied": dataclasses.replace(UNIFORM, tied=True),
    "biased": dataclasses.replace(UNIFORM, output_biases=True),
    "linear": with_scaling(UNIFORM, LINEAR),
    "llama3": with_scaling(UNIFORM, LLAMA3),
}
"""What a plain LLaMA can hold."""

SPECS = PLAIN | {
    "ragged": RAGGED,
    "empty": EMPTY,
    "empty_tied": dataclasses.replace(EMPTY, tied=True),
    "empty_biased": dataclasses.replace(EMPTY, output_biases=True),
    "groups": spec_of((2, 1, 24), (1, 4, 24), (2, 3, 24)),
    "ragged_linear": with_scaling(RAGGED, LINEAR),
    "ragged_llama3": with_scaling(RAGGED, LLAMA3),
    "nothing": spec_of((0, 1, 0), (0, 1, 0)),
}
"""All of them."""

RELATIVES = {
    f"{constants.family}-{name}": dataclasses.replace(spec, constants=constants)
    for name, spec in {
        "uniform": UNIFORM,
        "cut": spec_of((1, 3, 24), (1, 3, 24)),
        "ragged": RAGGED,
        "empty": EMPTY,
    }.items()
    for constants in (
        Constants(family="qwen2"),
        Constants(family="mistral", sliding_window=9),
        Constants(family="qwen3"),
        Constants(family="phi3", sliding_window=11),
        gemma(len(spec.layers)),
    )
} | {
    "gemma3_text-cut": spec_of((1, 2, 20), (1, 2, 20), constants=gemma(2)),  # a number of heads that transformers takes
    "gemma3_text-apart": spec_of(*[(1, 2, 24)] * 7, constants=gemma(7), tied=True),
}
"""Each of LLaMA's relatives: as published, cut alike in all layers (3 heads), and cut in each layer otherwise."""

MIXTURES = {
    f"{family}-{name}": LlamaSpec(
        vocab=300,
        embed=32,
        head_dim=8,
        layers=(LayerWidths(kv_heads=2, q_per_kv=2, mlp=6, channels=24), second),
        tied=False,
        constants=Constants(family=family, experts_per_token=2),
    )
    for family in ("qwen3_moe", "mixtral")
    for name, second in {
        "uniform": LayerWidths(kv_heads=2, q_per_kv=2, mlp=6, channels=24),
        "ragged": LayerWidths(kv_heads=1, q_per_kv=2, mlp=6, channels=17),
    }.items()
}
"""Mixtures of experts, as many in each layer; with layers that are alike, and with heads and channels that differ."""


def written(model, path, dtype="float32", form="gguf"):
    """Write a model in a format; return what its writer says."""
    if form == "gguf":
        return write_gguf(model, path, dtype, name="test", vocabulary=no_vocabulary())
    path.mkdir(exist_ok=True)
    return write_hf(model, path, form, jnp.dtype(dtype))


def config_of(directory):
    """Read the config.json of a directory."""
    return json.loads((directory / "config.json").read_text())


def fields_of(path):
    """Read the fields of a GGUF file."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def types_of(path):
    """Read the type of each tensor of a GGUF file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def rewritten(source, target, architecture, fields=None):
    """Copy a GGUF file with other fields, None for one that is left out."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, architecture)
    old, fields = reader.fields["general.architecture"].contents(), dict(fields or {})
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")):
            continue
        name = key.removeprefix(f"{old}.")
        if (value := fields.pop(name, field.contents())) is not None:
            writer.add_key_value(key.replace(old, architecture), value, *(*field.types, None)[:2])
    for name, value in fields.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
