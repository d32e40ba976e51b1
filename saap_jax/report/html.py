"""The page of a run: one HTML file that needs no network."""

import base64
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from saap_jax.report import figures, tables
from saap_jax.report.fusion import csv_fusions, fusion_cells, fusion_figure
from saap_jax.report.records import plain, read_candidates, read_run, write_atomically
from saap_jax.report.rows import DENSE, Record, Row, comparison_rows, first_metric, merged, metrics
from saap_jax.report.tables import format_ppl

_DOMAINS = {"in": "in domain", "out": "out of domain"}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run directory, finished or not, and return its path."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, render_report(run_dir).encode())
    return path


def render_report(run_dir: str | os.PathLike[str]) -> str:
    """Return the page of a run, made from `run.json` and `metrics.jsonl` alone.

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run.
    """
    run = read_run(run_dir)
    candidates, corrupt = read_candidates(run_dir)
    rows, variants = comparison_rows(run, candidates), merged(candidates)
    maps = _by_ratio(rows, variants)
    view = {
        "run": run,
        "corrupt": corrupt,
        "summary": summary(run, rows),
        "headline": tables.headline(run),
        "legend": tables.legend(run, rows),
        "comparison": _comparison(run, rows),
        "csv": csv_link(tables.csv_table(run, candidates)),
        "frontiers": {
            f"{metric['name']} ({_DOMAINS[metric['domain']]})": figures.frontier(run, variants, metric["name"])
            for metric in metrics(run)
        },
        "maps": {
            title: figures.kept_map(run, chosen, f"Share of units kept by layer, {title}")
            for title, chosen in maps.items()
        },
        "fusion": fusion_section(run),
        "cut": tables.cut_rows(run),
        "cut_notes": cut_notes(run),
        "facts": run_facts(run),
        "config": json.dumps(plain(run.get("config")), indent=2),
    }
    return render_page("report.html", view)


def render_page(template: str, view: dict[str, Any]) -> str:
    """Return a page made from one of this package's templates; what `view` holds is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(view)


def fusion_section(run: Record) -> dict[str, Any]:
    """Return what a page shows of a run's fused scores: formula, figure, table and CSV; empty if nothing was fused."""
    fusions = run.get("fusions") or {}
    header, lines = fusion_cells(fusions)
    if not lines:
        return {}
    constant = ((run.get("config") or {}).get("fusion") or {}).get("scope_constant")
    return {
        "formula": "Σ I / (2 σ²)" + (" + Σ log σ" if constant else ""),
        "header": header,
        "lines": lines,
        "figure": fusion_figure(fusions),
        "csv": csv_link(csv_fusions(fusions)),
    }


def csv_link(text: str) -> str:
    """Return CSV as an address that holds it, so that a page needs no second file."""
    return f"data:text/csv;base64,{base64.b64encode(text.encode()).decode()}"


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
        sentences.append(f"At {100 * ratio:g} % asked, {'; '.join(said)}.")
    best = run.get("best") or {}
    if best:
        changes = [f"{row.label} {row.dense} to {row.cut} ({row.change})" for row in tables.cut_rows(run)[:3]]
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
        return f"no variant has a finite perplexity {_DOMAINS[domain]}"
    (ppl, label), *others = finite
    said = f"{label} is best {_DOMAINS[domain]} with perplexity {format_ppl(ppl)}"
    if math.isfinite(dense):
        said += f" (dense {format_ppl(dense)})"
    if others:
        second, name = others[0]
        gap = 100 * (1 - ppl / second)
        said += f", level with {name}" if gap < 0.05 else f", {gap:,.1f} % below {name} ({format_ppl(second)})"
    return said


def _by_ratio(rows: Sequence[Row], variants: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the variants at each asked ratio, in the order of the comparison."""
    named = {variant["candidate"]: variant for variant in variants}
    found: dict[str, list[Record]] = {}
    for row in rows:
        if row.candidate in named:
            found.setdefault(f"{100 * row.asked:g} % asked", []).append(named[row.candidate])
    return found


def _comparison(run: Record, rows: Sequence[Row]) -> dict[str, Any]:
    """Return header and lines of the comparison; each cell as text and as the value to sort by."""
    header, cells = tables.comparison_cells(run, rows)
    lines = []
    for row, texts in zip(rows, cells, strict=True):
        ppl = [getattr(row, name.replace(" ", "_")) for name in header if name.startswith("ppl ")]
        values = [row.label, row.asked, row.actual, row.parameters, *ppl]
        lines.append(
            {"best": row.best, "dense": row.candidate == DENSE, "cells": list(zip(texts, values, strict=True))}
        )
    return {"header": header, "lines": lines}


def run_facts(run: Record) -> dict[str, str]:
    """Return what a reader needs to repeat the run, beside its configuration."""
    devices, model = run.get("devices") or {}, run.get("model") or {}
    facts = {
        "saap_jax": (run.get("versions") or {}).get("saap_jax"),
        "git commit": run.get("git_commit"),
        "devices": f"{devices.get('count')} x {devices.get('kind')} ({devices.get('platform')})" if devices else None,
        "model": model.get("name"),
        "layers": model.get("layers"),
        "units a layer": ", ".join(f"{name} {units}" for name, units in model.get("units", {}).items()),
        "parameters": f"{model['parameters']:,}" if "parameters" in model else None,
        "prunable parameters": f"{model['prunable_parameters']:,}" if "prunable_parameters" in model else None,
        "seeds": "; ".join(f"{name} {_listed(seed)}" for name, seed in (run.get("seeds") or {}).items()),
        "libraries": ", ".join(f"{n} {v}" for n, v in (run.get("versions") or {}).items() if n != "saap_jax" and v),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _listed(value: Any) -> str:
    """Return a number, or several, as text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
