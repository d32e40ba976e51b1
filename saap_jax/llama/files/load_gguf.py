"""Read GGUF files, dequantised tensor by tensor and presented under Hugging Face names.

Architecture `deci` has one number a layer, the others equal layers. What `deci` leaves out of a layer without heads or
channels (matrices of no size, a norm that nothing reads) is filled in.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.formats.json_files import shown
from saap_jax.llama.files.families import FAMILIES, all_but_each, gguf_families
from saap_jax.llama.files.gguf_header import GgufFile, open_header
from saap_jax.llama.files.gguf_layout import (
    PERMUTED,
    ROPE_FACTORS,
    SCALING_KEYS,
    experts_side,
    hf_name,
    llama3_divisors,
    side_by_side,
    unpermute,
)
from saap_jax.llama.files.hf_groups import fused_groups, regrouped
from saap_jax.llama.files.hf_layout import Checkpoint
from saap_jax.llama.files.values import some
from saap_jax.llama.spec import BOUNDS, Apart, Constants, LayerWidths, LlamaSpec, RopeScaling, check_bounds

_READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("expert_count", "expert_used_count"),
}

LLAMA_CPP_THETA = 10_000.0
"""The rotary base of a file that says none, of any architecture."""

_OTHER_SCORES = 62
"""Layers of the one `gemma3` whose scores llama.cpp scales otherwise, which it tells by their number."""


class _Fields(NamedTuple):
    """The attributes of a model in a GGUF file, without the name of the architecture before them."""

    architecture: str
    family: str
    values: dict[str, Any]
    where: str

    def integer(self, key: str, quantity: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self._name(key)} to be a positive integer, got {shown(value)}")
        check_bounds(value, quantity, f"{self.where}: {self.architecture}.{key}")
        return value

    def integers(self, key: str, count: int, quantity: str) -> list[int]:
        """Read one number a layer, or one for all of them."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return [self.integer(key, quantity)] * count
        if len(value) != count or not all(type(item) is int and item >= 0 for item in value):
            raise ValueError(f"{self._name(key)} to be {count} non-negative integers, got {shown(value)}")
        check_bounds(max(1, *value), quantity, f"{self.where}: {self.architecture}.{key}")
        return value

    def number(self, key: str, quantity: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{self._name(key)} to be a positive number, got {shown(value)}")
        check_bounds(value, quantity, f"{self.where}: {self.architecture}.{key}")
        return float(str(np.float32(value)))  # stored as float32: the shortest decimal that is meant (1e-05)

    def _name(self, key: str) -> str:
        return f"{self.where}: expected {self.architecture}.{key}"


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file as a checkpoint; refuses by name what the model cannot express.

    Raises:
        ValueError: see `gguf_header`; an unknown architecture, attribute or tensor; sizes that are not plausible.
    """
    file = open_header(path)
    try:
        return _open(file)
    except ValueError as error:  # those of the spec's own classes know no file
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _open(file: GgufFile) -> Checkpoint:
    path, fields = file.path, file.fields
    found = _fields(fields, str(path))
    tensors = [name for name in file.tensors if name != ROPE_FACTORS]
    spec = _spec(found, file, tensors)
    if ROPE_FACTORS in file.tensors:
        scaling = _scaling_of_factors(file.read(ROPE_FACTORS), spec, str(path), fields)
        spec = _with_scaling(spec, scaling, str(path))
    names = {}
    for name in tensors:
        if (known := hf_name(name, found.family)) is None:
            raise ValueError(f"{path}: unknown tensor {some([name])}; not a plain LLaMA model, or {found.architecture}")
        names[known] = name
    checkpoint = _checkpoint(file, spec, names, found.architecture in PERMUTED)
    return regrouped(checkpoint, fused_groups(spec) if FAMILIES[found.family].fused else [])


def _fields(fields: dict[str, Any], where: str) -> _Fields:
    """Return the attributes of a model, and the family that it is of: one with experts if the file counts any."""
    architecture = fields.get("general.architecture")
    known = [*gguf_families(), *(name for name in gguf_families(experts=True) if name not in gguf_families())]
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"{where}: expected architecture {', '.join(known)}, got {shown(architecture)}; not a LLaMA model or a "
            "relative"
        )
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    count = values.get("expert_count")
    families = gguf_families(experts=bool(count))
    if architecture not in families:
        expected = "none" if count else "a positive integer"
        raise ValueError(f"{where}: expected {prefix}expert_count to be {expected}, got {shown(count)}")
    return _Fields(architecture, families[architecture], values, where)


def _checkpoint(file: GgufFile, spec: LlamaSpec, names: dict[str, str], permuted: bool) -> Checkpoint:
    """Return the tensors under Hugging Face names, with those that an empty sub-block does not have in the file."""
    absent = {name: shape for name, shape in _empty_shapes(spec).items() if name not in names}
    family = spec.constants.family
    shapes = {known: _shape(file, name, experts_side(known, family), spec) for known, name in names.items()}

    def read(name: str) -> np.ndarray:
        if name in absent:
            return np.ones(absent[name], np.float32)
        values = file.read(names[name])
        if (side := experts_side(name, family)) is not None:
            return side_by_side(values, side)
        if (offset := spec.constants.traits.norm_offset) and name.endswith("norm.weight"):
            return values - np.float32(offset)
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            widths = spec.layers[int(name.split(".")[2])]
            heads = widths.kv_heads * (widths.q_per_kv if "q_proj" in name else 1)
            return unpermute(values, heads)
        return values

    return Checkpoint(str(file.path), spec, shapes | absent, read)


def _shape(file: GgufFile, name: str, side: int | None, spec: LlamaSpec) -> tuple[int, ...]:
    """Return the shape of a tensor; of one of all experts, that of the matrix in which they lie side by side."""
    shape = file.tensors[name].shape
    if side is None:
        return shape
    experts = spec.layers[0].mlp
    if len(shape) != 3 or shape[0] != experts:
        raise ValueError(
            f"{file.path}: {name} has shape {list(shape)}, expected a matrix for each of {experts} experts"
        )
    return (shape[1], experts * shape[2]) if side else (experts * shape[1], shape[2])


def _empty_shapes(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """Return what belongs to layers without heads, or without channels: matrices of no size, and their norms."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, widths in enumerate(spec.layers):
        layer = f"model.layers.{index}"
        if widths.kv_heads == 0:
            shapes |= {f"{layer}.self_attn.{name}_proj.weight": (0, spec.embed) for name in "qkv"}
            shapes |= {f"{layer}.self_attn.o_proj.weight": (spec.embed, 0)}
            shapes |= {f"{layer}.input_layernorm.weight": (spec.embed,)}
        if widths.mlp == 0:
            shapes |= {f"{layer}.mlp.{name}_proj.weight": (0, spec.embed) for name in ("gate", "up")}
            shapes |= {f"{layer}.mlp.down_proj.weight": (spec.embed, 0)}
            shapes |= {f"{layer}.post_attention_layernorm.weight": (spec.embed,)}
    return shapes


def _spec(found: _Fields, file: GgufFile, tensors: list[str]) -> LlamaSpec:
    where, values, family, prefix = found.where, found.values, found.family, f"{found.architecture}."
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{where}: missing tensor token_embd.weight")
    if unknown := sorted(values.keys() - _READ - FAMILIES[family].gguf.keys):
        raise ValueError(f"{where}: unknown attributes {some([prefix + key for key in unknown])}")
    layers = _widths(found)
    embed = found.integer("embedding_length", "width")
    default = embed // (layers[0].kv_heads * layers[0].q_per_kv) if layers[0].kv_heads else None
    head_dim = found.integer("attention.key_length", "head size", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.integer(key, "head size", head_dim) != head_dim:
            raise ValueError(f"{where}: {prefix}{key} = {values[key]} is not supported, expected head_dim {head_dim}")
    ends = [_token(file, role) for role in ("eos", "eot", "eom")]
    constants = Constants(
        norm_eps=found.number("attention.layer_norm_rms_epsilon", "epsilon"),
        max_positions=found.integer("context_length", "positions"),
        bos_token=_token(file, "bos"),
        eos_tokens=tuple(dict.fromkeys(token for token in ends if token is not None)),
        family=family,
        **_routing(found),
        **_sights(found, len(layers)),
    )
    shape = file.tensors["token_embd.weight"].shape
    check_bounds(shape[0], "vocabulary", f"{where}: rows of token_embd.weight")
    return LlamaSpec(
        vocab=shape[0],
        embed=embed,
        head_dim=head_dim,
        layers=layers,
        tied="output.weight" not in tensors,
        output_biases=any(name.endswith(("attn_output.bias", "ffn_down.bias")) for name in tensors),
        constants=constants,
    )


def _routing(found: _Fields) -> dict[str, Any]:
    """Return the constants that only mixtures have; llama.cpp divides the weights of a token's experts by their sum."""
    if not FAMILIES[found.family].experts:
        return {}
    most, count = (found.integer(f"expert_{which}", "heads") for which in ("used_count", "count"))
    if most > count:
        key = f"{found.architecture}.expert_used_count"
        raise ValueError(f"{found.where}: expected {key} of at most {count} experts, got {most}")
    return {"experts_per_token": most, "route_scale": "sum_to_one"}


def _sights(found: _Fields, layers: int) -> dict[str, Any]:
    """Return how layers see positions: rotary base and scaling, window, and the layers apart from the rest."""
    traits, window = FAMILIES[found.family], None
    theta = found.number("rope.freq_base", "theta", LLAMA_CPP_THETA)
    main = {"rope_theta": theta, "rope_scaling": _scaling(found)}
    if found.values.get(key := "attention.sliding_window"):
        window = found.integer(key, "positions")
    if not traits.gguf.windows:
        return main | {"sliding_window": window}
    if layers == _OTHER_SCORES:
        raise ValueError(
            f"{found.where}: a {found.architecture} of {layers} layers (27B) divides its scores by another number than "
            "the size of a head, which the file does not say; load the Hugging Face directory of this model instead"
        )
    positions = found.integer("context_length", "positions")
    window = None if window is None or window >= positions else window
    local = all_but_each(traits.full_every, layers)
    own: dict[str, Any] = {"rope_theta": found.number("rope.freq_base_swa", "theta", traits.local_theta)}
    own |= {"sliding_window": window, "rope_scaling": None}
    return own if len(local) == layers else main | {"apart": Apart(layers=local, **own)}


def _token(file: GgufFile, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.fields.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < BOUNDS["vocabulary"][1]):
        raise ValueError(f"{file.path}: expected {key} to be a token id, got {shown(value)}")
    return value


def _widths(found: _Fields) -> tuple[LayerWidths, ...]:
    count = found.integer("block_count", "layers")
    heads = found.integers("attention.head_count", count, "heads")
    kv_heads = heads
    if "attention.head_count_kv" in found.values:
        kv_heads = found.integers("attention.head_count_kv", count, "heads")
    traits, layers = FAMILIES[found.family], []
    mlp = found.integers(traits.gguf.expert_channels, count, "channels")
    experts = found.integer("expert_count", "heads") if traits.experts else None
    for index, (queries, keys, channels) in enumerate(zip(heads, kv_heads, mlp, strict=True)):
        where = f"{found.where}: layer {index}"
        if (queries == 0) != (keys == 0):
            raise ValueError(f"{where} has {queries} attention heads on {keys} key/value heads; not supported")
        if keys and queries % keys:
            raise ValueError(f"{where}: {queries} attention heads are no multiple of {keys} key/value heads")
        if keys and not channels:  # llama.cpp skips such a layer as a whole, which no model here means
            raise ValueError(f"{where} has attention heads but no feed-forward channels; not supported")
        inner = {"mlp": channels} if experts is None else {"mlp": experts, "channels": max(1, channels)}
        layers.append(LayerWidths(kv_heads=keys, q_per_kv=queries // keys if keys else 1, **inner))
    if found.architecture != "deci" and (len(set(layers)) > 1 or not layers[0].kv_heads):
        arch = found.architecture
        kinds = shown(sorted({(widths.kv_heads, widths.q_per_kv, widths.mlp) for widths in layers}))
        raise ValueError(
            f"{found.where}: expected layers of equal widths for architecture {arch!r}, none without heads, got "
            f"layers of (key/value heads, query heads on each, channels) {kinds}"
        )
    return tuple(layers)


def _scaling(found: _Fields) -> RopeScaling | None:
    kind = found.values.get("rope.scaling.type", "linear" if "rope.scale_linear" in found.values else "none")
    if kind == "none":
        return None
    if kind != "linear":
        key = f"{found.architecture}.rope.scaling.type"
        raise ValueError(f"{found.where}: {key} = {shown(kind)} is not supported, expected 'none' or 'linear'")
    factor = found.number("rope.scaling.factor", "factor", found.number("rope.scale_linear", "factor", 1.0))
    return None if factor == 1 else RopeScaling(kind="linear", factor=factor)


def _scaling_of_factors(
    factors: np.ndarray, spec: LlamaSpec, where: str, fields: dict[str, Any] | None = None
) -> RopeScaling | None:
    """Recognise the frequency divisors of a llama3 scaling: Llama 3.1's and 3.2's, or with settings in our keys."""
    if np.all(factors == 1):
        return None
    if factors.ndim != 1 or not np.all((factors >= 1) & (factors <= BOUNDS["factor"][1])):
        raise ValueError(f"{where}: {ROPE_FACTORS} of shape {list(factors.shape)}, expected a row of divisors from 1")
    given = {name: fields[key] for name, key in SCALING_KEYS.items() if fields and key in fields}
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{where}: expected {SCALING_KEYS[name]} to be a number, got {shown(value)}")
        check_bounds(
            value, "positions" if name == "original_max_positions" else "factor", f"{where}: {SCALING_KEYS[name]}"
        )
    scaling = RopeScaling(**{"kind": "llama3", "factor": max(float(factors.max()), 1.0)} | given)
    expected = llama3_divisors(scaling, spec.constants.rope_theta, spec.head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{where}: {ROPE_FACTORS} is no llama3 scaling with low_freq_factor {scaling.low_freq_factor:g}, "
            f"high_freq_factor {scaling.high_freq_factor:g} and {scaling.original_max_positions} original positions; "
            "load the Hugging Face directory of this model instead"
        )
    return scaling


def _with_scaling(spec: LlamaSpec, scaling: RopeScaling | None, where: str) -> LlamaSpec:
    if spec.constants.rope_scaling is not None and scaling is not None:
        raise ValueError(f"{where}: both {ROPE_FACTORS} and rope.scaling.type are given, expected one")
    constants = dataclasses.replace(spec.constants, rope_scaling=scaling or spec.constants.rope_scaling)
    return dataclasses.replace(spec, constants=constants)
