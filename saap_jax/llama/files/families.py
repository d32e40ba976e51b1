"""What the `config.json` of each family may say beside what all have, its defaults, and its sliding window.

Source: the configuration classes of transformers (`LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config`,
`Phi3Config`).
"""

from typing import Any, NamedTuple

from saap_jax.formats.json_files import shown
from saap_jax.llama.spec import FAMILIES, Constants, Family


class Keys(NamedTuple):
    """Keys of one family."""

    only: dict[str, tuple[Any, ...]]
    """Keys that change the computation -> the values that this model computes."""
    read: frozenset[str]
    defaults: dict[str, Any]
    """What a missing key stands for, where that is not as in LLaMA."""
    harmless: frozenset[str] = frozenset()
    """Keys that say nothing about the logits."""


_FALSE = (None, False)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BY_LAYER: tuple[Family, ...] = ("qwen2", "qwen3")
"""Families whose layers may differ in having a window."""

_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}

KEYS: dict[Family, Keys] = {
    "llama": Keys(
        only={
            "architectures": (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]),
            "sliding_window": (None,),
            "rope_interleaved": _FALSE,
            "is_llama_config": (None, True),
        },
        read=frozenset({"attention_bias", "mlp_bias"}),
        defaults={},
    ),
    "mistral": Keys(
        only={"architectures": (None, ["MistralForCausalLM"]), "attention_bias": _FALSE},
        read=frozenset({"sliding_window"}),
        defaults={"max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    "qwen2": Keys(
        only={"architectures": (None, ["Qwen2ForCausalLM"]), "use_mrope": _FALSE},
        read=_WINDOWS,
        defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28} | _NO_ENDS,
    ),
    "qwen3": Keys(
        only={"architectures": (None, ["Qwen3ForCausalLM"]), "attention_bias": _FALSE, "use_mrope": _FALSE},
        read=_WINDOWS,
        defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}
        | _NO_ENDS,
    ),
    "phi3": Keys(
        only={"architectures": (None, ["Phi3ForCausalLM"]), "attention_bias": _FALSE},
        read=frozenset({"sliding_window"}),
        harmless=frozenset({"original_max_position_embeddings", "embd_pdrop", "resid_pdrop", "auto_map"}),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000},
    ),
}
"""Without `num_key_value_heads` a LLaMA and a Phi-3 have one KV head a query head; the others must say it."""


def family_of(config: dict[str, Any], where: str, per_layer_type: str) -> Family:
    """Return the family that a config is of; of one per layer, its `family`, or else `llama`.

    Raises:
        ValueError: another one.
    """
    kind, key = config.get("model_type"), "model_type"
    if kind == per_layer_type:
        kind, key = config.get("family", "llama"), "family"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{where}: expected {key} {', '.join(FAMILIES)}, got {shown(kind)}; not a LLaMA model or a relative"
        )
    return kind


def sliding_window(config: dict[str, Any], where: str, family: Family, layers: int, max_positions: int) -> int | None:
    """Return the sliding window that all layers have; None for none, or where it is as long as any text.

    Raises:
        ValueError: some layers have one and others not, or it is no positive integer.
    """
    own = KEYS[family]
    window = config.get("sliding_window", own.defaults.get("sliding_window"))
    if family in _BY_LAYER:
        window = window if _flag(config, "use_sliding_window", where) else None
        kinds = _kinds(config, where, window, own.defaults["max_window_layers"], layers)
    else:
        kinds = {_FULL if window is None else _SLIDING}
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"{where}: expected sliding_window to be a positive integer or null, got {shown(window)}")
    if kinds == {_FULL} or (window is not None and window >= max_positions):
        return None
    if window is None or kinds != {_SLIDING}:
        raise ValueError(
            f"{where}: a sliding window in some layers only is not supported, got layers of {', '.join(sorted(kinds))} "
            f"(layer_types, or max_window_layers) with sliding_window {window}; expected it in all or none"
        )
    return window


def _kinds(config: dict[str, Any], where: str, window: Any, default: int, layers: int) -> set[str]:
    """Return what kinds of attention the layers have."""
    if (types := config.get("layer_types")) is not None:
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {_FULL, _SLIDING}:
            raise ValueError(
                f"{where}: expected layer_types to be {layers} of {_FULL} and {_SLIDING}, got {shown(types)}"
            )
        return set(types)
    first = config.get("max_window_layers", default)
    if type(first) is not int or first < 0:
        raise ValueError(f"{where}: expected max_window_layers to be a non-negative integer, got {shown(first)}")
    return {_FULL if window is None or layer < first else _SLIDING for layer in range(layers)}


def _flag(config: dict[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{where}: expected {key} to be true or false, got {shown(value)}")
    return bool(value)


def own_keys(constants: Constants, layers: int) -> dict[str, Any]:
    """Return the keys of a plain config that only this family has, or that it has another default for."""
    window, family = constants.sliding_window, constants.family
    keys: dict[str, Any] = {}
    if family in ("mistral", "phi3"):
        keys["sliding_window"] = window
    if family in _BY_LAYER:
        on = window is not None
        keys |= {"use_sliding_window": on, "sliding_window": window, "max_window_layers": 0 if on else layers}
    if family == "qwen3":
        keys["attention_bias"] = False
    if family == "phi3":
        keys["pad_token_id"] = None  # else 32000, beyond a smaller vocabulary
    return keys
