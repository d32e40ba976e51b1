"""Configuration of a LLaMA model whose layers have widths of their own. Travels with the model's weights."""

from typing import Any

from transformers import PreTrainedConfig


class SaapLlamaConfig(PreTrainedConfig):
    """A LLaMA configuration with one number a layer.

    `num_key_value_heads`, `num_attention_heads`, `query_heads_per_kv_head` and `intermediate_size` are lists; a layer
    may have no heads or no channels. With `output_biases`, the attention output and the MLP down projection, and no
    other matrices of a LLaMA, add a bias. `family` says which relative of LLaMA it is: query, key and value of a
    `qwen2` add a bias, query and key heads of a `qwen3` are normalised. With a `sliding_window`, a token sees that many
    positions, its own among them.
    """

    model_type = "saap_llama"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        hidden_size: int = 16,
        head_dim: int = 4,
        num_key_value_heads: list[int] | None = None,
        num_attention_heads: list[int] | None = None,
        query_heads_per_kv_head: list[int] | None = None,
        intermediate_size: list[int] | None = None,
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
        self.num_key_value_heads = [1] if num_key_value_heads is None else num_key_value_heads
        layers = len(self.num_key_value_heads)
        self.query_heads_per_kv_head = query_heads_per_kv_head or [1] * layers
        pairs = zip(self.num_key_value_heads, self.query_heads_per_kv_head, strict=True)
        self.num_attention_heads = num_attention_heads or [heads * group for heads, group in pairs]
        self.intermediate_size = intermediate_size or [4 * hidden_size] * layers
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", layers)
        lengths = {layers, self.num_hidden_layers, len(self.num_attention_heads), len(self.intermediate_size)}
        if len(lengths) != 1:
            raise ValueError(f"expected one number a layer in every list, got lists of {sorted(lengths)} numbers")
        self.output_biases, self.hidden_act, self.rms_norm_eps = output_biases, hidden_act, rms_norm_eps
        self.attention_bias = self.mlp_bias = False
        self.family, self.sliding_window = family, sliding_window
        self.max_position_embeddings, self.initializer_range = max_position_embeddings, initializer_range
        self.attention_dropout, self.use_cache = attention_dropout, use_cache
        self.rope_parameters = rope_parameters
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**kwargs)
