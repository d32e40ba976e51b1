"""Instruction data: what was asked, and the response that a model is to learn; the prompt that leads to it.

A JSON object a line, with the fields of Alpaca (`instruction`, `input`, `output`) or of Dolly (`instruction`,
`context`, `response`); others are not read. Input and context may be absent or empty.
"""

from typing import Any, NamedTuple

from saap_jax.runtime.errors import fields_of

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


def exchange_of(name: str, record: dict[str, Any], source: str) -> Exchange:
    """Read the exchange of a JSON object; an empty response is kept.

    Raises:
        ValueError: it lacks a string `instruction` or a string response.
    """

    def field(names: tuple[str, ...], default: str | None = None) -> str:
        value = next((record[each] for each in names if each in record), default)
        value = default if value is None else value
        if not isinstance(value, str):
            raise ValueError(
                f"data source {source!r}: {name}: expected a string field {' or '.join(map(repr, names))}, found "
                f"fields: {fields_of(record)}; instruction data has the fields of Alpaca or Dolly"
            )
        return value.strip()

    return Exchange(name, field(("instruction",)), field(CONTEXTS, ""), field(RESPONSES))
