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
    heads a KV head) and `ffn` (`no_op`, `intermediate_size`)."""

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, *, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        parts = ("attention", "ffn")
        self.block_configs = [Block({part: Block(each[part]) for part in parts}) for each in block_configs or []]
        self.rope_parameters = kwargs.pop("rope_parameters", None)
        super().__init__(**kwargs)
