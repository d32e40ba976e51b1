"""How units were chosen by divergence from the unpruned model: before, at best, and round by round."""

from saap_jax.report.figures.divergence import divergence_plot
from saap_jax.report.page.blocks import Block, Data, Detail, Picture, Section, Words, text_table
from saap_jax.runs.records import RunRecord


def divergence_section(run: RunRecord, detail: Detail) -> list[Section]:
    """Return what `search.learn` and `search.evolve` brought; nothing where no candidate was chosen so."""
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
