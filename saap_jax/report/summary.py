"""What a comparison found, in words."""

import math
from collections.abc import Sequence

from saap_jax.report.blocks import plural
from saap_jax.report.rows import DENSE, Record, Row, first_metric
from saap_jax.report.tables import cut_rows, format_ppl

DOMAINS = {"in": "in domain", "out": "out of domain"}


def summary(run: Record, lines: Sequence[Row]) -> list[str]:
    """Say in words what the run found: the best variant of each ratio, by how much, and what the cut model saves."""
    rows = [row for row in lines if row.candidate != DENSE]
    dense = next((row for row in lines if row.candidate == DENSE), None)
    sentences = [] if rows else ["No candidate is finished yet."]
    for ratio in dict.fromkeys(row.asked for row in rows):
        group = [row for row in rows if row.asked == ratio]
        said = [
            _lead(group, domain, getattr(dense, f"ppl_{domain}", math.nan))
            for domain in ("out", "in")
            if first_metric(run, domain)
        ]
        sentences.append(f"At {100 * ratio:g} % asked, {'; '.join(said)}.{_ties(group)}")
    best = run.get("best") or {}
    if best:
        changes = [f"{row.label} {row.dense} to {row.cut} ({row.change})" for row in cut_rows(run)[:3]]
        sentences.append(
            f"The cut model ({best.get('candidate', 'unnamed')}) goes from dense to cut: {', '.join(changes)}."
        )
    return sentences


def cut_notes(run: Record) -> list[str]:
    """Say what else was recorded about the cut model: runs of equal layers, and whether masks and cuts agree."""
    best = run.get("best") or {}
    notes = []
    if "runs" in best:
        notes.append(f"Compiled as {best['runs']} run{'s' if best['runs'] != 1 else ''} of neighbouring equal layers.")
    masked = best.get("ppl_masked", {})
    gaps = [abs(best["ppl"][name] / value - 1) for name, value in masked.items() if best.get("ppl", {}).get(name)]
    if gaps:
        notes.append(f"Perplexity with masks instead of cuts differs by at most {max(gaps):.1e} (relative).")
    return notes


def _lead(group: Sequence[Row], domain: str, dense: float) -> str:
    """Say which row has the lowest perplexity on a domain, and how it stands to the next and to the dense model."""
    finite = sorted((getattr(row, f"ppl_{domain}"), row.label) for row in group)
    finite = [(ppl, label) for ppl, label in finite if math.isfinite(ppl)]
    if not finite:
        return f"no variant has a finite perplexity {DOMAINS[domain]}"
    (ppl, label), *others = finite
    said = f"{label} is best {DOMAINS[domain]} with perplexity {format_ppl(ppl)}"
    if math.isfinite(dense):
        said += f" (dense {format_ppl(dense)})"
    if others:
        second, name = others[0]
        gap = 100 * (1 - ppl / second)
        said += f", level with {name}" if gap < 0.05 else f", {gap:,.1f} % below {name} ({format_ppl(second)})"
    return said


def _ties(group: Sequence[Row], at_most: int = 3) -> str:
    """Say which variants cannot be told apart from the best of a ratio."""
    best = next((row.label for row in group if row.best), "")
    tied = [row.label for row in group if row.tied]
    if not tied:
        return ""
    shown = ", ".join(tied[:at_most]) + (f" and {len(tied) - at_most} more" if len(tied) > at_most else "")
    return f" {plural(len(tied), 'other')} cannot be told apart from {best}: {shown}."
