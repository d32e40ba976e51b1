"""Sizes that differ from layer to layer, as configs of others say them: `per_layer_config` and `block_configs`.

`per_layer_config` is the schema of transformers 5.14 and later, which ModelOpt's adapter for vLLM has too: number of a
layer -> the keys that are other than in the rest of the config, and `skip`, the sub-blocks that the layer lacks.
`block_configs` has an entry a layer, which vLLM reads of a `nemotron-nas`, where all attention has as many heads; ours
have `per_layer_config` beside it, which is what we read.

Source: transformers, `integrations/heterogeneity/configuration_utils.py`; ModelOpt, `puzzletron/utils/vllm_adapter.py`;
vLLM, `model_executor/models/nemotron_nas.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saap_jax.errors import shown
from saap_jax.llama.spec import LayerWidths, checked

LAYERS = "per_layer_config"
BLOCKS = "block_configs"
NAS_TYPE = "nemotron-nas"
"""`model_type` of a config with `block_configs`."""

SUBBLOCKS = ("attention", "mlp")
"""What `skip` may have."""

_HEADS = ("num_key_value_heads", "num_attention_heads")


def sparse(sizes: Mapping[str, Sequence[int]], skipped: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Make the keys of a config that say sizes of layers: the largest of each, and `per_layer_config` of the others.

    Args:
        sizes: key -> a number a layer; of a sub-block that is skipped, any.
        skipped: sub-block -> whether each layer lacks it.

    >>> sparse({"intermediate_size": [8, 6, 8]}, {"mlp": [False, False, True]})
    {'intermediate_size': 8, 'per_layer_config': {'1': {'intermediate_size': 6}, '2': {'skip': ['mlp']}}}
    """
    most = {key: max(values) for key, values in sizes.items()}
    layers: dict[int, dict[str, Any]] = {}
    for layer in range(len(next(iter(sizes.values())))):
        own: dict[str, Any] = {key: values[layer] for key, values in sizes.items() if values[layer] != most[key]}
        if skip := [name for name, lacks in skipped.items() if lacks[layer]]:
            own["skip"] = skip
        if own:
            layers[layer] = own
    digits = len(str(max(layers, default=0)))  # as transformers writes them, in order
    return most | ({LAYERS: {f"{layer:0{digits}}": own for layer, own in layers.items()}} if layers else {})


def listed(config: Mapping[str, Any], kinds: Mapping[str, str], counts: Iterable[str], where: str) -> dict[str, Any]:
    """Write a config with `per_layer_config` as one with lists, a number a layer, 0 in sub-blocks that are skipped.

    Args:
        kinds: keys that may differ from layer to layer -> what they may be, see `spec.checked`.
        counts: those that say how many channels, or experts, the MLP of a layer has.

    Raises:
        ValueError: numbers of no layer, keys or sub-blocks that are unknown, or values that are of another kind.
    """
    found = {key: value for key, value in config.items() if key != LAYERS}
    if (given := config.get(LAYERS)) is None:
        return found
    layers = checked(config, {**kinds, "num_hidden_layers": "layers"}, where)["num_hidden_layers"]
    own = {int(layer): dict(sizes) for layer, sizes in given.items()}
    for layer, sizes in own.items():
        skip = sizes.get("skip", [])
        if not 0 <= layer < layers or not sizes.keys() <= {*kinds, "skip"} or not set(skip) <= {*SUBBLOCKS}:
            some = f"some of {', '.join(sorted(kinds))}, and to skip attention or mlp"
            got = shown({layer: sizes})
            raise ValueError(f"{where}: expected {LAYERS} of a layer below {layers} to have {some}, got {got}")
        checked(sizes, kinds, f"{where}: layer {layer}")
    each = [own.get(layer, {}) for layer in range(layers)]
    for key in kinds:
        if key in config or any(key in sizes for sizes in each):
            found[key] = [sizes.get(key, config.get(key)) for sizes in each]
    found["query_heads_per_kv_head"] = [q // max(kv, 1) for kv, q in zip(*(found[key] for key in _HEADS), strict=True)]
    for name, of in (("attention", _HEADS), ("mlp", counts)):
        for key in of:
            found[key] = [0 if name in own.get("skip", []) else n for own, n in zip(each, found[key], strict=True)]
    return found


def blocks(layers: Sequence[LayerWidths]) -> list[dict[str, Any]]:
    """Make the `block_configs` of layers whose attention is alike, or empty."""
    return [
        {
            "attention": {"no_op": not layer.kv_heads, "n_heads_in_group": layer.q_per_kv if layer.kv_heads else None},
            "ffn": {"no_op": not layer.mlp, "intermediate_size": layer.mlp or None},
        }
        for layer in layers
    ]
