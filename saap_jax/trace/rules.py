"""What each operation of JAX does to the axes of its operands: one rule a primitive.

A rule gets the layouts of the operands (a node of `Axes` for each axis) and returns those of the results. It equates
axes that keep the same size, pins those that cannot change, and notes contractions, reductions and splits. Operations
without a rule go to `unknown`, which pins all that they touch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from saap_jax.trace.axes import ONE, Axes, Pin
from saap_jax.trace.jaxpr import draws_apart, dtype_of, shape_of

Layout = tuple[int, ...]
"""The node of each axis of an array."""


class Acting(NamedTuple):
    """A place where the units of an axis act on the rest of the program: a sum over it, or a statistic."""

    node: int
    operand: int
    """The operand that a gate would multiply: of a sum the first that depends on the inputs."""
    axis: int
    layout: Layout
    """That operand's."""
    site: Any
    operation: str = ""
    """The statistic (a mean, a maximum), which changes when a unit goes; "": a sum."""
    least: int = 0
    """Of a choice among units: how many have to remain."""


@dataclasses.dataclass
class Notes:
    """What is learned on the way through a program."""

    axes: Axes = dataclasses.field(default_factory=Axes)
    contractions: list[Acting] = dataclasses.field(default_factory=list)
    reductions: list[Acting] = dataclasses.field(default_factory=list)
    splits: list[tuple[Layout, Any]] = dataclasses.field(default_factory=list)
    """The parts of each axis that was cut into parts, and where."""
    slices: dict[tuple[int, ...], list[tuple[int, int, int]]] = dataclasses.field(default_factory=dict)
    """Of each axis of each slice: what it leaves out before, what it takes, and the axis; by the equation's path."""
    paired: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """Axes on which two operands of a product stand beside each other, and what that tells: both depend on the inputs
    (`heads`, where something is contracted; contracted: `head width`), or one is a parameter (`experts`)."""
    scores: list[tuple[Layout, Layout]] = dataclasses.field(default_factory=list)
    """What products of two arrays that depend on the inputs contract, and what they leave over."""
    added: list[int] = dataclasses.field(default_factory=list)
    """Axes of sums of two arrays that depend on the inputs, as residual connections are."""
    moved: list[int] = dataclasses.field(default_factory=list)
    """Axes along which values change their position."""
    shifts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """An axis and the one that took its place: values change their position where these two are united later."""
    unknown: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    """Operations without a rule, and where."""
    active: tuple[bool, ...] = ()
    """Which operands of the present equation depend on the inputs."""
    numbering: dict[int, Pin] = dataclasses.field(default_factory=dict)
    """Of results of the present equation that are positions along an axis, why that is pinned where they are used as
    numbers; see `Follower.positions`."""

    def numbers(self, result: int, node: int, kind: str, detail: str) -> None:
        """Note that a result of the present equation holds positions along an axis."""
        if node != ONE:
            self.numbering[result] = Pin(node, kind, detail, self.axes.site)

    def chooses(self, result: int, node: int, eqn: JaxprEqn) -> None:
        """Note that a result of an equation, the present one, holds positions of what it chooses along an axis."""
        self.numbers(result, node, "order", eqn.primitive.name)
        if dtype_of(eqn.invars[0]).kind in "bu":
            self.axes.pin(node, "order", f"{eqn.primitive.name} of a type in which none is below all")

    def lost(self, node: int, size: int, kind: str, detail: str) -> int:
        """Say that an axis keeps its size, and make another one of what is left of it, which keeps its own."""
        self.axes.pin(node, kind, detail)
        self.shifts.append((node, self.axes.pinned(size, kind, detail)))
        return self.shifts[-1][1]

    def equate(self, first: int, second: int) -> int:
        """Say that two axes have the same size; return the more telling node."""
        self.axes.equate(first, second, "its blocks do not fit those of another axis")
        return first if first != ONE else second

    def contract(self, node: int, axes: Sequence[int], ins: Sequence[Layout]) -> None:
        """Note a contraction over axis `axes[i]` of operand i."""
        operand = next((i for i, active in enumerate(self.active[: len(axes)]) if active), 0)
        self.contractions.append(Acting(node, operand, axes[operand], ins[operand], self.axes.site))


Rule = Callable[[Notes, JaxprEqn, Sequence[Layout]], Sequence[Layout]]

_ELEMENTWISE = """layout_constraint reshard mulhi zeros_like abs acos acosh add add_any and asin asinh atan
atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy
copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg nextafter not or
polygamma population_count pow pvary real reduce_precision regularized_incomplete_beta rem round rsqrt
select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
threefry2x32 xor zeta sharding_constraint"""
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin"
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
REDUCTIONS = frozenset(_REDUCTIONS.split())


def unknown(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """Pin every axis that an operation touches, and say so."""
    name = " ".join([eqn.primitive.name, str(eqn.params.get("name") or "")]).strip()  # of a kernel, its own
    if any(ins) or any(shape_of(out) for out in eqn.outvars):
        notes.unknown.append((name, notes.axes.site))
    for layout in ins:
        for node in layout:
            notes.axes.pin(node, "unknown", name)
    return [tuple(notes.axes.pinned(size, "unknown", name) for size in shape_of(out)) for out in eqn.outvars]


def elementwise(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> Sequence[Layout]:
    """Equate the axes of all operands; scalars take part in nothing, axes of size 1 stretch."""
    shape = shape_of(eqn.outvars[0])
    operands = [layout for layout in ins if layout]
    if eqn.primitive.name in ("add", "add_any") and all(notes.active):
        notes.added += [node for layout in operands for node in layout]
    if any(len(layout) != len(shape) for layout in operands) or any(shape_of(out) != shape for out in eqn.outvars):
        return unknown(notes, eqn, ins)
    out = []
    for axis, size in enumerate(shape):
        result = ONE
        for layout in operands:
            node = layout[axis]
            if notes.axes.size(node) != size:
                notes.axes.pin(node, "repeat", eqn.primitive.name)
            elif node != ONE:
                if result == ONE:
                    result = node
                else:
                    result = notes.equate(result, node)
        out.append(result if result != ONE else notes.axes.fresh(size))
    return [tuple(out)] * len(eqn.outvars)


def broadcast(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`broadcast_in_dim`: new axes couple nothing."""
    shape = shape_of(eqn.outvars[0])
    out: list[int | None] = [None] * len(shape)
    for node, axis in zip(ins[0], eqn.params["broadcast_dimensions"], strict=True):
        if notes.axes.size(node) == shape[axis]:
            out[axis] = node
        else:
            notes.axes.pin(node, "repeat", "broadcast_in_dim")
    return [tuple(notes.axes.fresh(n) if node is None else node for node, n in zip(out, shape, strict=True))]


def squeeze(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`squeeze`: an axis of size 1 that is dropped has to stay one."""
    dropped = {axis % len(ins[0]) for axis in eqn.params["dimensions"]}
    for axis in dropped:
        notes.axes.pin(ins[0][axis], "reshape", "squeezed away")
    return [tuple(node for axis, node in enumerate(ins[0]) if axis not in dropped)]


def dot(notes: Notes, ins: Sequence[Layout], numbers: Any, groups: tuple[int, ...] = ()) -> list[Layout]:
    """Equate batch axes and contracted axes of a product; axes of the second operand that number groups are gone."""
    left, right = ins[:2]
    (left_sum, right_sum), (left_batch, right_batch) = numbers
    batch = [notes.equate(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    mutual = all(notes.active[:2])
    if left_sum or not mutual:
        notes.paired += [(node, "heads" if mutual else "experts") for node in batch]
    for i, j in zip(left_sum, right_sum, strict=True):
        node = notes.equate(left[i], right[j])
        notes.contract(node, (int(i), int(j)), ins)
        if mutual:
            notes.paired.append((node, "head width"))
    free = [node for axis, node in enumerate(left) if axis not in {*left_sum, *left_batch}]
    free += [node for axis, node in enumerate(right) if axis not in {*right_sum, *right_batch, *groups}]
    if mutual:
        notes.scores.append((tuple(left[axis] for axis in left_sum), tuple(free)))
    return [(*batch, *free)]


def ragged_dot(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> Sequence[Layout]:
    """`ragged_dot`: rows are dealt out to groups in their order; the contracted axes are equated."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left_sum, _), (left_batch, _) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    ragged = set(numbers.lhs_ragged_dimensions)
    if len(groups) != 1 or ragged & {*left_sum, *left_batch}:  # a product of gradients: groups are in the result
        return unknown(notes, eqn, ins)
    left, right, sizes = ins[:3]
    group = notes.equate(right[groups[0]], sizes[-1])
    for node in (group, *(left[axis] for axis in ragged)):
        notes.axes.pin(node, "order", "rows are dealt out by ragged_dot")
    return dot(notes, ins, numbers.dot_dimension_numbers, groups)


def reduce(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """Reductions over axes: a statistic of the units, or the position of an extremum among them."""
    name = eqn.primitive.name
    axes = [int(axis) for axis in eqn.params["axes"]]
    chosen = int(name.startswith("arg"))
    for axis in axes:
        notes.reductions.append(Acting(ins[0][axis], 0, axis, ins[0], notes.axes.site, name, chosen))
        if name == "reduce_sum":
            notes.contract(ins[0][axis], (axis,), ins)
        if chosen:
            notes.chooses(0, ins[0][axis], eqn)
    return [tuple(node for axis, node in enumerate(ins[0]) if axis not in axes)]


def ordered(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`cumsum` and its kin, `rev`, `sort`: what stands at a place depends on those at others."""
    first = ins[0]
    name = eqn.primitive.name
    for layout in ins[1:]:
        first = tuple(map(notes.equate, first, layout))
    along = {"rev": "dimensions", "sort": "dimension"}.get(name, "axis")
    for axis in eqn.params[along] if name == "rev" else (eqn.params[along],):
        notes.axes.pin(first[axis], "order", name)
        notes.moved.append(first[axis])
    return [first] * len(ins)


def top_k(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`top_k`: a statistic of the units of which as many have to remain, and positions among them."""
    axis = eqn.params.get("axis", -1) % len(ins[0])
    node = ins[0][axis]
    least = shape_of(eqn.outvars[0])[axis]
    notes.reductions.append(Acting(node, 0, axis, ins[0], notes.axes.site, "top_k", least))
    notes.chooses(1, node, eqn)
    chosen = notes.axes.pinned(least, "order", "top_k")
    notes.shifts.append((node, chosen))
    return [tuple(chosen if i == axis else node for i, node in enumerate(ins[0]))] * 2


def iota(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`iota`: positions along its numbered axis, which is a constant of its size where they are used as numbers."""
    layout = tuple(map(notes.axes.fresh, shape_of(eqn.outvars[0])))
    notes.numbers(0, layout[eqn.params["dimension"]], "constant", "iota")
    return [layout]


def drawn(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """Pin every axis of a draw: fewer numbers from the same key are other numbers, at all places."""
    name = eqn.primitive.name
    for node in (node for layout in ins for node in layout):
        notes.axes.pin(node, "random", name)
    return [tuple(notes.axes.pinned(size, "random", name) for size in shape_of(out)) for out in eqn.outvars]


def keys(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """Random keys, and bits from them: the axes of the keys come first, and pass; those of the draw are pinned."""
    if not draws_apart(eqn):
        return drawn(notes, eqn, ins)
    shape = shape_of(eqn.outvars[0])
    first = ins[0]
    own = (notes.axes.pinned(size, "random", eqn.primitive.name) for size in shape[len(first) :])
    return [(*first[: len(shape)], *own)]


def fold_in(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> Sequence[Layout]:
    """`random_fold_in`: a key of each number."""
    if draws_apart(eqn):
        return elementwise(notes, eqn, ins)
    return drawn(notes, eqn, ins)


def reshape(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`reshape`: merge and split axes; an axis of size 1 passes if as many stand at its place afterwards."""
    sizes = shape_of(eqn.outvars[0])
    if eqn.params.get("dimensions") is not None:
        return unknown(notes, eqn, ins)
    if 0 in sizes:
        # which of the axes that change became which cannot be told from their sizes: the product is 0 in any case
        pairs = zip(ins[0], sizes, strict=False)
        same = [*(notes.axes.size(node) == size for node, size in pairs), False].index(False)
        for node in ins[0][same:]:
            notes.axes.pin(node, "reshape", "of an empty array")
        others = (notes.axes.pinned(size, "reshape", "of an empty array") for size in sizes[same:])
        return [(*ins[0][:same], *others)]
    ones = _ones(notes, ins[0], sizes)
    nodes = [node for node in ins[0] if notes.axes.size(node) > 1]
    larger = iter(regroup(notes, nodes, [size for size in sizes if size > 1]))
    return [tuple(ones.get(axis, ONE) if size == 1 else next(larger) for axis, size in enumerate(sizes))]


def _ones(notes: Notes, layout: Layout, sizes: tuple[int, ...]) -> dict[int, int]:
    """Match each new axis of size 1 with an old one: as many of them before the same elements."""
    old = [notes.axes.size(node) for node in layout]
    new = list(sizes)
    passed: dict[int, int] = {}
    places = [[math.prod(shape[:axis]) for axis in range(len(shape))] for shape in (old, new)]
    for place in {place for place, size in zip(places[0], old, strict=True) if size == 1}:
        left = [layout[axis] for axis, size in enumerate(old) if size == 1 and places[0][axis] == place]
        right = [axis for axis, size in enumerate(new) if size == 1 and places[1][axis] == place]
        if len(left) == len(right):
            passed.update(zip(right, left, strict=True))
        else:
            for node in left:
                notes.axes.pin(node, "reshape", "merged with other axes")
    return passed


def regroup(notes: Notes, nodes: list[int], targets: list[int]) -> list[int]:
    """Cut axes of the sizes `targets`, major first, out of the factors of `nodes`."""
    axes = notes.axes
    factors = [factor for node in nodes for factor in axes.factors(node)][::-1]
    out = []
    for target in targets:
        taken = []
        left = target
        while left > 1:
            *minor, factor = axes.factors(factors.pop())[::-1]  # an atom may have become a product in the meantime
            factors += minor
            if axes.size(factor) > left and (pair := axes.factor_at(factor, left)):
                factor, rest = pair
                factors.append(rest)
            if left % axes.size(factor):
                detail = f"{[axes.size(node) for node in nodes]} to {targets}"
                for node in nodes:
                    notes.axes.pin(node, "reshape", detail)
                return [axes.pinned(size, "reshape", detail) for size in targets]
            taken.append(factor)
            left //= axes.size(factor)
        out.append(axes.product(taken))
    return out


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(("optimization_barrier", "device_put"), lambda notes, eqn, ins: ins),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort"), ordered),
    **dict.fromkeys((f"random_{what}" for what in ("bits", "seed", "split", "wrap", "unwrap", "clone")), keys),
    **dict.fromkeys(("random_gamma", "rng_bit_generator", "rng_uniform"), drawn),
    "random_fold_in": fold_in,
    "broadcast_in_dim": broadcast,
    "transpose": lambda notes, eqn, ins: [tuple(ins[0][axis] for axis in eqn.params["permutation"])],
    "squeeze": squeeze,
    "dot_general": lambda notes, eqn, ins: dot(notes, ins, eqn.params["dimension_numbers"]),
    "ragged_dot_general": ragged_dot,
    "top_k": top_k,
    "iota": iota,
    "reshape": reshape,
}
