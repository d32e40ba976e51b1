"""Turn a chat into tokens by the template of a tokenizer: a program that the library runs in a sandbox."""

from typing import Any

from saap_jax.runtime.errors import reading


def encode_chat(tokenizer: Any, said: str) -> list[int]:
    """Encode a chat in which the user said something and the assistant is to answer.

    The template writes special tokens itself, so the tokenizer must not add a BOS token a second time. Raises
    `ValueError` as `conversation`, and where the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat: expected a tokenizer with a chat template, got one without; leave --chat out")
    check_text("prompt", said)
    text = conversation(tokenizer, [{"role": "user", "content": said}], add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def conversation(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """Write messages as one text, by the chat template of a tokenizer.

    Raises:
        ValueError: it fails on them, or what it makes is no text.
    """
    with reading(f"chat template of {tokenizer.name_or_path or 'the tokenizer'}", "one that takes this conversation"):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        check_text("chat template", text)
        return text


def check_text(name: str, text: str) -> None:
    """Raise ValueError for halves of characters, as which words of a command line that are no UTF-8 come."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start : error.start + 1])
        raise ValueError(f"{name}: expected text, got half of a character, {half}, at {error.start}") from None
