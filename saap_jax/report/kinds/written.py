"""What models wrote after the same prompts."""

from collections.abc import Sequence

from saap_jax.report.page.blocks import Block, Facts, Part, Section, Words
from saap_jax.runs.records import RunRecord, WrittenText

TITLE = "What they write"


def written_section(run: RunRecord) -> list[Section]:
    """Return what the models of a run wrote; nothing where nothing is on record."""
    blocks = written_blocks(run.get("written", ()))
    return [Section("written", TITLE, blocks)] if blocks else []


def written_blocks(texts: Sequence[WrittenText]) -> list[Block]:
    """Return a part a prompt, a line a model."""
    if not texts:
        return []
    said = "The likeliest token each time. To be looked at: a few sentences do not tell how good a model is."
    return [Words(said), *(Part(f"“{each['prompt']}”", [Facts(_lines(each))]) for each in texts)]


def _lines(text: WrittenText) -> dict[str, str]:
    return {model: " ".join(said.split()) or "(nothing)" for model, said in text["texts"].items()}
