"""How units were chosen by divergence from the unpruned model: before, at best, and round by round."""

import math

from saap_jax.report.figures.divergence import divergence_plot
from saap_jax.report.page.blocks import Block, Data, Detail, Picture, Section, Words, text_table
from saap_jax.runs.records import RunRecord
from saap_jax.runtime.words import signed


def divergence_section(run: RunRecord, detail: Detail) -> list[Section]:
    """Return what was chosen by the divergence, and brought or cost what; nothing where no candidate was chosen so."""
    return [*_learnt(run, detail), *_priced(run)]


def _priced(run: RunRecord) -> list[Section]:
    """Return what layers cost that are all alike."""
    if not (found := run.get("prices", {})):
        return []
    said = Words(
        "All layers that stay are alike, as plain models have it: how many layers, heads and channels was searched by "
        "the divergence from the unpruned model. Beside it, on the same held-out calibration text, what the search "
        "chose where each layer is free, of as many parameters."
    )
    lines = [
        [name, f"{free:.4f}", f"{alike:.4f}", f"{signed(100 * math.expm1(alike - free), 1)} %"]
        for name, (free, alike) in found.items()
    ]
    header = ["candidate", "KL, free layers (nats a token)", "layers alike", "perplexity for that"]
    return [Section("uniform", "The price of layers that are alike", [said, text_table("", header, lines, words=1)])]


def _learnt(run: RunRecord, detail: Detail) -> list[Section]:
    """Return what `search.learn` and `search.evolve` brought."""
    found = run.get("divergences", {})
    if not found:
        return []
    lines = [
        [name, f"{values[0]:.4f}", f"{min(values):.4f}", f"{values.index(min(values))} of {len(values) - 1}"]
        for name, values in found.items()
    ]
    blocks: list[Block] = [
        Words(
            "Which units stay was trained or evolved under the exact budget, with all weights as they are, towards "
            "what the unpruned model predicts. Calibration text that was held out from it says which round counts."
        )
    ]
    if detail.drawn:
        shown = dict(list(found.items())[: detail.limit])
        blocks.append(Picture("Divergence by round", divergence_plot(shown)))
    header = ["candidate", "KL before (nats a token)", "at best", "in round"]
    blocks.append(text_table("Divergence before and after", header, lines, words=1))
    if detail.downloads:
        rows = [(name, number, value) for name, values in found.items() for number, value in enumerate(values)]
        blocks.append(Data("CSV of divergences, full precision", "divergences.csv", ("candidate", "round", "kl"), rows))
    return [Section("divergence", "How units were chosen by divergence", blocks)]
