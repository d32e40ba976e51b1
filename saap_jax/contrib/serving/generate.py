"""What `saap generate` runs: load a model, continue texts."""

import sys
from collections.abc import Iterator

from saap_jax.config.use import GenerateConfig
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.generate import Sampling, decoder_of, stream_texts
from saap_jax.runtime.progress import Track, quiet


def generate(config: GenerateConfig, *, track: Track = quiet) -> Iterator[str]:
    """Yield what a model makes of the prompts: of one as it comes, of several one after the other. On a terminal each
    prompt stands before its continuation.

    Raises:
        ValueError: bad settings, or a prompt that does not fit the model.
        FileNotFoundError: no such model.
    """
    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in config.prompts]
    if "-" in config.prompts and not all(prompts):
        raise ValueError("prompts: expected some text on standard input for -, got none")
    pieces = stream_texts(
        decoder_of(load_model(config.model, config.dtype)),  # the stacked layers are not kept beside it
        load_tokenizer(config.model),
        prompts,
        max_new_tokens=config.new_tokens,
        stop_strings=config.stop,
        sampling=sampling,
        chat=config.chat,
        batch_size=config.batch_size,
    )
    if sys.stdout.isatty():
        texts = [f"{each}\n\n" if config.chat else each for each in prompts]
    else:
        texts = [""] * len(prompts)
    if len(prompts) == 1:
        try:
            yield texts[0]
            yield from (piece for _, piece in pieces)
        except (Exception, KeyboardInterrupt):  # what is said of it begins on a line of its own
            yield "\n"
            raise
        yield "\n"
        return
    for row, piece in pieces:
        texts[row] += piece
    for number, text in enumerate(texts, start=1):
        yield f"--- {number}\n{text}\n"
