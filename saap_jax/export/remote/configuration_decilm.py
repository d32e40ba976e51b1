"""Configuration of a DeciLM, as vLLM reads it: a LLaMA whose layers have MLPs of their own. Travels with weights."""

from typing import Any

from transformers import PreTrainedConfig


class Block(dict):
    """A dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """Read an entry."""
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(PreTrainedConfig):
    """A LLaMA configuration with `block_configs`, an entry a layer: `attention` (`no_op`, `n_heads_in_group`: query
    heads a KV head) and `ffn` (`no_op`, `intermediate_size`). `per_layer_config` says the same to others."""

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, *, block_configs: Any = (), per_layer_config: Any = None, **kwargs: Any) -> None:
        self.block_configs = [Block({name: Block(part) for name, part in each.items()}) for each in block_configs]
        for name in ("rope_parameters", "max_position_embeddings", "head_dim"):  # which its checks of rotations read
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)
