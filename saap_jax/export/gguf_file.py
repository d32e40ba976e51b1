"""Write GGUF files for llama.cpp: architecture `llama` where all layers are alike, `deci` with one number a layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from saap_jax.export.gguf_blocks import check_blocks, gguf_tensors
from saap_jax.export.gguf_vocabulary import Pair
from saap_jax.export.widths import added_parameters, deci_widths
from saap_jax.llama.gguf_layout import ROPE_FACTORS, SCALING_KEYS, gguf_name, llama3_divisors, permute
from saap_jax.llama.hf_config import fits_plain_config
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.llama.write import Tensor, converted

_TYPES = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

_FILE_TYPES = {name: kinds[1] for name, kinds in _TYPES.items()} | {"q4_1": gguf.LlamaFileType.MOSTLY_Q4_1}

_BLOCKS = np.dtype(np.uint8)
"""Type of the rows of a matrix that comes as blocks of Q4_1."""

_FLOAT16 = np.dtype(np.float16)


class Written(NamedTuple):
    """What is in a GGUF file that was written."""

    architecture: str
    added: int
    """Parameters, all zero, that the architecture needed beside the model's."""
    wider: int
    """Matrices stored as F16 because their rows are no multiple of a block of Q8_0."""


def write_gguf(model: Llama, path: Path, dtype: str, *, name: str, vocabulary: Sequence[Pair]) -> Written:
    """Write a model as one GGUF file; `dtype` is that of its matrices, vectors stay float32.

    Matrices of 4 bits in groups of 32 become Q4_1 whatever `dtype`, their integers as they are. `vocabulary` is the
    tokenizer's metadata. One tensor at a time is in memory beside the model. Raises `ValueError` for a matrix whose
    values are beyond float16, or that is quantised otherwise.
    """
    blocks, spec = check_blocks(model), model.spec
    uniform = fits_plain_config(spec)
    architecture, layers = ("llama", spec.layers) if uniform else ("deci", deci_widths(spec))
    writer = gguf.GGUFWriter(path, architecture)
    for key, value, kind in [*_attributes(spec, layers, architecture, name, "q4_1" if blocks else dtype), *vocabulary]:
        writer.add_key_value(key, value, kind[0], kind[1] if len(kind) > 1 else None)
    tensors = [_in_gguf(tensor, spec, layers) for tensor in gguf_tensors(model, layers) if 0 not in tensor.shape]
    unread = {f"blk.{index}.attn_norm.weight" for index, layer in enumerate(layers) if not layer.kv_heads}
    tensors = [tensor for tensor in tensors if tensor.name not in unread]  # llama.cpp refuses tensors it does not use
    tensors += _rope_factors(spec)
    types = [_type_of(tensor, dtype) for tensor in tensors]
    for tensor, kind in zip(tensors, types, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_ = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, types, strict=True):
            writer.write_tensor_data(_stored(tensor, kind))
    finally:
        writer.close()
    wider = sum(kind == Type.F16 for kind in types) if dtype == "q8_0" else 0
    return Written(architecture, added_parameters(spec, layers), wider)


def _attributes(spec: LlamaSpec, layers: Sequence[LayerWidths], arch: str, name: str, dtype: str) -> list[Pair]:
    kinds = gguf.GGUFValueType
    text, integer, real, many = (kinds.STRING,), (kinds.UINT32,), (kinds.FLOAT32,), (kinds.ARRAY, kinds.INT32)
    constants, scaling = spec.constants, spec.constants.rope_scaling
    widths = {
        "feed_forward_length": [layer.mlp for layer in layers],
        "attention.head_count": [layer.kv_heads * layer.q_per_kv for layer in layers],
        "attention.head_count_kv": [layer.kv_heads for layer in layers],
    }
    pairs: list[Pair] = [
        ("general.name", name, text),
        ("general.file_type", int(_FILE_TYPES[dtype]), integer),
        *([("general.quantization_version", gguf.GGML_QUANT_VERSION, integer)] if dtype in ("q8_0", "q4_1") else []),
        (f"{arch}.vocab_size", spec.vocab, integer),
        (f"{arch}.context_length", constants.max_positions, integer),
        (f"{arch}.embedding_length", spec.embed, integer),
        (f"{arch}.block_count", len(layers), integer),
        (f"{arch}.attention.layer_norm_rms_epsilon", constants.norm_eps, real),
        (f"{arch}.attention.key_length", spec.head_dim, integer),
        (f"{arch}.attention.value_length", spec.head_dim, integer),
        (f"{arch}.rope.dimension_count", spec.head_dim, integer),
        (f"{arch}.rope.freq_base", constants.rope_theta, real),
    ]
    for key, values in widths.items():
        pairs.append((f"{arch}.{key}", values[0], integer) if arch == "llama" else (f"{arch}.{key}", values, many))
    if scaling is not None and scaling.kind == "linear":
        pairs += [(f"{arch}.rope.scaling.type", "linear", text), (f"{arch}.rope.scaling.factor", scaling.factor, real)]
    elif scaling is not None:
        for setting, key in SCALING_KEYS.items():
            value = getattr(scaling, setting)
            pairs.append((key, value, integer if isinstance(value, int) else real))
    return pairs


def _in_gguf(tensor: Tensor, spec: LlamaSpec, layers: Sequence[LayerWidths]) -> Tensor:
    """Return a tensor under its GGUF name; rows of queries and keys in llama.cpp's order."""
    name = gguf_name(tensor.name)
    if not tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor._replace(name=name)
    heads = tensor.shape[0] // spec.head_dim
    return Tensor(name, tensor.shape, lambda: permute(tensor.read(), heads), tensor.dtype)


def _rope_factors(spec: LlamaSpec) -> list[Tensor]:
    scaling = spec.constants.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return []
    divisors = llama3_divisors(scaling, spec.constants.rope_theta, spec.head_dim).astype(np.float32)
    return [Tensor(ROPE_FACTORS, divisors.shape, lambda: divisors)]


def _type_of(tensor: Tensor, dtype: str) -> Type:
    if len(tensor.shape) == 1:
        return Type.F32
    if tensor.dtype == _BLOCKS:
        return Type.Q4_1
    kind = _TYPES[dtype][0]
    return Type.F16 if kind == Type.Q8_0 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _stored(tensor: Tensor, kind: Type) -> np.ndarray:
    if kind == Type.Q4_1:
        return tensor.read()
    if kind == Type.F16:
        return converted(tensor, _FLOAT16)
    values = converted(tensor, np.dtype(np.float32))
    return values if kind == Type.F32 else gguf.quants.quantize(values, kind)
