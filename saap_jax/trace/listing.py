"""The coupled structures of a model as tables: of one of ours, and of any traced function."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from saap_jax.llama.model import Llama
from saap_jax.records import Couplings
from saap_jax.structures.discovery import count_parameters, discover, prunable_parameters
from saap_jax.trace.axes import REASONS, Place
from saap_jax.trace.own_code import Verdict
from saap_jax.trace.trace import Traced, TracedStructure, groups_of, trace


def listing(name: str, model: Llama) -> tuple[Table, str]:
    """Tabulate the structures of a model of ours, with a sentence on its size."""
    structures = discover(model)
    columns = "structure", "members (path, axis)", "units a layer", "units", "parameters a unit"
    table = _table(f"coupled structures of {name}", *columns)
    for structure in structures.values():
        members = "\n".join(f"{member.path}, {member.axis}" for member in structure.members)
        units = _range(structure.units)
        each = _range(structure.parameters_per_unit)
        table.add_row(f"{structure.name} ({structure.axis})", members, units, f"{sum(structure.units):,}", each)
    prunable = prunable_parameters(structures)
    total = count_parameters(model)
    many = len(model.segments)
    return table, (
        f"{len(model.spec.layers)} layers in {many} segment{'s' * (many > 1)}; {total:,} parameters, "
        f"{prunable:,} of them prunable ({prunable / total:.1%})"
    )


def traced_model(model: Llama) -> Traced:
    """Trace a model of ours, to be drawn."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    return trace(Llama.__call__, shapes, jax.ShapeDtypeStruct((1, 16), jnp.int32))


def describe(traced: Traced) -> str:
    """Describe the structures as text: what is prunable, then what is pinned, and why."""
    lines = []
    for each in sorted(traced.structures, key=lambda structure: not structure.prunable):
        times = ""
        if each.copies > 1:
            times = f" in each of {each.copies}"
        head = f"{each.name}: {each.units} units{times}, {each.parameters_per_unit:,} parameters a unit"
        lines.append(head + (", prunable" if each.prunable else ", pinned"))
        for member in each.members:
            if member.places == (Place(0, 1),):
                places = []
            else:
                places = member.places
            said = [f" from {p.offset}, block {p.block}" + "".join(f", {n} times every {s}" for n, s in p.repeats)
                    for p in places]  # fmt: skip
            lines.append(f"    {member.path}[{member.axis}]{''.join(said)}")
        lines += [f"    it {reason}" for reason in each.pinned]
        if each.prunable:
            lines += [f"    changes the statistic of {where}" for where in each.normalised]
            lines += [f"    acts at {gate.where}, operand {gate.operand}, axis {gate.axis}" for gate in each.gates]
    lines += [f"no rule for {operation}: its axes are pinned" for operation in traced.unknown]
    return "\n".join(lines)


def coupling_record(traced: Traced) -> Couplings:
    """Record the structures of a program as a run keeps them."""

    def label(structure: TracedStructure) -> tuple[str, str]:
        times = ""
        if structure.copies > 1:
            times = f" × {structure.copies}"
        first = f"{structure.units}{times} units, {structure.parameters_per_unit:,} parameters each"
        if structure.pinned:
            kinds = list(dict.fromkeys(str(reason).split(" (")[0].split(" at ")[0] for reason in structure.pinned))
            return first, f"pinned: {kinds[0]}" + (f", and {len(kinds) - 1} more" if len(kinds) > 1 else "")
        if len(structure.gates) != 1:
            acts = f"{len(structure.gates)} gates"
        else:
            acts = "one gate"
        return first, f"prunable, {acts}" + (", changes a norm's statistic" if structure.normalised else "")

    return {
        "parameters": {path: list(shape) for path, shape in traced.shapes.items()},
        "structures": [
            {
                "name": each.name,
                "members": [(member.path, member.axis) for member in each.members],
                "label": label(each),
                "pinned": bool(each.pinned),
            }
            for each in sorted(traced.structures, key=lambda each: not each.prunable)
        ],
    }


def couplings_of(subject: Any) -> Couplings:
    """Record the coupled structures of a subject's program, pinned ones too.

    A traced subject has its trace; a model of ours is traced for it.
    """
    if hasattr(subject, "traced"):
        return coupling_record(subject.traced)
    return coupling_record(traced_model(subject.model))


def traced_tables(name: str, traced: Traced, verdicts: Mapping[str, Verdict]) -> list[Table | str]:
    """Tabulate what of a traced function is prunable, and what is pinned and why.

    Equal layers share a row, the name of which is a pattern that the options of `within` take. Where nothing is
    prunable, or pinned, there is no table.
    """
    prunable = traced.prunable
    shown = []
    columns = "structure", "role", "units", "parameters a unit", "own code"
    table = _table(f"prunable structures of {name}", *columns)
    said = []
    for pattern, group in groups_of(prunable).items():
        first = group[0]
        layers = len(group) * group[0].copies
        verdict = verdicts[group[0].name]
        role = first.role + (", averaged by a norm" if first.normalised and first.role == "stream" else "")
        units = f"{first.units}" + (f" in each of {layers}" if layers > 1 else "")
        table.add_row(pattern, role, units, f"{first.parameters_per_unit:,}", str(verdict._replace(detail="")))
        if verdict.detail:
            said += [f"{pattern}: the own code {verdict}"]
    shown += [table, *said] if prunable else []
    pinned = _table("pinned: what keeps its size, and why", "axis", "units", "because it")
    for pattern, group in groups_of([each for each in traced.structures if each.pinned]).items():
        first, *others = sorted(group[0].pinned, key=lambda reason: reason.kind != "unknown")
        further = dict.fromkeys(REASONS[reason.kind] for reason in others if reason.kind != first.kind)
        times = ""
        if len(group) > 1:
            times = f" in each of {len(group)}"
        pinned.add_row(pattern, f"{group[0].units}{times}", "; ".join([str(first), *further]))
    shown += [pinned] if pinned.row_count else []
    units = sum(each.units * each.copies for each in prunable)
    taken = sum(verdict.verdict in ("takes", "shapes") for verdict in verdicts.values())
    own = ""
    if prunable:
        own = f"; the function itself takes fewer units of {taken} of them"
    kinds = "structure" if len(prunable) == 1 else "structures"
    return [*shown, f"{name}: {len(prunable)} prunable {kinds} of {len(traced.structures)}, {units:,} units{own}"]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column.startswith(("units", "param")) else "left")
    return table


def _range(values: tuple[int, ...]) -> str:
    low = min(values)
    high = max(values)
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,}"
