"""What a comparison found, in words."""

import math
from collections.abc import Mapping, Sequence

from saap_jax.evaluation.paired import LEVEL
from saap_jax.report.kinds.against import Against
from saap_jax.report.kinds.tables import cut_rows, format_ppl
from saap_jax.report.page.blocks import plural
from saap_jax.report.rows import DENSE, Record, Row, first_metric, untested

DOMAINS = {"in": "in domain", "out": "out of domain"}


def summary(run: Record, lines: Sequence[Row], against: Sequence[Against] = ()) -> list[str]:
    """Say in words what the run found: the lowest perplexity of each ratio, who ties with it, what the cut model saves.

    A variant is called best only where all others were tested and can be told apart from it.

    Args:
        lines: the rows of the comparison.
        against: the same beside the best of each ratio, of every text.
    """
    rows = [row for row in lines if row.candidate != DENSE]
    dense = next((row for row in lines if row.candidate == DENSE), None)
    sentences = [] if rows else ["No candidate is finished yet."]
    domains = [domain for domain in ("out", "in") if first_metric(run, domain)]
    for ratio in dict.fromkeys(row.asked for row in rows):
        group = [row for row in rows if row.asked == ratio]
        said = []
        for place, domain in enumerate(domains):
            tested = {row.label: row.p_value for row in group}
            if place:  # the other text, on which all are compared with the best of the first
                tested = {one.label: one.p_value for one in against if (one.asked, one.domain) == (ratio, domain)}
            said.append(_lead(group, domain, getattr(dense, f"ppl_{domain}", math.nan), tested))
        why = untested(group) if len(group) > 1 else ""
        sentences.append(
            f"At {100 * ratio:g} % asked, {'; '.join(said)}.{f' Nothing is tested: {why}.' if why else ''}"
        )
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


def _lead(group: Sequence[Row], domain: str, dense: float, tested: Mapping[str, float]) -> str:
    """Say which row has the lowest perplexity on a domain, and how it stands to the others and to the dense model.

    `tested` are the p-values of the others against the best of the ratio, adjusted.
    """
    finite = sorted((getattr(row, f"ppl_{domain}"), row.label, row.best) for row in group)
    finite = [each for each in finite if math.isfinite(each[0])]
    if not finite:
        return f"no variant has a finite perplexity {DOMAINS[domain]}"
    (ppl, label, best), *others = finite
    known = f" (dense {format_ppl(dense)})" if math.isfinite(dense) else ""
    p_values = [(name, tested.get(name, math.nan)) for _, name, _ in others]
    tied = [name for name, p in p_values if p >= LEVEL]
    lowest = f"{label} has the lowest perplexity {DOMAINS[domain]}, {format_ppl(ppl)}{known}"
    if not others:
        return f"{label} has a perplexity of {format_ppl(ppl)} {DOMAINS[domain]}{known}"
    if best and tied:
        return f"{lowest}, and {plural(len(tied), 'other')} cannot be told apart from it: {some(tied)}"
    if best and all(p < LEVEL for _, p in p_values):
        lowest = f"{label} is best {DOMAINS[domain]} with perplexity {format_ppl(ppl)}{known}"
    second, name, _ = others[0]
    gap = 100 * (1 - ppl / second)
    return (
        f"{lowest}, level with {name}" if gap < 0.05 else f"{lowest}, {gap:,.1f} % below {name} ({format_ppl(second)})"
    )


def some(names: Sequence[str], at_most: int = 3) -> str:
    """Return the first names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
