"""The families of models: all in which one differs from LLaMA, an entry each.

What the `config.json` of a family may say beside what all have follows the configuration classes of transformers
(`LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config`, `Phi3Config`); names and limits in GGUF, llama.cpp.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from saap_jax.formats.json_files import shown

_NONE: Mapping[str, Any] = MappingProxyType({})


class Gguf(NamedTuple):
    """How llama.cpp computes a family."""

    architecture: str = "llama"
    """Of layers that are alike; where they differ, `deci`."""
    equal_layers: bool = False
    """Layers have to be alike: narrower ones are widened by zeros. Neither biases of output projections nor rope type
    `llama3` are known there."""
    whole_heads: bool = False
    """Heads have to be together as wide as the residual stream: with `equal_layers` there are made more, else the
    model becomes a `llama`."""
    tensors: Mapping[str, str] = _NONE
    """Name in a layer -> the one in Hugging Face's, of what a LLaMA does not have or calls otherwise."""
    keys: frozenset[str] = frozenset()
    """Attributes that are read beside those of all architectures."""


class Family(NamedTuple):
    """In what a family differs from LLaMA, its defaults among it."""

    architecture: str
    """Name of its language model in transformers."""
    input_biases: bool = False
    """Query, key and value add a bias each."""
    head_norms: bool = False
    """Each head of query and key is normalised before it is turned to its position."""
    windowed: bool = False
    """A token may see only the last `Constants.sliding_window` positions, its own among them."""
    fused: bool = False
    """Query, key and value are stored as one matrix, and so are gate and up."""
    scaled: bool = True
    """Rotary frequencies may be rescaled."""
    window_by_layer: bool = False
    """A config may give some layers a window and others none, which is refused."""
    plain_biases: bool = False
    """A plain config has a place for biases of all projections, those of the output projections among them."""
    heads_divide: bool = False
    """transformers wants a number of heads that divides the width of the residual stream."""
    groups_said: bool = True
    """A config must say `num_key_value_heads`; else there is one KV head a query head."""
    only: Mapping[str, tuple[Any, ...]] = _NONE
    """Keys that change the computation -> the values that this model computes."""
    read: frozenset[str] = frozenset()
    """Keys that are read beside those of all families."""
    defaults: Mapping[str, Any] = _NONE
    """What a missing key stands for, where that is not as in LLaMA."""
    harmless: frozenset[str] = frozenset()
    """Keys that say nothing about the logits."""
    written: Mapping[str, Any] = _NONE
    """Keys that a plain config has beside those of all families and of the window."""
    gguf: Gguf = Gguf()


_FALSE = (None, False)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": None}
_QWEN |= {"eos_token_id": None}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        plain_biases=True,
        heads_divide=True,
        groups_said=False,
        only={
            "architectures": (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]),
            "sliding_window": (None,),
            "rope_interleaved": _FALSE,
            "is_llama_config": (None, True),
        },
        read=frozenset({"attention_bias", "mlp_bias"}),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        windowed=True,
        only={"architectures": (None, ["MistralForCausalLM"]), "attention_bias": _FALSE},
        read=frozenset({"sliding_window"}),
        defaults={"max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        input_biases=True,
        windowed=True,
        window_by_layer=True,
        only={"architectures": (None, ["Qwen2ForCausalLM"]), "use_mrope": _FALSE},
        read=_WINDOWS,
        defaults=_QWEN,
        gguf=Gguf(
            "qwen2",
            equal_layers=True,
            whole_heads=True,
            tensors={f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"},
        ),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        head_norms=True,
        windowed=True,
        window_by_layer=True,
        only={"architectures": (None, ["Qwen3ForCausalLM"]), "attention_bias": _FALSE, "use_mrope": _FALSE},
        read=_WINDOWS,
        defaults=_QWEN | {"head_dim": 128},
        written={"attention_bias": False},
        gguf=Gguf(
            "qwen3",
            equal_layers=True,
            tensors={f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"},
        ),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        windowed=True,
        fused=True,
        scaled=False,
        groups_said=False,
        only={"architectures": (None, ["Phi3ForCausalLM"]), "attention_bias": _FALSE},
        read=frozenset({"sliding_window"}),
        harmless=frozenset({"original_max_position_embeddings", "embd_pdrop", "resid_pdrop", "auto_map"}),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000},
        written={"pad_token_id": None},  # else 32000, beyond a smaller vocabulary
        gguf=Gguf(
            "phi3",
            whole_heads=True,
            tensors={"attn_qkv.weight": "self_attn.qkv_proj.weight", "ffn_up.weight": "mlp.gate_up_proj.weight"},
            keys=frozenset({"attention.sliding_window"}),
        ),
    ),
}
"""`model_type` of a config -> the family."""


def is_fused(model_type: str) -> bool:
    """Say whether a plain config is of a family with fused matrices; one per layer has separate ones."""
    return model_type in FAMILIES and FAMILIES[model_type].fused


def gguf_families() -> dict[str, str]:
    """Return the family that each architecture of GGUF is loaded as: of several with one architecture, the first.

    >>> gguf_families()
    {'llama': 'llama', 'deci': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'phi3': 'phi3'}
    """
    names = {"llama": "llama", "deci": "llama"}
    for name, family in FAMILIES.items():
        names.setdefault(family.gguf.architecture, name)
    return names


def family_of(config: dict[str, Any], where: str, per_layer_type: str) -> str:
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


def sliding_window(config: dict[str, Any], where: str, family: str, layers: int, max_positions: int) -> int | None:
    """Return the sliding window that all layers have; None for none, or where it is as long as any text.

    Raises:
        ValueError: some layers have one and others not, or it is no positive integer.
    """
    own = FAMILIES[family]
    window = config.get("sliding_window", own.defaults.get("sliding_window"))
    if own.window_by_layer:
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


def own_keys(name: str, window: int | None, layers: int) -> dict[str, Any]:
    """Return the keys of a plain config that only this family has, or that it has another default for."""
    family, on = FAMILIES[name], window is not None
    keys: dict[str, Any] = {"sliding_window": window} if family.windowed else {}
    if family.window_by_layer:
        keys = {"use_sliding_window": on, **keys, "max_window_layers": 0 if on else layers}
    return keys | dict(family.written)
