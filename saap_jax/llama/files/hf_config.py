"""Hugging Face `config.json` <-> `LlamaSpec`: what the config of a family may say, and what is refused by name.

A dense model, or one whose layers were all cut alike, is a plain config of its family, such as `llama`. Layers of
different widths have no place in it, nor has a bias of the output projections alone, so such a model says `model_type:
"saap_llama"` with its `family` and one number a layer: other readers refuse it instead of misreading it. A plain
`llama` config may say that all projections have biases; all but those of the output projections must then be zero.
"""

from typing import Any

from saap_jax.formats.json_files import shown
from saap_jax.llama.files.config_values import flag, integer, number, some, token
from saap_jax.llama.files.families import (
    FAMILIES,
    FULL,
    SLIDING,
    Family,
    Windows,
    family_of,
    layer_types,
    own_keys,
    windows_of,
)
from saap_jax.llama.files.mixture import experts_of, mixture_constants, mixture_keys
from saap_jax.llama.quantized import MATRICES, PLANES, Quantization
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling, check_bounds

PER_LAYER_TYPE = "saap_llama"
"""`model_type` of a config with one width a layer."""

_OUTPUT_BIASES = "output_biases"
"""True when attention output and MLP down projection, and no other matrices, add a bias."""

_PER_LAYER_KEYS = ("num_key_value_heads", "num_attention_heads", "query_heads_per_kv_head", "intermediate_size")

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

_PER_LAYER_ONLY = {
    "architectures": (None, ["SaapLlamaForCausalLM"]),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
"""The same, of a config with one width a layer, in place of those of its family."""

_QUANTIZATION = "saap_quantization"
"""How the matrices are quantised: bits, group_size and their names; absent where none is."""

_PER_LAYER_READ = {
    *("query_heads_per_kv_head", _OUTPUT_BIASES, _QUANTIZATION, "auto_map", "family", "sliding_window"),
    *("layer_types", "rope_local_base_freq", "query_pre_attn_scalar", "channels"),
}

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def spec_from_config(config: dict[str, Any], where: str) -> LlamaSpec:
    """Return the spec that a `config.json` describes; `where` names it in errors.

    Missing keys have the defaults of the family's class in transformers, except sizes, which must be there. Refuses
    (`ValueError`, one line) other model types, unsupported attributes, keys that it does not know, and numbers beyond
    `spec.BOUNDS`.
    """
    try:
        return _spec(config, where)
    except ValueError as error:  # those of the spec's own classes know no file
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from None


def _spec(config: dict[str, Any], where: str) -> LlamaSpec:
    per_layer = config.get("model_type") == PER_LAYER_TYPE
    family = family_of(config, where, PER_LAYER_TYPE)
    defaults = {} if per_layer else FAMILIES[family].defaults
    _refuse_unsupported(config, where, family, per_layer)
    embed = integer(config, "hidden_size", where, "width")
    layers = _layer_lists(config, where) if per_layer else _equal_layers(config, where)
    head_dim = config.get("head_dim", defaults.get("head_dim"))
    if head_dim is None and per_layer:
        raise ValueError(f"{where}: expected an explicit head_dim beside per-layer widths, got none")
    if head_dim is None:
        heads = layers[0].kv_heads * layers[0].q_per_kv
        if embed % heads:
            raise ValueError(
                f"{where}: hidden_size {embed} is no multiple of num_attention_heads {heads}; add head_dim"
            )
        head_dim = embed // heads
    eos = config.get("eos_token_id", defaults.get("eos_token_id", 2))
    default = defaults.get("max_position_embeddings", 2048)
    max_positions = integer(config, "max_position_embeddings", where, "positions", default)
    windows = _per_layer_windows if per_layer else windows_of
    constants = Constants(
        norm_eps=number(config, "rms_norm_eps", where, "epsilon", defaults.get("rms_norm_eps", 1e-6)),
        max_positions=max_positions,
        bos_token=token(config.get("bos_token_id", defaults.get("bos_token_id", 1)), f"{where}: bos_token_id"),
        eos_tokens=tuple(
            end
            for item in (eos if isinstance(eos, list) else [eos])
            if (end := token(item, f"{where}: eos_token_id")) is not None
        ),
        family=family,
        query_scalar=_query_scalar(config, where, defaults, head_dim),
        **mixture_constants(config, where, family),
        **_sights(config, where, family, windows(config, where, family, len(layers), max_positions), len(layers)),
    )
    all_biases = FAMILIES[family].plain_biases and not per_layer
    return LlamaSpec(
        vocab=integer(config, "vocab_size", where, "vocabulary"),
        embed=embed,
        head_dim=integer({"head_dim": head_dim}, "head_dim", where, "head size"),
        layers=layers,
        tied=flag(config, "tie_word_embeddings", where, defaults.get("tie_word_embeddings", False)),
        output_biases=_all_biases(config, where) if all_biases else flag(config, _OUTPUT_BIASES, where),
        constants=constants,
    )


def config_from_spec(spec: LlamaSpec, dtype: str, *, per_layer: bool | None = None) -> dict[str, Any]:
    """Return the `config.json` of a model: plain, of its family, if its layers are alike, none is empty and no
    biases were added, else per layer; `per_layer` says it for a checkpoint that is written otherwise.

    A plain `llama` config of a model with output biases says that all projections have one; other families have none.

    The rotary settings are written twice, as `rope_parameters` (transformers 5) and as `rope_theta` with
    `rope_scaling`: a reader that knows only one of the two would otherwise fall back to defaults without a word.
    """
    first, constants, count = spec.layers[0], spec.constants, len(spec.layers)
    apart = constants.apart
    local = apart.layers if apart is not None else range(count if constants.sliding_window is not None else 0)
    window = constants.sliding_window if apart is None else apart.sliding_window
    if per_layer is None:
        per_layer = not fits_plain_config(spec) or spec.output_biases
    if not per_layer:
        sizes: dict[str, Any] = {
            "architectures": [constants.traits.architecture],
            "model_type": constants.family,
            "num_key_value_heads": first.kv_heads,
            "num_attention_heads": first.kv_heads * first.q_per_kv,
            "intermediate_size": first.channels or first.mlp,
        }
    else:
        sizes = {
            "model_type": PER_LAYER_TYPE,
            "num_key_value_heads": [layer.kv_heads for layer in spec.layers],
            "num_attention_heads": [layer.kv_heads * layer.q_per_kv for layer in spec.layers],
            "query_heads_per_kv_head": [layer.q_per_kv for layer in spec.layers],
            "intermediate_size": [layer.channels or layer.mlp for layer in spec.layers],
            _OUTPUT_BIASES: spec.output_biases,
            **({"family": constants.family} if constants.family != "llama" else {}),
            **({"sliding_window": window} if window is not None else {}),
            **({"layer_types": layer_types(local, count)} if apart is not None else {}),
        }
    if per_layer or constants.traits.plain_biases:
        sizes |= dict.fromkeys(("attention_bias", "mlp_bias"), spec.output_biases and not per_layer)
    else:
        sizes |= own_keys(constants.family, window, local, count, constants.max_positions)
    if constants.query_scalar is not None or "query_pre_attn_scalar" in constants.traits.read:
        sizes["query_pre_attn_scalar"] = constants.query_scalar or spec.head_dim
    sizes |= mixture_keys(spec, per_layer)
    eos = constants.eos_tokens
    return sizes | {
        "vocab_size": spec.vocab,
        "hidden_size": spec.embed,
        "head_dim": spec.head_dim,
        "num_hidden_layers": count,
        "hidden_act" if per_layer else constants.traits.activation_key: constants.traits.activation,
        "tie_word_embeddings": spec.tied,
        "rms_norm_eps": constants.norm_eps,
        "max_position_embeddings": constants.max_positions,
        **_rope_keys(constants, per_layer),
        "bos_token_id": constants.bos_token,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        "torch_dtype": dtype,
    }


def quantization_to_config(quantization: Quantization) -> dict[str, Any]:
    """Return the entry of a per-layer `config.json` that says how matrices are quantised."""
    return {_QUANTIZATION: quantization._asdict() | {"matrices": list(quantization.matrices)}}


def quantization_from_config(config: dict[str, Any], where: str) -> Quantization | None:
    """Return how the matrices of a checkpoint are quantised; None if they are floats."""
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
    size = integer(entry, "group_size", f"{where}: {_QUANTIZATION}", "channels")
    if any(size * width % 8 for width in PLANES[entry["bits"]]):
        raise ValueError(f"{where}: expected a group_size of whole bytes at {entry['bits']} bits, got {size}")
    return Quantization(entry["bits"], size, tuple(names))


def fits_plain_config(spec: LlamaSpec) -> bool:
    """Say whether a plain config can hold the model: layers all alike, with heads and channels, or enough experts.

    Biases of the output projections have a place in family `llama` alone.
    """
    least = spec.constants.experts_per_token or 1
    alike = spec.uniform and spec.layers[0].kv_heads > 0 and spec.layers[0].mlp >= least
    return alike and (spec.constants.traits.plain_biases or not spec.output_biases)


def _all_biases(config: dict[str, Any], where: str) -> bool:
    """Say whether a plain config has biases: in attention and MLP, or in neither."""
    attention, mlp = (flag(config, key, where) for key in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise ValueError(
            f"{where}: attention_bias = {attention} with mlp_bias = {mlp} is not supported, expected both alike"
        )
    return attention


def _per_layer_windows(config: dict[str, Any], where: str, family: str, layers: int, *_: Any) -> Windows:
    size = None if config.get("sliding_window") is None else integer(config, "sliding_window", where, "positions")
    if "layer_types" not in config:
        return Windows(size, tuple(range(layers)) if size is not None else ())
    window = 2**30 if size is None else size  # as long as any text: apart for their rotary base alone
    types = {"layer_types": config["layer_types"], "sliding_window": window, "use_sliding_window": True}
    return Windows(size, windows_of(types, where, family, layers, window).layers)


def _sights(config: dict[str, Any], where: str, family: str, windows: Windows, layers: int) -> dict[str, Any]:
    """Return how layers see positions: rotary base and scaling, window, and the layers apart from the rest."""
    theta, scaling, local = _rope(config, where, family)
    main: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    own: dict[str, Any] = dict(main) if local is None else {"rope_theta": local, "rope_scaling": None}
    if not windows.layers or (own == main and windows.size is None):
        return main
    own |= {"sliding_window": windows.size}
    return own if len(windows.layers) == layers else main | {"apart": Apart(layers=windows.layers, **own)}


def _query_scalar(config: dict[str, Any], where: str, defaults: Any, head_dim: int) -> int | None:
    if (scalar := config.get("query_pre_attn_scalar", defaults.get("query_pre_attn_scalar"))) is None:
        return None
    scalar = integer({"query_pre_attn_scalar": scalar}, "query_pre_attn_scalar", where, "head size")
    return None if scalar == head_dim else scalar


def _refuse_unsupported(config: dict[str, Any], where: str, family: str, per_layer: bool) -> None:
    own = FAMILIES[family]
    only = _ONLY | (_PER_LAYER_ONLY | {"hidden_act": (None, own.activation)} if per_layer else dict(own.only))
    known = _READ | _HARMLESS | only.keys() | (_PER_LAYER_READ if per_layer else own.read | own.harmless)
    known |= own.mixture.keys if own.mixture is not None else frozenset()
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"{where}: unknown attributes {some(unknown)}; they may change what the model computes, "
            "so remove them only if you know that they do not"
        )
    for key, values in only.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{where}: {key} = {shown(config[key])} is not supported, expected {values[-1]!r}")


def _equal_layers(config: dict[str, Any], where: str) -> tuple[LayerWidths, ...]:
    heads = integer(config, "num_attention_heads", where, "heads")
    if "num_key_value_heads" not in config and FAMILIES[config["model_type"]].groups_said:
        raise ValueError(
            f"{where}: expected num_key_value_heads, got none; a {config['model_type']} config must say it"
        )
    kv_heads = integer(config, "num_key_value_heads", where, "heads", heads)
    if heads % kv_heads:
        raise ValueError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    layers = integer(config, "num_hidden_layers", where, "layers")
    if FAMILIES[config["model_type"]].mixture is None:
        inner: dict[str, Any] = {"mlp": integer(config, "intermediate_size", where, "channels")}
    else:
        inner = experts_of(config, where, config["model_type"], layers)[0]
    return (LayerWidths(kv_heads=kv_heads, q_per_kv=heads // kv_heads, **inner),) * layers


def _layer_lists(config: dict[str, Any], where: str) -> tuple[LayerWidths, ...]:
    count = integer(config, "num_hidden_layers", where, "layers")
    lists = {}
    for key in _PER_LAYER_KEYS:
        lists[key] = config.get(key)
        good = isinstance(lists[key], list) and all(type(item) is int and item >= 0 for item in lists[key])
        if not good or len(lists[key]) != count:
            raise ValueError(f"{where}: expected {key} to be {count} non-negative integers, got {shown(lists[key])}")
        check_bounds(max(1, *lists[key]), "channels" if key == "intermediate_size" else "heads", f"{where}: {key}")
    family, layers = config.get("family", "llama"), []
    if FAMILIES[family].mixture is None:
        inner: list[dict[str, Any]] = [{"mlp": mlp} for mlp in lists["intermediate_size"]]
    else:
        inner = experts_of(config, where, family, count)
    for index, (kv_heads, heads, q_per_kv, _) in enumerate(zip(*lists.values(), strict=True)):
        if heads != kv_heads * q_per_kv:
            raise ValueError(
                f"{where}: layer {index} has {heads} attention heads, expected {kv_heads} x {q_per_kv} "
                "(num_key_value_heads x query_heads_per_kv_head)"
            )
        layers.append(LayerWidths(kv_heads=kv_heads, q_per_kv=q_per_kv, **inner[index]))
    return tuple(layers)


def _rope_keys(constants: Constants, per_layer: bool) -> dict[str, Any]:
    """Return the rotary settings of a config, in the newer form and in the older one."""

    def scaling(given: RopeScaling | None) -> dict[str, Any]:
        if given is None:
            return {"rope_type": "default"}
        if given.kind == "linear":
            return {"rope_type": given.kind, "factor": given.factor}
        return {
            "rope_type": given.kind,
            "factor": given.factor,
            "low_freq_factor": given.low_freq_factor,
            "high_freq_factor": given.high_freq_factor,
            "original_max_position_embeddings": given.original_max_positions,
        }

    traits, apart = constants.traits, constants.apart
    main = scaling(constants.rope_scaling) | {"rope_theta": constants.rope_theta}
    keys: dict[str, Any] = {
        "rope_parameters": main,
        "rope_theta": constants.rope_theta,
        "rope_scaling": None if constants.rope_scaling is None else scaling(constants.rope_scaling),
    }
    if traits.local_theta is None:
        return keys
    local = constants.rope_theta if apart is None else apart.rope_theta
    if not per_layer:
        kinds = {FULL: main, SLIDING: {"rope_type": "default", "rope_theta": local}}
        keys["rope_parameters"] = kinds
    return keys | {"rope_local_base_freq": local}


def _rope(config: dict[str, Any], where: str, family: str) -> tuple[float, RopeScaling | None, float | None]:
    """Read base and scaling of the rotary embedding, and the base of local layers where the family has one."""
    traits = FAMILIES[family]
    if traits.local_theta is None:
        return (*_one_rope(config, where, traits), None)
    given, kinds = config.get("rope_parameters"), {FULL, SLIDING}
    local = config.get("rope_local_base_freq")
    if isinstance(given, dict) and given and set(given) <= kinds:
        of_local = given.get(SLIDING)
        full = config | {"rope_parameters": given.get(FULL)}
        if isinstance(of_local, dict):
            theta, scaled = _one_rope({"model_type": config["model_type"], "rope_parameters": of_local}, where, traits)
            if scaled is not None or (local is not None and local != theta):
                raise ValueError(
                    f"{where}: expected rope_parameters of {SLIDING} with rope_type default and the base of "
                    f"rope_local_base_freq, got {shown(of_local)}"
                )
            local = theta if "rope_theta" in of_local else local
    else:
        full = config
    base = number({"base": local} if local is not None else {}, "base", where, "theta", traits.local_theta)
    return (*_one_rope(full, where, traits), base)


def _one_rope(config: dict[str, Any], where: str, traits: Family) -> tuple[float, RopeScaling | None]:
    """Read base and scaling of the rotary embedding, from `rope_parameters` or from the two older keys."""
    found: list[dict[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{where}: expected {key} to be an object, got {shown(given)}")
        if given:
            settings = {name: value for name, value in given.items() if value is not None}
            old = settings.pop("type", None)
            if settings.setdefault("rope_type", old or "default") != (old or settings["rope_type"]):
                raise ValueError(
                    f"{where}: {key} says both type {shown(old)} and rope_type {shown(settings['rope_type'])}"
                )
            found.append(settings)
    thetas = [settings.pop("rope_theta") for settings in found if "rope_theta" in settings]
    thetas += [config["rope_theta"]] if config.get("rope_theta") is not None else []
    if any(theta != thetas[0] for theta in thetas):
        raise ValueError(f"{where}: rope_theta is given more than once, as {', '.join(map(shown, thetas))}")
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"{where}: rope_parameters and rope_scaling disagree: {shown(found[0])} and {shown(found[1])}")
    default = traits.defaults.get("rope_theta", 10_000.0)
    theta = number({"rope_theta": thetas[0]} if thetas else {}, "rope_theta", where, "theta", default)
    settings = found[0] if found else {"rope_type": "default"}
    kind = settings.pop("rope_type")
    scaled = config["model_type"] == PER_LAYER_TYPE or traits.scaled
    if not isinstance(kind, str) or kind not in _ROPE_KEYS or not (scaled or kind == "default"):
        known = "default, linear or llama3" if scaled else "default"
        raise ValueError(f"{where}: rope type {shown(kind)} is not supported, expected {known}")
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor other than 1.0 is not supported")
    if settings.keys() != _ROPE_KEYS[kind]:
        expected = ", ".join(sorted(_ROPE_KEYS[kind])) or "no settings"
        raise ValueError(f"{where}: expected {expected} for rope type {kind!r}, got {some(sorted(settings))}")
    if kind == "default":
        return theta, None
    original = "original_max_position_embeddings"
    quantities = {key: "positions" if key == original else "factor" for key in settings}
    numbers = {key: number(settings, key, where, quantity) for key, quantity in quantities.items()}
    if kind == "llama3":
        numbers["original_max_positions"] = int(numbers.pop(original))
    return theta, RopeScaling(kind=kind, **numbers)  # pyright: ignore[reportArgumentType]
