"""What is kept where, as a chart: a line a variant, a column a structure, a cell a layer."""

import math
from collections.abc import Sequence

from saap_jax.report.page.blocks import Number
from saap_jax.report.page.strips import Column, Strip, chart, heat, layer_axis
from saap_jax.report.rows import Record, labels


def kept_shares(run: Record, kept: dict[str, list]) -> dict[str, list[float]]:
    """Return the share of units that each layer keeps, by structure; NaN where the layer has none."""
    structures = run.get("model", {}).get("units", {})
    shares = {}
    for name, units in structures.items():
        counts = kept.get(name, ())
        of = [units] * len(counts) if isinstance(units, int) else units
        shares[name] = [count / total if total else math.nan for count, total in zip(counts, of, strict=True)]
    return shares


def kept_map(run: Record, candidates: Sequence[Record]) -> str:
    """Return the share of units that each candidate keeps in each layer; empty where none recorded it."""
    rows = [(name, c["kept"]) for name, c in zip(labels(candidates), candidates, strict=True) if "kept" in c]
    shares = [(name, kept, kept_shares(run, kept)) for name, kept in rows]
    structures = run.get("model", {}).get("units", {})
    layers = {s: max((len(each[s]) for *_, each in shares), default=0) for s in structures}
    structures = {name: units for name, units in structures.items() if layers[name]}
    if not structures:
        return ""
    columns = [Column(f"{name} kept, by layer", layer_axis(layers[name]), lines=False) for name in structures]
    strips = [
        Strip(name, [heat(each[s], _said(name, s, kept[s], units)) for s, units in structures.items()])
        for name, kept, each in shares
    ]
    return chart("variant", columns, strips)


def _said(name: str, structure: str, counts: Sequence[Number], units: int | Sequence[int]) -> str:
    of = f"{units}" if isinstance(units, int) else " ".join(map(str, units))
    return f"{name}, {structure}: of {of} each layer keeps {' '.join(f'{count:.6g}' for count in counts)}"
