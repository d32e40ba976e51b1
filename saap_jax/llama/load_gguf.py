"""Read GGUF files of architecture `llama`, dequantised tensor by tensor and presented under Hugging Face names."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from saap_jax.llama.hf_layout import Checkpoint
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec, RopeScaling

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ROPE_FACTORS = "rope_freqs.weight"

_READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("expert_count", "expert_used_count"),
}


def read_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file; `ValueError` with one line if it is truncated or corrupt."""
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader follows offsets in the file: damage surfaces as any kind of error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise ValueError(f"{path}: not a GGUF file, or truncated or corrupt ({reason}); fetch it again") from None


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return the key/value pairs of a GGUF file, without the long arrays of a tokenizer."""
    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
    return {key: field.contents() for key, field in reader.fields.items() if key not in long}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file as a checkpoint; refuses by name what the model cannot express."""
    reader = read_gguf(path)
    fields = metadata(reader)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: expected architecture 'llama', got {architecture!r}; not a LLaMA model")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop(_ROPE_FACTORS, None)
    values = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    spec = _spec(values, fields, str(path), tied="output.weight" not in tensors, vocab=_rows(tensors, path))
    if factors is not None:
        scaling = _scaling_of_factors(_dequantise(factors, path), spec, str(path))
        spec = _with_scaling(spec, scaling, str(path))
    names = {_hf_name(name, path): tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in names.items()}

    def read(name: str) -> np.ndarray:
        values = _dequantise(names[name], path)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            widths = spec.layers[0]
            heads = widths.kv_heads * (widths.q_per_kv if "q_proj" in name else 1)
            return unpermute(values, heads)
        return values

    return Checkpoint(str(path), spec, shapes, read)


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of query and key rows: rotary pairs side by side -> halves of each head."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _spec(values: dict[str, Any], fields: dict[str, Any], where: str, *, tied: bool, vocab: int) -> LlamaSpec:
    if unknown := sorted(values.keys() - _READ):
        raise ValueError(f"{where}: unknown attributes {', '.join('llama.' + key for key in unknown)}")
    if values.get("expert_count"):
        raise ValueError(
            f"{where}: llama.expert_count = {values['expert_count']}: mixtures of experts are not supported"
        )
    heads = _integer(values, "attention.head_count", where)
    kv_heads = _integer(values, "attention.head_count_kv", where, heads)
    embed = _integer(values, "embedding_length", where)
    head_dim = _integer(values, "attention.key_length", where, embed // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(values, key, where, head_dim) != head_dim:
            raise ValueError(f"{where}: llama.{key} = {values[key]} is not supported, expected head_dim {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"{where}: {heads} attention heads are no multiple of {kv_heads} key/value heads")
    widths = LayerWidths(
        kv_heads=kv_heads, q_per_kv=heads // kv_heads, mlp=_integer(values, "feed_forward_length", where)
    )
    bos, eos = fields.get("tokenizer.ggml.bos_token_id"), fields.get("tokenizer.ggml.eos_token_id")
    constants = Constants(
        norm_eps=_number(values, "attention.layer_norm_rms_epsilon", where),
        rope_theta=_number(values, "rope.freq_base", where, 10_000.0),
        rope_scaling=_scaling(values, where),
        max_positions=_integer(values, "context_length", where),
        bos_token=None if bos is None else int(bos),
        eos_tokens=() if eos is None else (int(eos),),
    )
    layers = (widths,) * _integer(values, "block_count", where)
    return LlamaSpec(vocab=vocab, embed=embed, head_dim=head_dim, layers=layers, tied=tied, constants=constants)


def _scaling(values: dict[str, Any], where: str) -> RopeScaling | None:
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(f"{where}: llama.rope.scaling.type = {kind!r} is not supported, expected 'none' or 'linear'")
    old = _number(values, "rope.scale_linear", where, 1.0)
    factor = _number(values, "rope.scaling.factor", where, old)
    return None if factor == 1 else RopeScaling(kind="linear", factor=factor)


def _scaling_of_factors(factors: np.ndarray, spec: LlamaSpec, where: str) -> RopeScaling | None:
    """Recognise the frequency divisors of Llama 3.1 and 3.2, the only ones that the converter writes for `llama`."""
    factor = float(factors.max())
    if np.all(factors == 1):
        return None
    scaling = RopeScaling(kind="llama3", factor=max(factor, 1.0))
    frequency = spec.constants.rope_theta ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    expected = 1 / (smooth + (1 - smooth) / scaling.factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{where}: {_ROPE_FACTORS} is no llama3 scaling with low_freq_factor 1, high_freq_factor 4 and 8192 "
            "original positions; load the Hugging Face directory of this model instead"
        )
    return scaling


def _with_scaling(spec: LlamaSpec, scaling: RopeScaling | None, where: str) -> LlamaSpec:
    if spec.constants.rope_scaling is not None and scaling is not None:
        raise ValueError(f"{where}: both {_ROPE_FACTORS} and llama.rope.scaling.type are given, expected one")
    constants = dataclasses.replace(spec.constants, rope_scaling=scaling or spec.constants.rope_scaling)
    return dataclasses.replace(spec, constants=constants)


def _hf_name(name: str, path: Path) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if parts is None or parts[2] not in _LAYER:
        raise ValueError(f"{path}: unknown tensor {name}; not a plain LLaMA model")
    return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"


def _rows(tensors: dict[str, Any], path: Path) -> int:
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: missing tensor token_embd.weight")
    return int(tensors["token_embd.weight"].shape[-1])


def _dequantise(tensor: Any, path: Path) -> np.ndarray:
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{path}: {tensor.name} has quantisation type {tensor.tensor_type.name}, which cannot be dequantised"
        ) from None


def _integer(values: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: expected llama.{key} to be a positive integer, got {value!r}")
    return value


def _number(values: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{where}: expected llama.{key} to be a positive number, got {value!r}")
    return float(str(np.float32(value)))  # stored as float32: the shortest decimal that is meant (1e-05)
