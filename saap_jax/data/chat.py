"""Prompts: a chat by a tokenizer's template, and instructions with responses, as Alpaca or Dolly has them."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from saap_jax.errors import fields_of, reading

SECONDS = 30.0
"""How long a chat template may take for one conversation: a thousand times as long as any known one does."""


def encode_chat(tokenizer: Any, said: str) -> list[int]:
    """Encode a chat in which the user said something and the assistant is to answer.

    The template writes special tokens itself, so the tokenizer must not add a BOS token a second time. Raises
    `ValueError` as `conversation`.
    """
    check_text("prompt", said)
    text = conversation(tokenizer, [{"role": "user", "content": said}], add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def conversation(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """Write messages as one text, by the chat template of a tokenizer: a program that runs in a sandbox.

    Raises:
        ValueError: there is none, it fails on them, it does not end, or what it makes is no text.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "chat: expected a tokenizer with a chat template, got one without; leave --chat out, or take "
            "data.template alpaca"
        )
    with reading(f"chat template of {tokenizer.name_or_path or 'the tokenizer'}", "one that takes this conversation"):
        with _ending(SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        check_text("chat template", text)
        return text


@contextlib.contextmanager
def _ending(seconds: float) -> Iterator[None]:
    """Raise TimeoutError from within Python code that runs longer than it may, as nested loops of a template would.

    The clock is looked at before every line, and so in every thread, where a signal would reach the main one alone.
    """
    end = time.monotonic() + seconds

    def look(*_: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it has not ended after {seconds:g} seconds; give the tokenizer another template")
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def around_answer(tokenizer: Any) -> tuple[str, int | None]:
    """Find what the chat template writes around an answer: the white space before it, of Llama 2 a blank, and the
    special token that ends it, of Gemma `<end_of_turn>`; where there is none, the end of text."""
    asked = "Is it so?"
    answer = "So it is."
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    prompt = conversation(tokenizer, turns[:1], add_generation_prompt=True)
    before, _, behind = conversation(tokenizer, turns).removeprefix(prompt).rpartition(answer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tokens = tokenizer.encode(behind, add_special_tokens=False)
    end = next((token for token in tokens if token in special), tokenizer.eos_token_id)
    return before if before.isspace() else "", end


def check_text(name: str, text: str) -> None:
    """Raise ValueError for halves of characters, as which words of a command line that are no UTF-8 come."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start : error.start + 1])
        raise ValueError(f"{name}: expected text, got half of a character, {half}, at {error.start}") from None


class Exchange(NamedTuple):
    """One instruction with its response; `context` may be empty."""

    name: str
    instruction: str
    context: str
    response: str

    @property
    def prompt(self) -> str:
        """The instruction in Alpaca's template (tatsu-lab/stanford_alpaca, train.py), to the letter up to a line end
        that LLM-Pruner adds too."""
        if self.context:
            paired = ", paired with an input that provides further context"
        else:
            paired = ""
        given = ""
        if self.context:
            given = f"### Input:\n{self.context}\n\n"
        return (
            f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{self.instruction}\n\n{given}### Response:\n"
        )

    @property
    def said(self) -> str:
        """What a user says in a chat: the instruction, and after a blank line what it is about."""
        if self.context:
            return f"{self.instruction}\n\n{self.context}"
        return self.instruction


def exchange_of(name: str, record: dict[str, Any], source: str) -> Exchange:
    """Read the exchange of a JSON object with the fields of Alpaca (`instruction`, `input`, `output`) or of Dolly
    (`instruction`, `context`, `response`); input and context may be absent, a response may be empty.

    Raises:
        ValueError: a field is no string, or instruction or response are missing.
    """
    found = []
    for names, default in (("instruction",), None), (("input", "context"), ""), (("output", "response"), None):
        value = next((record[each] for each in names if each in record), None)
        value = default if value is None else value
        if not isinstance(value, str):
            raise ValueError(
                f"data source {source!r}: {name}: expected a string field {' or '.join(map(repr, names))}, found "
                f"fields: {fields_of(record)}; instruction data has the fields of Alpaca or Dolly"
            )
        found.append(value.strip())
    return Exchange(name, *found)
