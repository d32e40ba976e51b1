"""The configurations of the commands that use a model, pruned or not: `generate` and `bench`."""

import dataclasses
from typing import Literal

from saap_jax.config.checks import check_at_least, check_choices, check_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue texts with a model, greedily unless a temperature is given."""

    model: str = "smollm2-135m"
    """The model: a name, GGUF file or directory, pruned or not."""
    prompts: tuple[str, ...] = ()
    """Texts to continue; `-` stands for what comes on standard input."""
    chat: bool = False
    """Take each prompt as what a user says, in the model's chat template."""
    max_new_tokens: int = 64
    """The most tokens that a continuation has."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the most probable token."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are not part of it, besides the model's own end tokens."""
    batch_size: int = 8
    """Prompts continued at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""

    def __post_init__(self) -> None:
        check_choices("generate", self)
        if not self.prompts:
            raise ValueError('prompts: expected one or more texts after the model, such as "Once upon a time", or -')
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_seed("seed", self.seed)
        check_at_least("batch_size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What models cost: parameters, operations, bytes, memory, and the time of prefill and decoding, side by side."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    baseline: str = "smollm2-135m"
    """The model that ratios refer to; it is measured too. Empty: the first model."""
    batch_sizes: tuple[int, ...] = (1,)
    """Rows at once; each is measured."""
    prompt_lengths: tuple[int, ...] = (128,)
    """Tokens of each row's prompt; each is measured with each batch size."""
    new_tokens: int = 32
    """Tokens that are decoded after the prompt."""
    repeats: int = 7
    """Measurements of each model, in turns, after one that compiles."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    json: str = ""
    """File that the result is written to; empty: none."""

    def __post_init__(self) -> None:
        check_choices("bench", self)
        if not self.models:
            raise ValueError("models: expected at least one model, got none")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models: expected each once, got {', '.join(self.models)}")
        for name in ("batch_sizes", "prompt_lengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected one or more numbers, each once, got {list(values)}")
            check_at_least(name, min(values), 1)
        check_at_least("new_tokens", self.new_tokens, 1)
        check_at_least("repeats", self.repeats, 1)
