"""Turn a chat into tokens by the template of a tokenizer.

A template is a program in a model's directory. The library runs it in a sandbox, where it may read nothing and call
little; here it may not run for long, hold much memory or write much, and however it fails, one line says so.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saap_jax.formats.json_files import shown

SECONDS = 10.0
"""How long a template may run. Those of published models take milliseconds."""

MEMORY = 2**29
"""Bytes of address space that it may take."""

CHARACTERS = 2**22
"""The longest text that it may make."""


class TimeIsUp(BaseException):
    """A template has run for too long; no `Exception`, which the library's own handlers would take for a value."""


def encode_chat(tokenizer: Any, said: str) -> list[int]:
    """Return the tokens of a chat in which the user said something and the assistant is to answer.

    The template writes special tokens itself, so the tokenizer must not add a BOS token a second time. Raises
    `ValueError` as `conversation`, and where the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat: expected a tokenizer with a chat template, got one without; leave --chat out")
    check_text("prompt", said)
    text = conversation(tokenizer, [{"role": "user", "content": said}], add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def conversation(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """Return messages as one text, by the chat template of a tokenizer.

    Raises:
        ValueError: it fails, takes too long or too much memory, or what it makes is no text.
    """
    try:
        with _at_most(SECONDS, MEMORY):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (Exception, TimeIsUp) as error:  # whatever a program can raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"chat template of {tokenizer.name_or_path or 'the tokenizer'}: it fails on this conversation "
            f"({shown(reason)[1:-1]}); correct it, or do without"
        ) from None
    if not isinstance(text, str) or len(text) > CHARACTERS:
        found = f"{len(text):,}" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"chat template: expected a text of at most {CHARACTERS:,} characters, got {found}")
    check_text("chat template", text)
    return text


def check_text(name: str, text: str) -> None:
    """Raise ValueError for halves of characters, as which words of a command line that are no UTF-8 come."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start : error.start + 1])
        raise ValueError(f"{name}: expected text, got half of a character, {half}, at {error.start}") from None


@contextlib.contextmanager
def _at_most(seconds: float, memory: int) -> Iterator[None]:
    """Raise TimeIsUp or MemoryError in the body where it takes more, as far as the platform can tell."""

    def late(*_: Any) -> None:
        raise TimeIsUp(f"longer than {seconds:g} s")

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, late))
            signal.setitimer(signal.ITIMER_REAL, seconds)
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        pages = Path("/proc/self/statm")
        if pages.exists():
            import resource  # there is none on every platform

            now, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = int(pages.read_text().split()[0]) * resource.getpagesize() + memory
            if now == resource.RLIM_INFINITY or most < now:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, (now, hard))
        yield
