"""Read GGUF files, dequantised tensor by tensor and presented under Hugging Face names.

Architecture `deci` has one number a layer, the others equal layers. What `deci` leaves out of a layer without heads or
channels (matrices of no size, a norm that nothing reads) is filled in.
"""

from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.llama.files.families import FAMILIES, Family, all_but_each, gguf_families
from saap_jax.llama.files.gguf_file import GgufFile, open_gguf_file
from saap_jax.llama.files.gguf_layout import (
    PERMUTED,
    ROPE_FACTORS,
    SCALING_KEYS,
    experts_side,
    hf_name,
    llama3_divisors,
    permute,
    side_by_side,
)
from saap_jax.llama.files.hf_groups import fused_groups, regrouped
from saap_jax.llama.files.hf_layout import Checkpoint
from saap_jax.llama.files.values import TOKEN, Kind, Values, checked, count, counts, number, per_layer, some
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling, check_bounds
from saap_jax.runtime.errors import reading, shown

_FIELDS: dict[str, Kind] = {
    "block_count": count("layers"),
    "context_length": count("positions"),
    "embedding_length": count("width"),
    "feed_forward_length": counts("channels"),
    "vocab_size": count("vocabulary"),
    "attention.head_count": counts("heads"),
    "attention.head_count_kv": counts("heads"),
    "attention.key_length": count("head size"),
    "attention.value_length": count("head size"),
    "attention.layer_norm_rms_epsilon": number("epsilon"),
    "rope.freq_base": number("theta"),
    "rope.dimension_count": count("head size"),
    "rope.scale_linear": number("factor"),
    "rope.scaling.type": Kind("a text", lambda value: isinstance(value, str)),
    "rope.scaling.factor": number("factor"),
    "rope.scaling.original_context_length": Kind("a number", lambda value: True),
    "rope.scaling.finetuned": Kind("true or false", lambda value: True),
    "expert_count": Kind("a non-negative integer", lambda value: type(value) is int and value >= 0),
    "expert_used_count": count("heads"),
}
"""Attributes that are read of all architectures, without the name of the architecture before them."""

_OWN = {
    "expert_feed_forward_length": counts("channels"),
    "attention.sliding_window": Kind("a non-negative integer", lambda value: type(value) is int and value >= 0),
    "rope.freq_base_swa": number("theta"),
}
"""The same of families that name them as `Gguf.keys`."""

_FACTORS = {
    SCALING_KEYS[name]: number("positions" if name == "original_max_positions" else "factor") for name in SCALING_KEYS
}

LLAMA_CPP_THETA = 10_000.0
"""The rotary base of a file that says none, of any architecture."""

_OTHER_SCORES = 62
"""Layers of the one `gemma3` whose scores llama.cpp scales otherwise, which it tells by their number."""


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file as a checkpoint; refuses by name what the model cannot express.

    Raises:
        ValueError: an unknown architecture, attribute or tensor; sizes that are not plausible.
    """
    with reading(path, "the metadata of a model"):
        file = open_gguf_file(path)
        found, architecture, name = _attributes(file)
        family = FAMILIES[name]
        tensors = [each for each in file.tensors if each != ROPE_FACTORS]
        spec = _spec(found, file, architecture, name)
        names = {}
        for each in tensors:
            if (known := hf_name(each, name)) is None:
                raise ValueError(f"{path}: unknown tensor {some([each])}; not a plain LLaMA model, or {architecture}")
            names[known] = each
        checkpoint = _checkpoint(file, spec, names, architecture in PERMUTED)
        return regrouped(checkpoint, fused_groups(spec) if family.fused else [])


def _attributes(file: GgufFile) -> tuple[Values, str, str]:
    """Return the attributes of a model, its architecture, and its family: one with experts if the file counts any."""
    architecture, where = file.fields.get("general.architecture"), str(file.path)
    known = list(dict.fromkeys([*gguf_families(), *gguf_families(experts=True)]))
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"{where}: expected architecture {', '.join(known)}, got {shown(architecture)}; not a LLaMA model or a "
            "relative"
        )
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    experts = values.get("expert_count")
    families = gguf_families(experts=bool(experts))
    if architecture not in families:
        expected = "none" if experts else "a positive integer"
        raise ValueError(f"{where}: expected {prefix}expert_count to be {expected}, got {shown(experts)}")
    kinds = _FIELDS | {key: _OWN[key] for key in FAMILIES[families[architecture]].gguf.keys}
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(f"{where}: unknown attributes {some([prefix + key for key in unknown])}")
    return checked(values, kinds, where, prefix), architecture, families[architecture]


def _number(value: float) -> float:
    """Return the shortest decimal that a float32 stands for, such as 1e-05."""
    return float(str(np.float32(value)))


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
            return permute(values, widths.kv_heads * (widths.q_per_kv if "q_proj" in name else 1), undo=True)
        return values

    return Checkpoint(str(file.path), spec, shapes | absent, read)


def _shape(file: GgufFile, name: str, side: int | None, spec: LlamaSpec) -> tuple[int, ...]:
    """Return the shape of a tensor; of one of all experts, that of the matrix in which they lie side by side."""
    shape, experts = file.shape(name), spec.layers[0].mlp
    if side is None:
        return shape
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
        for width, block, inputs, output, norm in (
            (widths.kv_heads, "self_attn", ("q", "k", "v"), "o", "input"),
            (widths.mlp, "mlp", ("gate", "up"), "down", "post_attention"),
        ):
            if width == 0:
                shapes |= {f"{layer}.{block}.{each}_proj.weight": (0, spec.embed) for each in inputs}
                shapes[f"{layer}.{block}.{output}_proj.weight"] = (spec.embed, 0)
                shapes[f"{layer}.{norm}_layernorm.weight"] = (spec.embed,)
    return shapes


def _spec(found: Values, file: GgufFile, architecture: str, name: str) -> LlamaSpec:
    where, family = found.where, FAMILIES[name]
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{where}: missing tensor token_embd.weight")
    layers, embed = _widths(found, architecture, family), found["embedding_length"]
    if "attention.key_length" not in found and layers[0].kv_heads:
        found["attention.key_length"] = embed // (layers[0].kv_heads * layers[0].q_per_kv)
    head_dim = found["attention.key_length"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{where}: {found.prefix}{key} = {found[key]} is not supported, expected head_dim {head_dim}"
            )
    how = _sights(found, family, len(layers))
    if ROPE_FACTORS in file.tensors:
        scaling = _scaling_of_factors(file.read(ROPE_FACTORS), how["rope_theta"], head_dim, where, file.fields)
        if how["rope_scaling"] is not None and scaling is not None:
            raise ValueError(f"{where}: both {ROPE_FACTORS} and rope.scaling.type are given, expected one")
        how["rope_scaling"] = scaling or how["rope_scaling"]
    if family.experts:  # llama.cpp divides the weights of a token's experts by their sum
        most, experts = found["expert_used_count"], found["expert_count"]
        if most > experts:
            raise ValueError(
                f"{where}: expected {found.prefix}expert_used_count of at most {experts} experts, got {most}"
            )
        how |= {"experts_per_token": most, "route_scale": "sum_to_one"}
    ids = {role: f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "eot", "eom")}
    tokens = checked(file.fields, dict.fromkeys(ids.values(), TOKEN), where)
    ends = [tokens.get(ids[role]) for role in ("eos", "eot", "eom")]
    vocab = file.shape("token_embd.weight")[0]
    check_bounds(vocab, "vocabulary", f"{where}: rows of token_embd.weight")
    return LlamaSpec(
        vocab=vocab,
        embed=embed,
        head_dim=head_dim,
        layers=layers,
        tied="output.weight" not in file.tensors,
        output_biases=any(each.endswith(("attn_output.bias", "ffn_down.bias")) for each in file.tensors),
        constants=Constants(
            norm_eps=_number(found["attention.layer_norm_rms_epsilon"]),
            max_positions=found["context_length"],
            bos_token=tokens.get(ids["bos"]),
            eos_tokens=tuple(dict.fromkeys(end for end in ends if end is not None)),
            family=name,
            **how,
        ),
    )


def _sights(found: Values, family: Family, layers: int) -> dict[str, Any]:
    """Return how layers see positions: rotary base and scaling, window, and the layers apart from the rest."""
    kind = found.get("rope.scaling.type", "linear" if "rope.scale_linear" in found else "none")
    if kind not in ("none", "linear"):
        key = f"{found.prefix}rope.scaling.type"
        raise ValueError(f"{found.where}: {key} = {shown(kind)} is not supported, expected 'none' or 'linear'")
    factor = _number(found.get("rope.scaling.factor", found.get("rope.scale_linear", 1.0))) if kind == "linear" else 1.0
    scaling = None if factor == 1 else RopeScaling(kind="linear", factor=factor)
    main: dict[str, Any] = {
        "rope_theta": _number(found.get("rope.freq_base", LLAMA_CPP_THETA)),
        "rope_scaling": scaling,
    }
    window = found.get("attention.sliding_window") or None
    if not family.gguf.windows:
        return main | {"sliding_window": window}
    if layers == _OTHER_SCORES:
        raise ValueError(
            f"{found.where}: a gemma3 of {layers} layers (27B) divides its scores by another number than the size of a "
            "head, which the file does not say; load the Hugging Face directory of this model instead"
        )
    window = None if window is None or window >= found["context_length"] else window
    local = all_but_each(family.full_every, layers)
    own: dict[str, Any] = {"rope_theta": _number(found.get("rope.freq_base_swa", family.local_theta))}
    own |= {"sliding_window": window, "rope_scaling": None}
    return own if len(local) == layers else main | {"apart": Apart(layers=local, **own)}


def _widths(found: Values, architecture: str, family: Family) -> tuple[LayerWidths, ...]:
    layers, where = found["block_count"], found.where

    def each(key: str) -> list[int]:
        return per_layer(found[key], layers, f"{found.prefix}{key}", where)

    heads = each("attention.head_count")
    kv_heads = each("attention.head_count_kv") if "attention.head_count_kv" in found else heads
    widths = []
    for layer, (queries, keys, mlp) in enumerate(zip(heads, kv_heads, each(family.gguf.expert_channels), strict=True)):
        if (queries == 0) != (keys == 0) or (keys and queries % keys):
            raise ValueError(
                f"{where}: layer {layer}: {queries} attention heads are no multiple of {keys} key/value heads"
            )
        if keys and not mlp:  # llama.cpp skips such a layer as a whole, which no model here means
            raise ValueError(f"{where}: layer {layer} has attention heads but no feed-forward channels; not supported")
        inner = {"mlp": found["expert_count"], "channels": max(1, mlp)} if family.experts else {"mlp": mlp}
        widths.append(LayerWidths(kv_heads=keys, q_per_kv=queries // keys if keys else 1, **inner))
    if architecture != "deci" and (len(set(widths)) > 1 or not widths[0].kv_heads):
        kinds = shown(sorted({(each.kv_heads, each.q_per_kv, each.mlp) for each in widths}))
        raise ValueError(
            f"{where}: expected layers of equal widths for architecture {architecture!r}, none without heads, got "
            f"layers of (key/value heads, query heads on each, channels) {kinds}"
        )
    return tuple(widths)


def _scaling_of_factors(
    factors: np.ndarray, theta: float, head_dim: int, where: str, fields: dict[str, Any]
) -> RopeScaling | None:
    """Recognise the frequency divisors of a llama3 scaling: Llama 3.1's and 3.2's, or with settings in our keys."""
    if np.all(factors == 1):
        return None
    ours = checked({key: fields[key] for key in _FACTORS if key in fields}, _FACTORS, where)
    given = {name: ours[key] for name, key in SCALING_KEYS.items() if key in ours}
    scaling = RopeScaling(**{"kind": "llama3", "factor": max(float(factors.max()), 1.0)} | given)
    expected = llama3_divisors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{where}: {ROPE_FACTORS} is no llama3 scaling with low_freq_factor {scaling.low_freq_factor:g}, "
            f"high_freq_factor {scaling.high_freq_factor:g} and {scaling.original_max_positions} original positions; "
            "load the Hugging Face directory of this model instead"
        )
    return scaling
