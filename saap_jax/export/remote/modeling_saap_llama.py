"""A LLaMA model, or a relative of it, whose layers have widths of their own, built of the modules in transformers.

Travels with the model's weights; load it with `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`.
Only sizes and biases are set here: the computation is that of `LlamaAttention`, or of `Qwen3Attention` where heads are
normalised; the model around the layers is `MistralModel`, which is `LlamaModel` but for the sliding window.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel, MistralModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_saap_llama import SaapLlamaConfig


class SaapLlamaAttention(LlamaAttention):
    """Attention with the heads of one layer; without heads it returns its bias, or zero."""

    def __init__(self, config: SaapLlamaConfig, layer: int) -> None:
        own = config.of_layer(layer)
        heads = own.num_key_value_heads
        group = own.num_attention_heads // own.num_key_value_heads
        heads = 0 if "attention" in own.skip else heads
        sizes = LlamaConfig(
            hidden_size=config.head_dim * group,  # only so that it is accepted: the projections are made below
            head_dim=config.head_dim,
            num_attention_heads=group,
            num_key_value_heads=1,
            attention_dropout=config.attention_dropout,
        )
        # A cache's length is that of its first layer: count only layers that have something to keep.
        super().__init__(sizes, sum("attention" not in config.of_layer(before).skip for before in range(layer)))
        self.config = config  # which attention to run is set on the model's configuration
        self.heads = heads
        self.sliding_window = config.sliding_window
        inner = config.head_dim * heads
        biases = config.family == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, inner * group, bias=biases)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=biases)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=biases)
        self.o_proj = nn.Linear(inner * group, config.hidden_size, bias=config.output_biases)
        self.normed = config.family == "qwen3"
        if self.normed:
            self.q_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Attend as in LLaMA, or as in Qwen3."""
        if self.heads == 0:
            return self.o_proj(hidden_states[..., :0]), None
        if self.normed:
            return Qwen3Attention.forward(self, hidden_states, *args, **kwargs)
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        return super().forward(hidden_states, *args, **kwargs)


class SaapLlamaMLP(LlamaMLP):
    """Feed-forward block with the channels of one layer, perhaps none; a bias of the down projection alone."""

    def __init__(self, config: SaapLlamaConfig, layer: int) -> None:
        own = config.of_layer(layer)
        sizes = LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=0 if "mlp" in own.skip else own.intermediate_size,
            num_attention_heads=1,
            hidden_act=config.hidden_act,
        )
        super().__init__(sizes)
        self.config = config
        self.down_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.output_biases)


class SaapLlamaDecoderLayer(LlamaDecoderLayer):
    """A decoder layer with its own widths."""

    def __init__(self, config: SaapLlamaConfig, layer: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = SaapLlamaAttention(config, layer)
        self.mlp = SaapLlamaMLP(config, layer)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SaapLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What both models share."""

    config: SaapLlamaConfig
    config_class = SaapLlamaConfig
    _no_split_modules = ("SaapLlamaDecoderLayer",)
    _can_record_outputs = {"hidden_states": SaapLlamaDecoderLayer, "attentions": SaapLlamaAttention}  # noqa: RUF012


class SaapLlamaModel(SaapLlamaPreTrainedModel, MistralModel):
    """Embedding, layers and final norm; runs as `MistralModel`."""

    def __init__(self, config: SaapLlamaConfig) -> None:
        super(MistralModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(SaapLlamaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SaapLlamaForCausalLM(SaapLlamaPreTrainedModel, LlamaForCausalLM):
    """The language model; runs and generates as `LlamaForCausalLM`."""

    def __init__(self, config: SaapLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = SaapLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
