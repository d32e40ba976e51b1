"""The families of models: all in which one differs from LLaMA, an entry each.

What a `config.json` may say beside what all have follows the configuration classes of transformers; names and limits in
GGUF, llama.cpp.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class Gguf(NamedTuple):
    """How llama.cpp computes a family."""

    architecture: str = "llama"
    """Of layers that are alike; where they differ, `deci`."""
    equal_layers: bool = False
    """Layers have to be alike: narrower ones are widened by zeros, but for experts, of which there have to be as many.
    Biases of output projections are not known there, nor rope type `llama3` but in `llama`."""
    whole_heads: bool = False
    """Heads have to be together as wide as the residual stream: with `equal_layers` there are made more, else the
    model becomes a `llama`."""
    keys: frozenset[str] = frozenset()
    """Attributes that are read beside those of all architectures."""
    windows: bool = False
    """It has the windows of layers apart, and their rotary base: those of the family's defaults, in the order that the
    family has by default."""
    expert_channels: str = "feed_forward_length"
    """Of a mixture: attribute that says how many channels each expert has."""


class Mixture(NamedTuple):
    """How a family of mixtures of experts is stored: tensors `EXPERTS.NUMBER.PART.weight`, and keys of its config."""

    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """How gate, up and down of an expert are called."""
    counts: tuple[str, ...] = ("num_experts", "num_local_experts")
    """Keys that say how many experts a layer has; all of them are written."""
    channels: str = "moe_intermediate_size"
    """Key of the channels of an expert."""
    summed: str | None = "norm_topk_prob"
    """Key that says whether the weights of the experts of a token are divided by their sum; None: they always are."""

    @property
    def keys(self) -> frozenset[str]:
        """Keys of a config that are read."""
        return frozenset({*self.counts, self.channels, "num_experts_per_tok", *([self.summed] if self.summed else [])})

    @property
    def names(self) -> dict[str, str]:
        """Path of a parameter in a layer -> the name of its tensor, of all experts together."""
        parts = zip(("gate", "up", "down"), self.parts, strict=True)
        return {"mlp/router": self.router} | {f"mlp/{name}": f"{self.experts}.{part}" for name, part in parts}

    @property
    def sides(self) -> dict[str, int]:
        """Name in a layer of a tensor of all experts together -> the axis along which they lie side by side."""
        return {f"{self.experts}.{part}.weight": side for part, side in zip(self.parts, (0, 0, 1), strict=True)}


class Family(NamedTuple):
    """In what a family differs from LLaMA, its defaults among it."""

    architecture: str
    """Name of its language model in transformers."""
    input_biases: bool = False
    """Query, key and value add a bias each."""
    head_norms: bool = False
    """Each head of query and key is normalised before it is turned to its position."""
    post_norms: bool = False
    """What attention and MLP write is normalised before it joins the residual stream."""
    norm_offset: float = 0.0
    """Added to the scale of every norm."""
    activation: str = "silu"
    """Of the gate of the MLP, as transformers calls it."""
    scaled_words: bool = False
    """Embeddings are multiplied by the square root of their width where they enter the residual stream."""
    windowed: bool = False
    """A token may see only the last `Constants.sliding_window` positions, as a config may say."""
    fused: bool = False
    """Query, key and value are stored as one matrix, and so are gate and up."""
    scaled: bool = True
    """Rotary frequencies may be rescaled."""
    window_by_layer: bool = False
    """A config may give some layers a window and others none."""
    window_switch: bool = False
    """A config says whether there is a window at all (`use_sliding_window`), and from which layer on."""
    full_every: int = 0
    """Where a config does not say which layers have a window: all but each of this number; 0: all."""
    local_theta: float | None = None
    """Default of a rotary base of their own for layers with a window; None where all have the same."""
    activation_key: str = "hidden_act"
    """How a config calls the activation."""
    layer_names: Mapping[str, str] = _NONE
    """Of our norms in a layer those that are called otherwise than in LLaMA."""
    plain_biases: bool = False
    """A plain config has a place for biases of all projections, those of the output projections among them."""
    heads_divide: bool = False
    """transformers wants a number of heads that divides the width of the residual stream."""
    groups_said: bool = True
    """A config must say `num_key_value_heads`; else there is one KV head a query head."""
    only: Mapping[str, tuple[Any, ...]] = _NONE
    """Keys that change the computation -> the values that this model computes; `architectures` goes without saying."""
    read: frozenset[str] = frozenset()
    """Keys that are read beside those of all families and of windows."""
    defaults: Mapping[str, Any] = _NONE
    """What a missing key stands for, where that is not as in LLaMA."""
    harmless: frozenset[str] = frozenset()
    """Keys that say nothing about the logits."""
    written: Mapping[str, Any] = _NONE
    """Keys that a plain config has beside those of all families and of the window."""
    gguf: Gguf = Gguf()
    mixture: Mixture | None = None
    """Its MLPs are mixtures of experts."""

    @property
    def experts(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return self.mixture is not None

    @property
    def keys(self) -> frozenset[str]:
        """Keys of a plain config that are read beside those of all families."""
        found = set(self.read) | (set(self.mixture.keys) if self.mixture else set())
        found |= {"sliding_window"} if self.windowed else set()
        found |= {"layer_types"} if self.window_by_layer else set()
        return frozenset(found | ({"use_sliding_window", "max_window_layers"} if self.window_switch else set()))

    @property
    def allowed(self) -> dict[str, tuple[Any, ...]]:
        """Keys of a plain config that change the computation -> the values that this model computes."""
        return {"architectures": (None, [self.architecture])} | dict(self.only)


_FALSE = (None, False)
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": None}
_QWEN |= {"eos_token_id": None}
_ROUTING = frozenset({"output_router_logits", "router_aux_loss_coef"})

# fmt: off
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", plain_biases=True, heads_divide=True, groups_said=False,
        only={"architectures": (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]), "sliding_window": (None,),
              "rope_interleaved": _FALSE, "is_llama_config": (None, True)},
        read=frozenset({"attention_bias", "mlp_bias"}),
    ),
    "mistral": Family(
        "MistralForCausalLM", windowed=True, only={"attention_bias": _FALSE},
        defaults={"max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", input_biases=True, windowed=True, window_by_layer=True, window_switch=True,
        only={"use_mrope": _FALSE}, defaults=_QWEN,
        gguf=Gguf("qwen2", equal_layers=True, whole_heads=True),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", head_norms=True, windowed=True, window_by_layer=True, window_switch=True,
        only={"attention_bias": _FALSE, "use_mrope": _FALSE}, defaults=_QWEN | {"head_dim": 128},
        written={"attention_bias": False}, gguf=Gguf("qwen3", equal_layers=True),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", head_norms=True,
        only={"attention_bias": _FALSE, "use_sliding_window": _FALSE, "decoder_sparse_step": (None, 1),
              "mlp_only_layers": (None, [])},
        defaults={key: value for key, value in _QWEN.items() if key != "sliding_window"} | {"norm_topk_prob": False},
        harmless=_ROUTING | {"sliding_window", "max_window_layers"},
        written={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        gguf=Gguf("qwen3moe", equal_layers=True, keys=frozenset({"expert_feed_forward_length"}),
                  expert_channels="expert_feed_forward_length"),
        mixture=Mixture(),
    ),
    "mixtral": Family(
        "MixtralForCausalLM", only={"sliding_window": (None,)},
        defaults={"max_position_embeddings": 4096 * 32, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        harmless=_ROUTING | {"router_jitter_noise"}, written={"sliding_window": None}, gguf=Gguf(equal_layers=True),
        mixture=Mixture(experts="block_sparse_moe.experts", router="block_sparse_moe.gate", parts=("w1", "w3", "w2"),
                        counts=("num_local_experts",), channels="intermediate_size", summed=None),
    ),
    "phi3": Family(
        "Phi3ForCausalLM", windowed=True, fused=True, scaled=False, groups_said=False, only={"attention_bias": _FALSE},
        harmless=frozenset({"original_max_position_embeddings", "embd_pdrop", "resid_pdrop", "auto_map"}),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000},
        written={"pad_token_id": None},  # else 32000, beyond a smaller vocabulary
        gguf=Gguf("phi3", whole_heads=True, keys=frozenset({"attention.sliding_window"})),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", head_norms=True, post_norms=True, norm_offset=1.0, heads_divide=True, scaled_words=True,
        activation="gelu_pytorch_tanh", activation_key="hidden_activation", windowed=True, window_by_layer=True,
        full_every=6, local_theta=10_000.0,
        layer_names={"attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
                     "mlp_post_norm": "post_feedforward_layernorm"},
        only={"attention_bias": _FALSE, "use_bidirectional_attention": _FALSE, "attn_logit_softcapping": (None,),
              "final_logit_softcapping": (None,), "hidden_act": (None, "gelu_pytorch_tanh"),
              "hidden_activation": (None, "gelu_pytorch_tanh")},
        read=frozenset({"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
                        "query_pre_attn_scalar"}),
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "head_dim": 256, "bos_token_id": 2,
                  "eos_token_id": 1, "rope_theta": 1_000_000.0, "query_pre_attn_scalar": 256,
                  "tie_word_embeddings": True},
        harmless=frozenset({"cache_implementation"}), written={"pad_token_id": None},
        gguf=Gguf("gemma3", equal_layers=True, windows=True,
                  keys=frozenset({"attention.sliding_window", "rope.freq_base_swa"})),
    ),
}
# fmt: on
"""`model_type` of a config -> the family."""


def all_but_each(every: int, layers: int) -> tuple[int, ...]:
    """Return the numbers of layers without each of some number.

    >>> all_but_each(3, 7)
    (0, 1, 3, 4, 6)
    """
    return tuple(layer for layer in range(layers) if (layer + 1) % every)
