"""Configuration of a LLaMA model whose layers have widths of their own. Travels with the model's weights."""

import copy
from typing import Any

from transformers import PreTrainedConfig


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

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        hidden_size: int = 16,
        head_dim: int = 4,
        num_hidden_layers: int = 1,
        num_key_value_heads: int = 1,
        num_attention_heads: int = 1,
        intermediate_size: int = 64,
        per_layer_config: dict[str, dict[str, Any]] | None = None,
        output_biases: bool = False,
        family: str = "llama",
        sliding_window: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        rope_parameters: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.head_dim = vocab_size, hidden_size, head_dim
        self.num_hidden_layers, self.intermediate_size = num_hidden_layers, intermediate_size
        self.num_key_value_heads, self.num_attention_heads = num_key_value_heads, num_attention_heads
        self.output_biases, self.hidden_act, self.rms_norm_eps = output_biases, hidden_act, rms_norm_eps
        self.attention_bias = self.mlp_bias = False
        self.family, self.sliding_window = family, sliding_window
        self.max_position_embeddings, self.initializer_range = max_position_embeddings, initializer_range
        self.attention_dropout, self.use_cache = attention_dropout, use_cache
        self.rope_parameters = rope_parameters
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(per_layer_config=per_layer_config, **kwargs)

    def of_layer(self, layer: int) -> Any:
        """Describe one layer: this configuration with the sizes that it has there, and with `skip`."""
        given = self.per_layer_config
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
