"""Configuration of a LLaMA model whose layers have widths of their own. Travels with the model's weights."""

import copy
from typing import Any

from transformers import PreTrainedConfig

# fmt: off
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "head_dim": 4, "num_hidden_layers": 1, "intermediate_size": 64,
    "num_key_value_heads": 1, "num_attention_heads": 1, "output_biases": False, "family": "llama",
    "sliding_window": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True, "rope_parameters": None,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "attention_bias": False, "mlp_bias": False,
}
# fmt: on
"""What a configuration says where it is not told."""


class SaapLlamaConfig(PreTrainedConfig):
    """A LLaMA configuration whose `per_layer_config` says where sizes of a layer are others, and which it skips.

    Those are `num_key_value_heads`, `num_attention_heads` and `intermediate_size`; `skip` may have "attention" and
    "mlp", of which nothing is left then but an output bias. With `output_biases`, the attention output and the MLP
    down projection, and no other matrices of a LLaMA, add a bias. `family` says which relative of LLaMA it is: query,
    key and value of a `qwen2` add a bias, query and key heads of a `qwen3` are normalised. With a `sliding_window`, a
    token sees that many positions, its own among them.
    """

    model_type = "saap_llama"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**kwargs)

    def of_layer(self, layer: int) -> Any:
        """Describe one layer: this configuration with the sizes that it has there, and with `skip`."""
        given = getattr(self, "per_layer_config", None)
        if given is None or isinstance(given, dict):  # transformers before 5.14 knows nothing of it
            sizes = {int(key): value for key, value in (given or {}).items()}.get(layer, {})
            one = copy.copy(self)
            vars(one).update({"skip": [], **sizes})
            return one
        one = given[layer]
        if one is self:  # no layer has other sizes
            one = copy.copy(self)
            one.skip = []
        return one
