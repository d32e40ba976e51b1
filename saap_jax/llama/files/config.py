"""Hugging Face `config.json` <-> `LlamaSpec`: what the config of a family may say, and what is refused by name.

A dense model, or one whose layers were all cut alike, is a plain config of its family, such as `llama`. Layers of
different widths have no place in it, nor has a bias of the output projections alone, so such a model says `model_type:
"saap_llama"` with its `family` and, in transformers' schema, `per_layer_config`: other readers refuse it instead of
misreading it. Earlier versions wrote one number a layer in lists, which are read too. A plain `llama` config may say
that all projections have biases; all but those of the output projections must then be zero.
"""

from collections.abc import Mapping
from typing import Any

from saap_jax.errors import reading, shown
from saap_jax.llama.files.families import FAMILIES, Family, all_but_each
from saap_jax.llama.files.per_layer import BLOCKS, LAYERS, NAS_TYPE, listed, sparse
from saap_jax.llama.quantized import MATRICES, PLANES, Quantization
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling, Values, checked, per_layer, some

PER_LAYER_TYPE = "saap_llama"
"""`model_type` of a config with one width a layer."""

_OUTPUT_BIASES = "output_biases"
"""True when attention output and MLP down projection, and no other matrices, add a bias."""

_QUANTIZATION = "saap_quantization"
"""How the matrices are quantised: bits, group_size and their names; absent where none is."""

_KINDS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "head size": "head_dim query_pre_attn_scalar",
    "layers": "num_hidden_layers sliding_window_pattern _sliding_window_pattern",
    "heads*": "num_attention_heads num_key_value_heads query_heads_per_kv_head num_experts num_local_experts",
    "heads": "num_experts_per_tok",
    "channels*": "intermediate_size moe_intermediate_size channels",
    "positions": "max_position_embeddings sliding_window",
    "count": "max_window_layers",
    "epsilon": "rms_norm_eps",
    "theta": "rope_local_base_freq",
    "token": "bos_token_id",
    "token*": "eos_token_id",
    "an object": "rope_parameters rope_scaling",
    "true or false": "tie_word_embeddings attention_bias mlp_bias use_sliding_window norm_topk_prob output_biases",
}
_FIELDS = {key: kind for kind, keys in _KINDS.items() for key in keys.split()}
"""Keys -> what they may be, see `spec.checked`; a list has one number a layer."""

_BY_LAYER = {key: kind.rstrip("*") for kind in ("heads*", "channels*") for key in _KINDS[kind].split()}
_BY_LAYER.pop("query_heads_per_kv_head")
"""Keys that may differ from layer to layer -> what they may be."""

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

_READ = {
    *("model_type", "vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id"),
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

_FULL = "full_attention"
_SLIDING = "sliding_attention"

_ORIGINAL = "original_max_position_embeddings"
_FACTORS = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), "factor")
_ROPE = {"default": {}, "linear": {"factor": "factor"}, "llama3": _FACTORS | {_ORIGINAL: "positions"}}
"""Rope type -> its settings."""

# --- read ------------------------------------------------------------------------------------------


def per_layer_form(family: Family) -> Family:
    """Describe configs with one width a layer of a family, as if they were those of another one."""
    read = ("query_heads_per_kv_head", _OUTPUT_BIASES, _QUANTIZATION, "auto_map", "family", "sliding_window", LAYERS)
    only = dict.fromkeys(("attention_bias", "mlp_bias"), (None, False)) | {"hidden_act": (None, family.activation)}
    return family._replace(
        architecture="SaapLlamaForCausalLM",
        activation_key="hidden_act",
        plain_biases=False,
        groups_said=True,
        windowed=False,
        window_by_layer=True,
        window_switch=False,
        full_every=0,
        only=only | {"architectures": (None, ["DeciLMForCausalLM"], ["SaapLlamaForCausalLM"])},
        read=frozenset({*read, BLOCKS, "qkv_bias", "rope_local_base_freq", "query_pre_attn_scalar"}),
        defaults={},
        harmless=frozenset(),
        written={},
        mixture=family.mixture and family.mixture._replace(channels="channels"),
    )


def spec_from_config(config: dict[str, Any], where: str) -> LlamaSpec:
    """Read the spec that a `config.json` describes; `where` names it in errors.

    Missing keys have the defaults of the family's class in transformers, except sizes, which must be there. Refuses
    (`ValueError`, one line) other model types, unsupported attributes, keys that it does not know, and numbers beyond
    `spec.BOUNDS`.
    """
    with reading(where, "the config of a model"):
        return _spec(config, where)


def _spec(config: dict[str, Any], where: str) -> LlamaSpec:
    by_layer = config.get("model_type") in (PER_LAYER_TYPE, NAS_TYPE)
    key = "family" if by_layer else "model_type"
    name = config.get(key, "llama" if by_layer else None)
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where}: expected {key} {', '.join(FAMILIES)}, got {shown(name)}; not a LLaMA model or a relative"
        )
    if by_layer:
        family = per_layer_form(FAMILIES[name])
    else:
        family = FAMILIES[name]
    _refuse_unsupported(config, where, family)
    if by_layer:
        config = listed(config, _BY_LAYER, family.mixture.counts if family.mixture else ("intermediate_size",), where)
    defaults = _DEFAULTS | {k: v for k, v in family.defaults.items() if k != "rope_theta"}
    given = {key: value for key, value in config.items() if value is not None or key in _NULL}
    if "num_key_value_heads" in config or not family.groups_said:  # else as many as query heads
        given.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    found = checked(defaults | given, _FIELDS, where)
    embed = found["hidden_size"]
    layers = _widths(found, family, by_layer)
    if "head_dim" not in found:
        heads = layers[0].kv_heads * layers[0].q_per_kv
        if not heads or embed % heads:
            raise ValueError(
                f"{where}: expected head_dim, or a hidden_size that is a multiple of num_attention_heads, "
                f"got hidden_size {embed} and {heads} heads; add head_dim"
            )
        found["head_dim"] = embed // heads
    biases = found.get("attention_bias", False)
    if family.plain_biases and biases != (of_mlp := found.get("mlp_bias", False)):
        raise ValueError(
            f"{where}: attention_bias = {biases} with mlp_bias = {of_mlp} is not supported, expected both alike"
        )
    how: dict[str, Any] = _sights(found, family, len(layers))
    if (mixture := family.mixture) is not None:
        summed = mixture.summed is None or found.get(mixture.summed, family.defaults.get(mixture.summed, False))
        how |= {"experts_per_token": found["num_experts_per_tok"], "route_scale": "sum_to_one" if summed else "kept"}
    begins, ends = (_tokens(found.get(key)) for key in ("bos_token_id", "eos_token_id"))
    scalar = found.get("query_pre_attn_scalar")
    return LlamaSpec(
        vocab=found["vocab_size"],
        embed=embed,
        head_dim=found["head_dim"],
        layers=layers,
        tied=found.get("tie_word_embeddings", False),
        output_biases=biases if family.plain_biases else found.get(_OUTPUT_BIASES, False),
        constants=Constants(
            norm_eps=float(found["rms_norm_eps"]),
            max_positions=found["max_position_embeddings"],
            bos_token=begins[0] if begins else None,
            eos_tokens=ends,
            family=name,
            query_scalar=None if scalar == found["head_dim"] else scalar,
            **how,
        ),
    )


def _tokens(given: int | list[int] | None) -> tuple[int, ...]:
    """Return token ids, of one or some; a negative number stands for none."""
    if isinstance(given, list):
        tokens = given
    else:
        tokens = [-1 if given is None else given]
    return tuple(token for token in tokens if token >= 0)


def _refuse_unsupported(config: dict[str, Any], where: str, family: Family) -> None:
    only = _ONLY | family.allowed
    if unknown := sorted(config.keys() - (_READ | _HARMLESS | only.keys() | family.keys | family.harmless)):
        raise ValueError(
            f"{where}: unknown attributes {some(unknown)}; they may change what the model computes, "
            "so remove them only if you know that they do not"
        )
    for key, values in only.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{where}: {key} = {shown(config[key])} is not supported, expected {values[-1]!r}")


def _widths(found: Values, family: Family, by_layer: bool) -> tuple[LayerWidths, ...]:
    """Read the widths of all layers, of lists or of one number for all."""
    layers = found["num_hidden_layers"]
    where = found.where
    mixture = family.mixture

    def each(key: str) -> list[int]:
        return per_layer(found[key], layers, key, where)

    heads = each("num_attention_heads")
    kv_heads = each("num_key_value_heads")
    group_key = "query_heads_per_kv_head"
    pairs = zip(heads, kv_heads, strict=True)
    if group_key in found:
        groups = each(group_key)
    else:
        groups = [max(1, queries // max(keys, 1)) for queries, keys in pairs]
    if mixture is None:
        inner = [{"mlp": width} for width in each("intermediate_size")]
    else:
        said = {key: found[key] for key in mixture.counts if key in found} or {mixture.counts[0]: None}
        if any(count != next(iter(said.values())) for count in said.values()):
            raise ValueError(f"{where}: expected one number of experts in {' and '.join(said)}, got others")
        experts = each(next(iter(said)))
        most = next(iter(said.values()))
        asked = found["num_experts_per_tok"]
        if not by_layer and isinstance(most, int) and asked > most:
            raise ValueError(f"{where}: expected num_experts_per_tok of at most {most} experts, got {asked}")
        inner = [{"mlp": n, "channels": width} for n, width in zip(experts, each(mixture.channels), strict=True)]
    widths = []
    for layer, (queries, keys, group, units) in enumerate(zip(heads, kv_heads, groups, inner, strict=True)):
        if queries != keys * group:
            raise ValueError(
                f"{where}: layer {layer} has {queries} attention heads (num_attention_heads), expected a multiple of "
                f"num_key_value_heads {keys}, {keys} x {group}"
            )
        widths.append(LayerWidths(kv_heads=keys, q_per_kv=group, **units))
    return tuple(widths)


def _sights(config: Values, family: Family, layers: int) -> dict[str, Any]:
    """Read how layers see positions: rotary base and scaling, window, and the layers apart from the rest."""
    theta, scaling, local = _rope(config, family)
    main: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    own: dict[str, Any] = dict(main) if local is None else {"rope_theta": local, "rope_scaling": None}
    window = config.get("sliding_window")
    if family.window_switch and not config.get("use_sliding_window"):
        window = None
    windowed = _local_layers(config, family, window, layers)
    if windowed and window is None and local is None:
        raise ValueError(f"{config.where}: expected a sliding_window beside layer_types of {_SLIDING}, got null")
    positions = Constants(max_positions=config["max_position_embeddings"], rope_scaling=scaling).positions
    if window is not None and window >= positions:
        window = None  # as long as any text
    if not windowed or (own == main and window is None):
        return main
    own |= {"sliding_window": window}
    if len(windowed) == layers:
        return own
    return main | {"apart": Apart(layers=windowed, **own)}


def _local_layers(config: Values, family: Family, window: int | None, layers: int) -> tuple[int, ...]:
    """Read which layers have a local attention, also where it is as long as any text: their base may be another."""
    if family.window_by_layer and (types := config.get("layer_types")) is not None:
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {_FULL, _SLIDING}:
            raise ValueError(
                f"{config.where}: expected layer_types to be {layers} of {_FULL} and {_SLIDING}, got {shown(types)}"
            )
        return tuple(layer for layer, kind in enumerate(types) if kind == _SLIDING)
    if window is None:
        return ()
    if family.window_switch:
        return tuple(range(min(config["max_window_layers"], layers), layers))
    if family.full_every:
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", family.full_every))
        return all_but_each(every, layers)
    return tuple(range(layers))


def _rope(config: Values, family: Family) -> tuple[float, RopeScaling | None, float | None]:
    """Read base and scaling of the rotary embedding, and the base of local layers where the family has one."""
    if family.local_theta is None:
        return (*_one_rope(config, config.where, family), None)
    given = config.get("rope_parameters")
    local = config.get("rope_local_base_freq")
    full: Mapping[str, Any] = config
    if given and set(given) <= {_FULL, _SLIDING}:
        of_local = given.get(_SLIDING)
        full = dict(config) | {"rope_parameters": given.get(_FULL)}
        if isinstance(of_local, dict):
            theta, other = _one_rope({"rope_parameters": of_local}, config.where, family)
            if other is not None or (local is not None and local != theta):
                raise ValueError(
                    f"{config.where}: expected rope_parameters of {_SLIDING} with rope_type default and the base of "
                    f"rope_local_base_freq, got {shown(of_local)}"
                )
            local = theta if "rope_theta" in of_local else local
    return (*_one_rope(full, config.where, family), float(family.local_theta if local is None else local))


def _one_rope(given: Mapping[str, Any], where: str, family: Family) -> tuple[float, RopeScaling | None]:
    """Read base and scaling of the rotary embedding, from `rope_parameters` and from the two older keys."""
    settings: dict[str, Any] = {}
    for block in (given.get("rope_parameters"), given.get("rope_scaling"), {"rope_theta": given.get("rope_theta")}):
        for name, value in (block or {}).items():
            key = "rope_type" if name == "type" else name
            if value is not None and settings.setdefault(key, value) != value:
                raise ValueError(f"{where}: expected one {key}, got {shown(settings[key])} and {shown(value)}")
    theta = settings.pop("rope_theta", family.defaults.get("rope_theta", 10_000.0))
    kind = settings.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE or not (family.scaled or kind == "default"):
        if family.scaled:
            known = "default, linear or llama3"
        else:
            known = "default"
        raise ValueError(f"{where}: rope type {shown(kind)} is not supported, expected {known}")
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor other than 1.0 is not supported")
    if settings.keys() != _ROPE[kind].keys():
        expected = ", ".join(sorted(_ROPE[kind])) or "no settings"
        raise ValueError(f"{where}: expected {expected} for rope type {kind!r}, got {some(sorted(settings))}")
    theta = float(checked({"rope_theta": theta}, {"rope_theta": "theta"}, where)["rope_theta"])
    said: dict[str, Any] = {"kind": kind}
    said |= {name: float(value) for name, value in checked(settings, _ROPE[kind], where).items()}
    if _ORIGINAL in said:
        said["original_max_positions"] = int(said.pop(_ORIGINAL))
    return theta, None if kind == "default" else RopeScaling(**said)


def quantization_from_config(config: dict[str, Any], where: str) -> Quantization | None:
    """Read how the matrices of a checkpoint are quantised; None if they are floats."""
    entry = config.get(_QUANTIZATION)
    if entry is None:
        return None
    expected = (
        f"{_QUANTIZATION} to have bits ({', '.join(map(str, PLANES))}), a group_size of whole bytes at these bits "
    )
    expected += f"and matrices (some of {', '.join(MATRICES)}, in this order)"
    with reading(where, expected):
        found = Quantization(entry["bits"], entry["group_size"], tuple(entry["matrices"]))
        whole = type(found.group_size) is int and found.group_size > 0
        if (
            not (whole and all(found.group_size * width % 8 == 0 for width in PLANES[found.bits]))
            or found.matrices != tuple(name for name in MATRICES if name in found.matrices)
            or entry.keys() != set(Quantization._fields)
        ):
            raise ValueError(f"{where}: expected {expected}, got {shown(entry)}")
    return found


# --- written ---------------------------------------------------------------------------------------


def config_from_spec(
    spec: LlamaSpec, dtype: str, *, per_layer: bool | None = None, quantization: Quantization | None = None
) -> dict[str, Any]:
    """Make the `config.json` of a model: plain, of its family, if its layers are alike, none is empty and no biases
    were added, else per layer; `per_layer` says it for a checkpoint that is written otherwise.

    A plain `llama` config of a model with output biases says that all projections have one; other families have none.
    A quantised model has one per layer, which other readers refuse, as they would misread it.
    """
    constants, layers, eos = spec.constants, spec.layers, spec.constants.eos_tokens
    if per_layer is None:
        by_layer = not fits_plain_config(spec) or spec.output_biases
    else:
        by_layer = per_layer
    by_layer = by_layer or quantization is not None
    if by_layer:
        family = per_layer_form(constants.traits)
    else:
        family = constants.traits
    kv_heads, inner = (max(1, *(getattr(layer, name) for layer in layers)) for name in ("kv_heads", "mlp"))
    heads = [layer.kv_heads or kv_heads for layer in layers]
    lists = {
        "num_key_value_heads": heads,
        "num_attention_heads": [kv * layer.q_per_kv for kv, layer in zip(heads, layers, strict=True)],
        "intermediate_size": [layer.channels or layer.mlp or inner for layer in layers],
    }
    if (mixture := family.mixture) is not None:
        lists |= {key: [layer.mlp or inner for layer in layers] for key in mixture.counts}
        lists[mixture.channels] = [layer.channels or 1 for layer in layers]
    skipped = {"attention": [not layer.kv_heads for layer in layers], "mlp": [not layer.mlp for layer in layers]}
    sizes = sparse(lists, skipped)
    if by_layer:
        sizes |= {"model_type": PER_LAYER_TYPE, _OUTPUT_BIASES: spec.output_biases}
        sizes |= {"attention_bias": False, "mlp_bias": False}
        if constants.family != "llama":
            sizes |= {"family": constants.family}
    else:
        sizes = {"architectures": [family.architecture], "model_type": constants.family, **sizes}
        if family.plain_biases:
            sizes |= dict.fromkeys(("attention_bias", "mlp_bias"), spec.output_biases)
    if constants.query_scalar is not None or "query_pre_attn_scalar" in constants.traits.read:
        sizes["query_pre_attn_scalar"] = constants.query_scalar or spec.head_dim
    if mixture is not None:
        sizes["num_experts_per_tok"] = constants.experts_per_token
        if mixture.summed:
            sizes |= {mixture.summed: constants.route_scale == "sum_to_one"}
    made = sizes | {
        **family.written,
        "vocab_size": spec.vocab,
        "hidden_size": spec.embed,
        "head_dim": spec.head_dim,
        "num_hidden_layers": len(layers),
        family.activation_key: family.activation,
        "tie_word_embeddings": spec.tied,
        "rms_norm_eps": constants.norm_eps,
        "max_position_embeddings": constants.max_positions,
        **_sight_keys(constants, family, len(layers)),
        "bos_token_id": constants.bos_token,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        "torch_dtype": dtype,
    }
    return made | ({} if quantization is None else {_QUANTIZATION: quantization._asdict()})


def _sight_keys(constants: Constants, family: Family, layers: int) -> dict[str, Any]:
    """Make the keys of a config that say how layers see positions.

    Rotary settings are written twice, as `rope_parameters` (transformers 5) and as `rope_theta` with `rope_scaling`: a
    reader that knows only one of the two would otherwise fall back to defaults without a word.
    """
    apart = constants.apart
    if apart is not None:
        local = apart.layers
    else:
        local = range(layers if constants.sliding_window is not None else 0)
    if apart is None:
        window = constants.sliding_window
    else:
        window = apart.sliding_window
    if family.full_every and window is None:  # transformers wants a number
        if local:
            window = constants.positions
        else:
            window = family.defaults["sliding_window"]
    keys: dict[str, Any] = {"sliding_window": window} if family.windowed or window is not None else {}
    if family.window_switch:
        keys = {"use_sliding_window": bool(local), **keys, "max_window_layers": 0 if local else layers}
    if family.window_by_layer and (family.full_every or 0 < len(local) < layers):
        keys["layer_types"] = [_SLIDING if layer in local else _FULL for layer in range(layers)]
    scaling: dict[str, Any] = {}
    if (given := constants.rope_scaling) is not None:
        named = {_ORIGINAL: given.original_max_positions}
        scaling = {"rope_type": given.kind} | {n: named.get(n) or getattr(given, n) for n in _ROPE[given.kind]}
    main = {"rope_type": "default", **scaling, "rope_theta": constants.rope_theta}
    keys |= {"rope_parameters": main, "rope_theta": constants.rope_theta, "rope_scaling": scaling or None}
    if family.local_theta is None:
        return keys
    if apart is None:
        theta = constants.rope_theta
    else:
        theta = apart.rope_theta
    if family.full_every:
        keys["rope_parameters"] = {_FULL: main, _SLIDING: {"rope_type": "default", "rope_theta": theta}}
    return keys | {"rope_local_base_freq": theta}


def fits_plain_config(spec: LlamaSpec) -> bool:
    """Say whether a plain config can hold the model: layers all alike, with heads and channels, or enough experts.

    Biases of the output projections have a place in family `llama` alone.
    """
    least = spec.constants.experts_per_token or 1
    alike = spec.uniform and spec.layers[0].kv_heads > 0 and spec.layers[0].mlp >= least
    return alike and (spec.constants.traits.plain_biases or not spec.output_biases)
