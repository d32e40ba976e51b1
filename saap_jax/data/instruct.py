"""Instruction data: what was asked, and the response that a model is to learn; the prompt that leads to it.

A JSON object a line, with the fields of Alpaca (`instruction`, `input`, `output`) or of Dolly (`instruction`,
`context`, `response`); others are not read. Input and context may be absent or empty.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from saap_jax.data.json_lines import fields_of, json_lines

CONTEXTS, RESPONSES = ("input", "context"), ("output", "response")
"""Names of the same field in Alpaca and in Dolly."""

WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
WITHOUT_CONTEXT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Alpaca's prompts (tatsu-lab/stanford_alpaca, train.py), to the letter up to a line end that LLM-Pruner adds too."""


class Exchange(NamedTuple):
    """One instruction with its response; `context` may be empty."""

    name: str
    instruction: str
    context: str
    response: str

    @property
    def prompt(self) -> str:
        """The instruction in Alpaca's template."""
        template = WITH_CONTEXT if self.context else WITHOUT_CONTEXT
        return template.format(instruction=self.instruction, context=self.context)

    @property
    def said(self) -> str:
        """What a user says in a chat: the instruction, and after a blank line what it is about."""
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction


def parse_exchanges(lines: Iterable[tuple[int, bytes]], source: str) -> tuple[Exchange, ...]:
    """Read the exchanges of JSON lines with their numbers, in order; empty responses are kept.

    Raises:
        ValueError: a line is no JSON object, or lacks a string `instruction` or a string response.
    """
    exchanges = []
    for number, record in json_lines(lines, source):
        instruction = _field(record, ("instruction",), source, number)
        context = _field(record, CONTEXTS, source, number, default="")
        response = _field(record, RESPONSES, source, number)
        exchanges.append(Exchange(f"line {number}", instruction.strip(), context.strip(), response.strip()))
    return tuple(exchanges)


def _field(record: dict[str, Any], names: tuple[str, ...], source: str, number: int, default: str | None = None) -> str:
    value = next((record[name] for name in names if name in record), default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise ValueError(
            f"data source {source!r}: line {number}: expected a string field {' or '.join(map(repr, names))}, found "
            f"fields: {fields_of(record)}; instruction data has the fields of Alpaca or Dolly"
        )
    return value
