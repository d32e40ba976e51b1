"""Hugging Face `config.json` <-> `LlamaSpec`: what the config of a family may say, and what is refused by name.

A dense model, or one whose layers were all cut alike, is a plain config of its family, such as `llama`. Layers of
different widths have no place in it, nor has a bias of the output projections alone, so such a model says `model_type:
"saap_llama"` with its `family` and one number a layer: other readers refuse it instead of misreading it. A plain
`llama` config may say that all projections have biases; all but those of the output projections must then be zero.
"""

from typing import Any

from saap_jax.llama.files.families import FAMILIES, Family
from saap_jax.llama.files.hf_sight import sight_keys, sights_of
from saap_jax.llama.files.values import (
    FLAG,
    OBJECT,
    TOKEN,
    TOKENS,
    Kind,
    Values,
    checked,
    count,
    counts,
    number,
    per_layer,
    some,
)
from saap_jax.llama.quantized import MATRICES, PLANES, Quantization
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec
from saap_jax.runtime.errors import reading, shown

PER_LAYER_TYPE = "saap_llama"
"""`model_type` of a config with one width a layer."""

_FIELDS: dict[str, Kind] = {
    "vocab_size": count("vocabulary"),
    "hidden_size": count("width"),
    "head_dim": count("head size"),
    "num_hidden_layers": count("layers"),
    "num_attention_heads": count("heads"),
    "num_key_value_heads": count("heads"),
    "intermediate_size": count("channels"),
    "rms_norm_eps": number("epsilon"),
    "max_position_embeddings": count("positions"),
    "tie_word_embeddings": FLAG,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKENS,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_local_base_freq": number("theta"),
    "query_pre_attn_scalar": count("head size"),
    "use_sliding_window": FLAG,
    "sliding_window": Kind("a positive integer or null", lambda value: type(value) is int and value >= 1),
    "max_window_layers": Kind("a non-negative integer", lambda value: type(value) is int and value >= 0),
    "sliding_window_pattern": count("layers"),
    "_sliding_window_pattern": count("layers"),
    "num_experts": count("heads"),
    "num_local_experts": count("heads"),
    "num_experts_per_tok": count("heads"),
    "moe_intermediate_size": count("channels"),
    "norm_topk_prob": FLAG,
}
"""Keys of plain configs -> what they may be."""

_OUTPUT_BIASES = "output_biases"
"""True when attention output and MLP down projection, and no other matrices, add a bias."""

_QUANTIZATION = "saap_quantization"
"""How the matrices are quantised: bits, group_size and their names; absent where none is."""

_LISTS = {"num_key_value_heads": "heads", "num_attention_heads": "heads", "query_heads_per_kv_head": "heads"}
_LISTS |= {"intermediate_size": "channels"}
"""Keys with a number a layer -> the quantity that it is."""

_LISTS_OF_EXPERTS = {"num_experts": "heads", "num_local_experts": "heads", "channels": "channels"}

_PER_LAYER_FIELDS = _FIELDS | {key: counts(quantity) for key, quantity in (_LISTS | _LISTS_OF_EXPERTS).items()}
_PER_LAYER_FIELDS |= {_OUTPUT_BIASES: FLAG}

_NULL = {"sliding_window", "bos_token_id", "eos_token_id"}
"""Keys where null says that there is none; elsewhere it stands for the default."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
"""Keys that change the computation of any family -> the values that this model computes."""

_PER_LAYER_ONLY = {
    "architectures": (None, ["SaapLlamaForCausalLM"]),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
"""The same, of a config with one width a layer, in place of those of its family."""

_READ = {
    *("model_type", "vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id"),
}

_PER_LAYER_READ = {
    *("query_heads_per_kv_head", _OUTPUT_BIASES, _QUANTIZATION, "auto_map", "family", "sliding_window"),
    *("layer_types", "rope_local_base_freq", "query_pre_attn_scalar", "channels"),
}

_HARMLESS = {
    *("_name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation", "attention_dropout", "dtype"),
    *("torch_dtype", "transformers_version", "transformers.js_config", "initializer_range", "pad_token_id"),
    *("pretraining_tp", "use_cache", "max_sequence_length", "output_attentions", "output_hidden_states"),
    *("return_dict", "torchscript", "use_bfloat16", "problem_type", "id2label", "label2id", "is_decoder"),
    *("chunk_size_feed_forward", "cross_attention_hidden_size", "unsloth_version", "unsloth_fixed"),
}
"""Keys that say nothing about the logits of a language model (training, bookkeeping, generation)."""

_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}

# --- read ------------------------------------------------------------------------------------------


def spec_from_config(config: dict[str, Any], where: str) -> LlamaSpec:
    """Read the spec that a `config.json` describes; `where` names it in errors.

    Missing keys have the defaults of the family's class in transformers, except sizes, which must be there. Refuses
    (`ValueError`, one line) other model types, unsupported attributes, keys that it does not know, and numbers beyond
    `spec.BOUNDS`.
    """
    with reading(where, "the config of a model"):
        return _spec(config, where)


def _spec(config: dict[str, Any], where: str) -> LlamaSpec:
    by_layer = config.get("model_type") == PER_LAYER_TYPE
    key = "family" if by_layer else "model_type"
    name = config.get(key, "llama" if by_layer else None)
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where}: expected {key} {', '.join(FAMILIES)}, got {shown(name)}; not a LLaMA model or a relative"
        )
    family = FAMILIES[name]
    _refuse_unsupported(config, where, family, by_layer)
    defaults = _DEFAULTS | ({} if by_layer else {k: v for k, v in family.defaults.items() if k != "rope_theta"})
    given = {key: value for key, value in config.items() if value is not None or key in _NULL}
    if "num_key_value_heads" in config:  # null says that there are as many as query heads
        given.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    found = checked(defaults | given, _PER_LAYER_FIELDS if by_layer else _FIELDS, where)
    embed, layers = found["hidden_size"], _layer_lists(found, family) if by_layer else _equal_layers(found, family)
    if "head_dim" not in found:
        heads = layers[0].kv_heads * layers[0].q_per_kv
        if by_layer:
            raise ValueError(f"{where}: expected an explicit head_dim beside per-layer widths, got none")
        if embed % heads:
            raise ValueError(
                f"{where}: hidden_size {embed} is no multiple of num_attention_heads {heads}; add head_dim"
            )
        found["head_dim"] = embed // heads
    ends = found.get("eos_token_id", [])
    scalar = found.get("query_pre_attn_scalar")
    biases = found.get("attention_bias", False)
    if not by_layer and family.plain_biases and biases != (of_mlp := found.get("mlp_bias", False)):
        raise ValueError(
            f"{where}: attention_bias = {biases} with mlp_bias = {of_mlp} is not supported, expected both alike"
        )
    how: dict[str, Any] = sights_of(found, family, len(layers), per_layer=by_layer)
    if (mixture := family.mixture) is not None:
        summed = mixture.summed is None or found.get(mixture.summed, family.defaults.get(mixture.summed, False))
        how |= {"experts_per_token": found["num_experts_per_tok"], "route_scale": "sum_to_one" if summed else "kept"}
    return LlamaSpec(
        vocab=found["vocab_size"],
        embed=embed,
        head_dim=found["head_dim"],
        layers=layers,
        tied=found.get("tie_word_embeddings", False),
        output_biases=biases if family.plain_biases and not by_layer else found.get(_OUTPUT_BIASES, False),
        constants=Constants(
            norm_eps=float(found["rms_norm_eps"]),
            max_positions=found["max_position_embeddings"],
            bos_token=_tokens(found.get("bos_token_id", []))[0],
            eos_tokens=tuple(end for end in _tokens(ends) if end is not None),
            family=name,
            query_scalar=None if scalar == found["head_dim"] else scalar,
            **how,
        ),
    )


def _tokens(given: int | list[int]) -> list[int | None]:
    """Return token ids; a negative number stands for none, and so does no number at all."""
    tokens = given if isinstance(given, list) else [given]
    return [token if token >= 0 else None for token in tokens] or [None]


def _refuse_unsupported(config: dict[str, Any], where: str, family: Family, by_layer: bool) -> None:
    only = _ONLY | (_PER_LAYER_ONLY | {"hidden_act": (None, family.activation)} if by_layer else dict(family.only))
    known = _READ | _HARMLESS | only.keys() | (_PER_LAYER_READ if by_layer else family.read | family.harmless)
    known |= family.mixture.keys if family.mixture is not None else frozenset()
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"{where}: unknown attributes {some(unknown)}; they may change what the model computes, "
            "so remove them only if you know that they do not"
        )
    for key, values in only.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{where}: {key} = {shown(config[key])} is not supported, expected {values[-1]!r}")


def _equal_layers(found: Values, family: Family) -> tuple[LayerWidths, ...]:
    heads = found["num_attention_heads"]
    if "num_key_value_heads" not in found and family.groups_said:
        raise ValueError(
            f"{found.where}: expected num_key_value_heads, got none; a {found['model_type']} config must say it"
        )
    kv_heads = found.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"{found.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    inner: dict[str, int] = {"mlp": found["intermediate_size"]} if family.mixture is None else {}
    if family.mixture is not None:
        most, inner = found["num_experts_per_tok"], {"mlp": _experts(found, family)[1]}
        if most > inner["mlp"]:
            raise ValueError(
                f"{found.where}: expected num_experts_per_tok of at most {inner['mlp']} experts, got {most}"
            )
        inner["channels"] = found[family.mixture.channels]
    return (LayerWidths(kv_heads=kv_heads, q_per_kv=heads // kv_heads, **inner),) * found["num_hidden_layers"]


def _experts(found: Values, family: Family) -> tuple[str, Any]:
    """Return how many experts a layer has, a number or a list, and the key that says it."""
    assert family.mixture is not None
    given = {key: found[key] for key in family.mixture.counts if key in found}
    if not given or any(value != next(iter(given.values())) for value in given.values()):
        keys = " and ".join(family.mixture.counts)
        raise ValueError(f"{found.where}: expected the same experts a layer in {keys}, got {shown(given)}")
    return next(iter(given.items()))


def _layer_lists(found: Values, family: Family) -> tuple[LayerWidths, ...]:
    layers, where = found["num_hidden_layers"], found.where
    keys = [*_LISTS, *(() if family.mixture is None else (_experts(found, family)[0],))]
    for key in keys:
        if not isinstance(found.get(key), list):
            raise ValueError(f"{where}: expected {key} to be {layers} non-negative integers, got {found.get(key)}")
    kv_heads, heads, q_per_kv, mlp, *counted = (per_layer(found[key], layers, key, where) for key in keys)
    for layer, (each, pair, group) in enumerate(zip(heads, kv_heads, q_per_kv, strict=True)):
        if each != pair * group:
            raise ValueError(
                f"{where}: layer {layer} has {each} attention heads, expected {pair} x {group} "
                "(num_key_value_heads x query_heads_per_kv_head)"
            )
    inner: list[dict[str, int]] = [{"mlp": width} for width in mlp]
    if counted:
        channels = per_layer(found["channels"], layers, "channels", where)
        inner = [{"mlp": number, "channels": width} for number, width in zip(counted[0], channels, strict=True)]
    return tuple(
        LayerWidths(kv_heads=pair, q_per_kv=group, **widths)
        for pair, group, widths in zip(kv_heads, q_per_kv, inner, strict=True)
    )


def quantization_from_config(config: dict[str, Any], where: str) -> Quantization | None:
    """Read how the matrices of a checkpoint are quantised; None if they are floats."""
    entry = config.get(_QUANTIZATION)
    if entry is None:
        return None
    names = entry.get("matrices") if isinstance(entry, dict) else None
    if (
        not isinstance(names, list)
        or entry.keys() != set(Quantization._fields)
        or names != [name for name in MATRICES if name in names]
        or type(entry["bits"]) is not int
        or entry["bits"] not in PLANES
    ):
        raise ValueError(
            f"{where}: expected {_QUANTIZATION} to have bits ({', '.join(map(str, PLANES))}), group_size and matrices "
            f"(some of {', '.join(MATRICES)}, in this order), got {shown(entry)}"
        )
    size = checked(entry, {"group_size": count("channels")}, where, f"{_QUANTIZATION}: ")["group_size"]
    if any(size * width % 8 for width in PLANES[entry["bits"]]):
        raise ValueError(f"{where}: expected a group_size of whole bytes at {entry['bits']} bits, got {size}")
    return Quantization(entry["bits"], size, tuple(names))


# --- written ---------------------------------------------------------------------------------------


def config_from_spec(spec: LlamaSpec, dtype: str, *, per_layer: bool | None = None) -> dict[str, Any]:
    """Make the `config.json` of a model: plain, of its family, if its layers are alike, none is empty and no biases
    were added, else per layer; `per_layer` says it for a checkpoint that is written otherwise.

    A plain `llama` config of a model with output biases says that all projections have one; other families have none.
    """
    first, constants, layers = spec.layers[0], spec.constants, spec.layers
    family, eos = constants.traits, constants.eos_tokens
    by_layer = not fits_plain_config(spec) or spec.output_biases if per_layer is None else per_layer
    if by_layer:
        sizes: dict[str, Any] = {
            "model_type": PER_LAYER_TYPE,
            "num_key_value_heads": [layer.kv_heads for layer in layers],
            "num_attention_heads": [layer.kv_heads * layer.q_per_kv for layer in layers],
            "query_heads_per_kv_head": [layer.q_per_kv for layer in layers],
            "intermediate_size": [layer.channels or layer.mlp for layer in layers],
            _OUTPUT_BIASES: spec.output_biases,
            **({"family": constants.family} if constants.family != "llama" else {}),
        }
    else:
        sizes = {
            "architectures": [family.architecture],
            "model_type": constants.family,
            "num_key_value_heads": first.kv_heads,
            "num_attention_heads": first.kv_heads * first.q_per_kv,
            "intermediate_size": first.channels or first.mlp,
        }
    if by_layer or family.plain_biases:
        sizes |= dict.fromkeys(("attention_bias", "mlp_bias"), spec.output_biases and not by_layer)
    if constants.query_scalar is not None or "query_pre_attn_scalar" in family.read:
        sizes["query_pre_attn_scalar"] = constants.query_scalar or spec.head_dim
    if (mixture := family.mixture) is not None:
        experts, channels = [layer.mlp for layer in layers], [layer.channels for layer in layers]
        sizes |= dict.fromkeys(mixture.counts, experts if by_layer else experts[0])
        sizes["channels" if by_layer else mixture.channels] = channels[0] if len(set(channels)) == 1 else channels
        sizes["num_experts_per_tok"] = constants.experts_per_token
        sizes |= {mixture.summed: constants.route_scale == "sum_to_one"} if mixture.summed else {}
    sights = sight_keys(constants, len(layers), per_layer=by_layer)
    return sizes | {
        **({} if by_layer else dict(family.written)),
        "vocab_size": spec.vocab,
        "hidden_size": spec.embed,
        "head_dim": spec.head_dim,
        "num_hidden_layers": len(layers),
        "hidden_act" if by_layer else family.activation_key: family.activation,
        "tie_word_embeddings": spec.tied,
        "rms_norm_eps": constants.norm_eps,
        "max_position_embeddings": constants.max_positions,
        **sights,
        "bos_token_id": constants.bos_token,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        "torch_dtype": dtype,
    }


def quantization_to_config(quantization: Quantization) -> dict[str, Any]:
    """Make the entry of a per-layer `config.json` that says how matrices are quantised."""
    return {_QUANTIZATION: quantization._asdict() | {"matrices": list(quantization.matrices)}}


def fits_plain_config(spec: LlamaSpec) -> bool:
    """Say whether a plain config can hold the model: layers all alike, with heads and channels, or enough experts.

    Biases of the output projections have a place in family `llama` alone.
    """
    least = spec.constants.experts_per_token or 1
    alike = spec.uniform and spec.layers[0].kv_heads > 0 and spec.layers[0].mlp >= least
    return alike and (spec.constants.traits.plain_biases or not spec.output_biases)
