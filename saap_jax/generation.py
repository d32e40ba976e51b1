"""What `saap generate` runs: load a model, continue texts."""

import sys
from collections.abc import Iterator

from saap_jax.config_use import GenerateConfig
from saap_jax.llama import load_model, load_tokenizer
from saap_jax.llama.generate import decoder_of
from saap_jax.llama.sample import Sampling
from saap_jax.llama.text import stream_texts


def continuations(config: GenerateConfig) -> Iterator[tuple[int, str]]:
    """Yield (prompt, piece of its continuation) as it comes; errors come from the call.

    Raises:
        ValueError: bad settings, or a prompt that does not fit the model.
        FileNotFoundError: no such model.
    """
    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    prompts = [_from_standard_input() if prompt == "-" else prompt for prompt in config.prompts]
    tokenizer = load_tokenizer(config.model)
    model = decoder_of(load_model(config.model, config.dtype))  # the stacked layers are not kept beside it
    return stream_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        stop_strings=config.stop,
        sampling=sampling,
        chat=config.chat,
        batch_size=config.batch_size,
    )


def _from_standard_input() -> str:
    text = sys.stdin.read()
    if not text:
        raise ValueError("prompts: expected some text on standard input for -, got none")
    return text
