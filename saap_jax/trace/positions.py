"""Values that are positions along an axis: what `top_k`, `argmax` and `iota` return, and what may be done with them.

A unit that goes renumbers the others. Positions stay true if they are only compared with positions along the same axis,
used to look up along it, or sorted: then fewer units are the same program (the experts that a router chooses from). Any
other use of them as numbers pins the axis.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jax.extend.core import JaxprEqn
from jax.extend.core import Literal as Constant

from saap_jax.trace.axes import ONE, Axes, Pin


class Positions(NamedTuple):
    """What is known of the numbers in an array."""

    role: Literal["positions", "wrapped", "negative", "zero", "counts", "vector"]
    """`positions` along an axis; `wrapped`: those plus a constant, for negative ones; `negative`: which of them are
    negative, none; `zero`: the number; `counts`: how often each position occurs; `vector`: several, side by side."""
    node: int = ONE
    kind: str = "order"
    detail: str = ""
    site: Any = None
    parts: "tuple[Positions | None, ...]" = ()


_PASSES = """broadcast_in_dim reshape squeeze transpose convert_element_type copy copy_p stop_gradient slice rev tile
reduce_precision sharding_constraint layout_constraint gather dynamic_slice"""
PASSES = frozenset(_PASSES.split())
"""Operations whose results are values of their first operand, elsewhere."""


def along(axes: Axes, node: int, kind: str, detail: str) -> Positions | None:
    """Tell what is known of positions along an axis, which are made here."""
    return None if node == ONE else Positions("positions", node, kind, detail, axes.site)


def used(axes: Axes, known: Positions | None) -> None:
    """Pin the axis of positions that are used as numbers."""
    if known is None:
        return
    for part in known.parts:
        used(axes, part)
    if known.role in ("positions", "wrapped"):
        axes.pins.append(Pin(known.node, known.kind, known.detail, known.site))


def index_of(axes: Axes, known: Positions | None, component: int, count: int) -> Positions | None:
    """Tell what is known of one component of the indices of a lookup."""
    if known is not None and known.role == "vector":
        return known.parts[component]
    if count > 1:
        used(axes, known)
        return None
    return known


def looks_up(axes: Axes, known: Positions | None, node: int) -> bool:
    """Say whether indices are positions along the very axis that is looked up along; equate both axes if so."""
    if known is None or known.role != "positions" or axes.size(known.node) != axes.size(node):
        used(axes, known)
        return False
    axes.equate(known.node, node, "is looked up along another")
    return True


def follow(axes: Axes, known: tuple[Positions | None, ...], eqn: JaxprEqn) -> list[Positions | None]:
    """Tell what is known of the results of an equation, and pin axes whose positions it uses as numbers.

    The rules of `top_k`, `argmax` and `iota`, and of lookups, see to theirs.
    """
    name = eqn.primitive.name
    nothing: list[Positions | None] = [None] * len(eqn.outvars)
    if not any(known) or name in ("scatter", "scatter-add", "ragged_dot_general"):
        return nothing
    if name in PASSES:
        for each in known[1:] if name != "gather" else ():
            used(axes, each)
        return [known[0]]
    if name == "sort":  # fewer units leave the order of the others
        return list(known)
    roles = [each.role if each else None for each in known]
    if name in ("eq", "ne") and roles == ["positions", "positions"]:
        one, other = known
        if one and other and axes.size(one.node) == axes.size(other.node):
            axes.equate(one.node, other.node, "is numbered as another")
            return nothing
    if name == "lt" and roles == ["positions", "zero"]:
        return [Positions("negative", known[0].node)] if known[0] else nothing
    if name == "max" and sorted(map(str, roles)) == ["positions", "zero"]:
        return [known[roles.index("positions")]]
    if name == "add" and "positions" in roles and any(isinstance(variable, Constant) for variable in eqn.invars):
        position = known[roles.index("positions")]
        return [position._replace(role="wrapped")] if position else nothing
    if name == "select_n" and (chosen := _chosen(axes, known)):
        return [chosen]
    if name == "concatenate" and _side_by_side(eqn):
        return [Positions("vector", parts=known)]
    for each in known:
        used(axes, each)
    return nothing


def _side_by_side(eqn: JaxprEqn) -> bool:
    """Say whether arrays are joined along their last axis, of size 1 in each."""
    shapes = [getattr(variable.aval, "shape", ()) for variable in eqn.invars]
    return all(len(shape) == eqn.params["dimension"] + 1 and shape[len(shape) - 1] == 1 for shape in shapes)


def _chosen(axes: Axes, known: Sequence[Positions | None]) -> Positions | None:
    """Tell the positions that a selection leaves: none is negative, so those that were wrapped are not chosen."""
    which, *cases = known
    if not all(cases) or any(each.role not in ("positions", "wrapped") for each in cases if each):
        return None
    nodes = {axes.find(each.node) for each in cases if each}
    if which is not None and which.role == "negative" and len(cases) == 2 and cases[0]:
        return cases[0] if nodes == {axes.find(which.node)} and cases[0].role == "positions" else None
    return cases[0] if len(nodes) == 1 and all(each.role == "positions" for each in cases if each) else None
