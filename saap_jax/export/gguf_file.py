"""Write GGUF files for llama.cpp: the architecture of the family where all layers are alike, else `deci`.

`deci` is a LLaMA with one number a layer, which Mistral and Phi-3 are too; of Qwen2, Qwen3 and mixtures of experts
llama.cpp has only equal layers, so narrower ones are widened by zeros; experts are not, as tokens would be routed to
them. It has no sliding window here: the context ends where that would count, and keys of ours keep both.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from saap_jax.export.gguf_vocabulary import Pair
from saap_jax.export.hf import RAGGED
from saap_jax.export.widths import added_parameters, gguf_widths, unfit
from saap_jax.llama.files.config import fits_plain_config
from saap_jax.llama.files.families import all_but_each
from saap_jax.llama.files.gguf import (
    END_KEY,
    END_KEYS,
    PERMUTED,
    ROPE_FACTORS,
    SCALING_KEYS,
    WINDOW_KEYS,
    expert_matrices,
    experts_side,
    gguf_name,
    llama3_divisors,
    permute,
)
from saap_jax.llama.files.layout import QUANTIZED, Tensor, as_stored, fused_groups, model_tensors
from saap_jax.llama.files.write import converted
from saap_jax.llama.model import Llama, param
from saap_jax.llama.product import Weight
from saap_jax.llama.quantized import Quantized, quantization_of, with_matrices
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec

_TYPES = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

_FILE_TYPES = {name: kinds[1] for name, kinds in _TYPES.items()} | {"q4_1": gguf.LlamaFileType.MOSTLY_Q4_1}


class WrittenGguf(NamedTuple):
    """What is in a GGUF file that was written."""

    architecture: str
    added: int
    """Parameters, all zero, that the architecture needed beside the model's."""
    wider: int
    """Matrices stored as F16 because their rows are no multiple of a block of Q8_0."""


def write_gguf(model: Llama, path: Path, dtype: str, *, name: str, vocabulary: Sequence[Pair]) -> WrittenGguf:
    """Write a model as one GGUF file; `dtype` is that of its matrices, vectors stay float32.

    Matrices of 4 bits in groups of 32 become Q4_1 whatever `dtype`, their integers as they are. `vocabulary` is the
    tokenizer's metadata. One tensor at a time is in memory beside the model. Raises `ValueError` for a matrix whose
    values are beyond float16, or that is quantised otherwise, and for a model that llama.cpp has no architecture for.
    """
    blocks = check_blocks(model)
    spec = model.spec
    architecture = architecture_of(spec)
    traits = spec.constants.traits
    layers = gguf_widths(spec, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    pairs = [*_attributes(spec, layers, architecture, name, "q4_1" if blocks else dtype), *vocabulary]
    ends = list(spec.constants.eos_tokens)
    if set(ends) - {value for key, value, _ in vocabulary if key in END_KEYS}:
        pairs.append((END_KEY, ends, (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)))
    for key, value, kind in pairs:
        writer.add_key_value(key, value, kind[0], kind[1] if len(kind) > 1 else None)
    tensors = [tensor for tensor in gguf_tensors(model, layers) if 0 not in tensor.shape]
    if traits.fused and architecture == traits.gguf.architecture:
        tensors = as_stored(tensors, fused_groups(spec))
    tensors = [_in_gguf(tensor, spec, architecture) for tensor in tensors]
    unread = {f"blk.{index}.attn_norm.weight" for index, layer in enumerate(layers) if not layer.kv_heads}
    tensors = [tensor for tensor in tensors if tensor.name not in unread]  # llama.cpp refuses tensors it does not use
    scaling = spec.constants.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        divisors = llama3_divisors(scaling, spec.constants.rope_theta, spec.head_dim).astype(np.float32)
        tensors.append(Tensor(ROPE_FACTORS, divisors.shape, lambda: divisors))
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
    except OSError as error:
        if error.errno is not None or "requested and" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error  # numpy says "9 requested and 3 …"
    finally:
        writer.close()
    wider = 0
    if dtype == "q8_0":
        wider = sum(kind == Type.F16 for kind in types)
    return WrittenGguf(architecture, added_parameters(spec, layers), wider)


def context_of(constants: Constants) -> int:
    """Count the positions of a file's model: as many as a sliding window has, for llama.cpp would see beyond it."""
    if constants.traits.gguf.windows:
        return constants.max_positions
    windows = [each.sliding_window for each in (constants, constants.apart) if each and each.sliding_window]
    return min([constants.max_positions, *windows])


def _windows(constants: Constants, architecture: str) -> dict[str, int | list[int]]:
    """Say the positions and the window of a model for which llama.cpp has no window, by the keys that we read.

    Windows of layers whose rotary positions differ too have no such key.
    """
    apart = constants.apart
    known = constants.traits.gguf
    window = constants.sliding_window
    layers = None
    if apart is not None:
        alike = (apart.rope_theta, apart.rope_scaling) == (constants.rope_theta, constants.rope_scaling)
        if alike and window is None:
            window = apart.sliding_window
        else:
            window = None
        layers = list(apart.layers)
    if window is None or known.windows:
        return {}
    key = "attention.sliding_window"
    own = architecture == known.architecture and key in known.keys  # Phi-3's, which llama.cpp reads and leaves
    said = {"context_length": constants.max_positions, key: window, "attention.sliding_window_layers": layers}
    names = WINDOW_KEYS | ({key: f"{architecture}.{key}"} if own else {})
    return {names[name]: value for name, value in said.items() if value is not None}


def architecture_of(spec: LlamaSpec) -> str:
    """Choose the architecture that computes a model; `ValueError` if none does, naming another format.

    A model of an architecture that wants heads as wide as the residual stream, and has fewer, is a `llama`.

    >>> layers = (LayerWidths(kv_heads=2, q_per_kv=1, mlp=8), LayerWidths(kv_heads=1, q_per_kv=1, mlp=8))
    >>> architecture_of(LlamaSpec(vocab=9, embed=8, head_dim=4, layers=layers, tied=True))
    'deci'
    """
    family = spec.constants.family
    scaling = spec.constants.rope_scaling
    gguf = spec.constants.traits.gguf
    if spec.constants.traits.experts:
        least = spec.constants.experts_per_token or 1
        counts = sorted({layer.mlp for layer in spec.layers})
        if len(counts) > 1 or counts[0] < least:
            expected = f"as many experts in each layer, at least {least}"
            got = f"{counts[0]} to {counts[-1]}"
            raise unfit("gguf", expected, got, "prune with the allocation uniform, all layers alike")
        if spec.constants.route_scale != "sum_to_one":
            expected = "weights of a token's experts that are divided by their sum, as in llama.cpp"
            raise unfit("gguf", expected, "others (norm_topk_prob false)", "choose --format hf")
    if gguf.equal_layers:
        if spec.output_biases:
            raise unfit("gguf", f"no biases of output projections in family {family}", "those of the step bias", RAGGED)
        if scaling is not None and scaling.kind == "llama3" and gguf.architecture != "llama":
            expected = f"no rope type 'llama3' in family {family}, as llama.cpp reads its divisors only in LLaMA"
            raise unfit("gguf", expected, "it", "choose --format hf, padded or ragged")
        if gguf.windows:
            _check_windows(spec)
        return gguf.architecture
    if not fits_plain_config(spec):
        return "deci"
    first = spec.layers[0]
    whole = first.kv_heads * first.q_per_kv * spec.head_dim == spec.embed
    if whole or not gguf.whole_heads:
        return gguf.architecture
    return "llama"


def _check_windows(spec: LlamaSpec) -> None:
    """Raise ValueError for windows, rotary bases or scores that an architecture with windows does not compute."""
    constants, traits = spec.constants, spec.constants.traits
    local = all_but_each(traits.full_every, len(spec.layers))
    own: Constants | Apart = constants.apart or constants
    if constants.apart is not None:
        layers = constants.apart.layers
    elif local:
        layers = range(len(spec.layers))
    else:
        layers = ()
    for what, good, got in (
        ("layers with a window", list(layers) == list(local), list(layers)),
        ("rotary base of layers with a window", own.rope_theta == traits.local_theta, own.rope_theta),
        ("query_pre_attn_scalar", constants.query_scalar is None, constants.query_scalar),
    ):
        if not good:
            expected = f"the {what} that llama.cpp's {traits.gguf.architecture} computes"
            raise unfit("gguf", expected, got, "choose --format hf or padded")


def _attributes(spec: LlamaSpec, layers: Sequence[LayerWidths], arch: str, name: str, dtype: str) -> list[Pair]:
    constants, scaling = spec.constants, spec.constants.rope_scaling
    widths = {
        constants.traits.gguf.expert_channels: [layer.channels or layer.mlp for layer in layers],
        "attention.head_count": [layer.kv_heads * layer.q_per_kv for layer in layers],
        "attention.head_count_kv": [layer.kv_heads for layer in layers],
    }
    own = {
        "vocab_size": spec.vocab,
        "context_length": context_of(constants),
        "embedding_length": spec.embed,
        "block_count": len(layers),
        "attention.layer_norm_rms_epsilon": float(constants.norm_eps),
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), spec.head_dim),
        "rope.freq_base": float(constants.rope_theta),
    }
    if constants.experts_per_token is not None:
        own |= {"expert_count": layers[0].mlp, "expert_used_count": constants.experts_per_token}
    if constants.traits.gguf.windows and arch == constants.traits.gguf.architecture:
        own["attention.sliding_window"] = (constants.apart or constants).sliding_window or constants.positions
    own |= {key: values if arch == "deci" else values[0] for key, values in widths.items()}
    if scaling is not None and scaling.kind == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    said = {"general.name": name, "general.file_type": int(_FILE_TYPES[dtype])}
    if dtype in ("q8_0", "q4_1"):
        said |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    said |= {f"{arch}.{key}": value for key, value in own.items()} | _windows(constants, arch)
    if scaling is not None and scaling.kind == "llama3":
        said |= {key: getattr(scaling, setting) for setting, key in SCALING_KEYS.items()}
    kinds = gguf.GGUFValueType
    one = {str: "STRING", int: "UINT32", float: "FLOAT32"}
    many = (kinds.ARRAY, kinds.INT32)
    return [(key, each, many if isinstance(each, list) else (kinds[one[type(each)]],)) for key, each in said.items()]


def _in_gguf(tensor: Tensor, spec: LlamaSpec, architecture: str) -> Tensor:
    """Put a tensor under its GGUF name; rows of queries and keys in the order that the architecture wants."""
    traits = spec.constants.traits
    name = gguf_name(tensor.name, architecture)
    if traits.norm_offset and tensor.name.endswith("norm.weight"):
        return Tensor(name, tensor.shape, lambda: tensor.read().astype(np.float32) + traits.norm_offset, tensor.dtype)
    if (side := experts_side(tensor.name, spec.constants.family)) is not None:
        # which lie side by side; a matrix for each of them
        (rows, columns) = tensor.shape
        experts = spec.layers[0].mlp
        if side:
            shape = (experts, rows, columns // experts)
        else:
            shape = (experts, rows // experts, columns)
        return Tensor(name, shape, lambda: expert_matrices(tensor.read(), experts, side), tensor.dtype)
    if architecture not in PERMUTED or not tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor._replace(name=name)
    heads = tensor.shape[0] // spec.head_dim
    return Tensor(name, tensor.shape, lambda: permute(tensor.read(), heads), tensor.dtype)


def _type_of(tensor: Tensor, dtype: str) -> Type:
    if len(tensor.shape) == 1 or tensor.name.endswith("ffn_gate_inp.weight"):
        return Type.F32  # as llama.cpp's own converter stores norms and routers
    if tensor.dtype == np.uint8:  # rows of blocks, see `gguf_tensors`
        return Type.Q4_1
    kind = _TYPES[dtype][0]
    if kind == Type.Q8_0 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return Type.F16
    return kind


def _stored(tensor: Tensor, kind: Type) -> np.ndarray:
    if kind == Type.Q4_1:
        return tensor.read()
    values = converted(tensor.read(), tensor.name, np.dtype(np.float16 if kind == Type.F16 else np.float32))
    if kind in (Type.F16, Type.F32):
        return values
    return gguf.quants.quantize(values, kind)


# --- matrices of 4 bits ----------------------------------------------------------------------------
#
# A block of Q4_1 is 20 bytes: d and m as float16, then 16 bytes of which byte k has integer k in its low and integer
# k + 16 in its high half; a weight is d·q + m. That is what a `Quantized` matrix holds (α = d, the offset = m) but for
# the type of d and m: each is off by at most 2⁻¹¹ of itself, so a weight by at most 2⁻¹¹ (15·α + |m|).

BITS = 4
GROUP = gguf.GGML_QUANT_SIZES[Type.Q4_1][0]


def check_blocks(model: Llama) -> bool:
    """Say whether a model has matrices to be written as blocks; `ValueError` if they do not fit, naming what does."""
    if (quantization := quantization_of(model)) is None:
        return False
    if (quantization.bits, quantization.group_size) != (BITS, GROUP):
        got = f"{quantization.bits} bits in groups of {quantization.group_size}"
        instead = "choose --dequantize, with --dtype q8_0 or float16 to stay small, or recover the model with those"
        raise unfit("gguf", f"matrices of {BITS} bits in groups of {GROUP} (blocks of Q4_1)", got, instead)
    return True


def gguf_tensors(model: Llama, layers: Sequence[LayerWidths]) -> list[Tensor]:
    """List what `model_tensors` does, but of a quantised matrix one tensor, whose `read` gives rows of blocks.

    Its shape is that of the matrix, `[outputs, inputs]`; its dtype is uint8.
    """

    def without_empty(matrix: Weight) -> Weight:  # an empty sub-block is widened by zeros, and has no integers
        empty = isinstance(matrix, Quantized) and 0 in matrix.shape
        if empty:
            return param(matrix.axes, matrix.dense())
        return matrix

    tensors: list[Tensor] = []
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in model_tensors(with_matrices(model, without_empty), layers):
        name, _, kind = tensor.name.rpartition(".")
        if kind in QUANTIZED.values():
            parts.setdefault(name, {})[kind] = tensor
        else:
            tensors.append(tensor)
    return tensors + [
        _blocks(f"{name}.weight", *(each[kind] for kind in QUANTIZED.values())) for name, each in parts.items()
    ]


def _blocks(name: str, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    outputs, groups = scale.shape

    def read() -> np.ndarray:
        blocks = np.empty((outputs, groups, 20), np.uint8)
        for place, numbers in ((slice(0, 2), scale.read()), (slice(2, 4), offset.read())):
            if numbers.size and np.abs(numbers).max() > np.finfo(np.float16).max:
                raise ValueError(
                    f"{name}: has a scale or offset of {np.abs(numbers).max():.3g}, beyond float16; choose --dequantize"
                )
            halves = np.ascontiguousarray(numbers, np.float32).astype("<f2")
            blocks[..., place] = halves.view(np.uint8).reshape(outputs, groups, 2)
        blocks[..., 4:] = packed.read().reshape(outputs, groups, 16)
        return blocks.reshape(outputs, groups * 20)

    return Tensor(name, (outputs, groups * GROUP), read, np.dtype(np.uint8))
