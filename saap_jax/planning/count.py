"""What a program does, counted: operations and bytes from its jaxpr, bytes between chips from the compiled text.

The compiler's own analysis counts the body of a loop once, however often it turns, so it is not used.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


class Work(NamedTuple):
    """Of a whole program, all devices together; loops counted as often as they turn."""

    flops: float
    """Two for each multiplication of a matrix product; the rest is small and left out."""
    weight_bytes: float
    """Of operands and results of matrix products that have as many elements as a weight: read or written whole."""
    other_bytes: float
    """Of their other operands and results, once each; elementwise work is taken to be fused with them."""


def work_of(jaxpr: Any, weights: frozenset[int], *, counted: Callable[[Any], bool] = lambda equation: True) -> Work:
    """Count a program, without what no result of it needs, which the compiler leaves out.

    Args:
        jaxpr: of the program, gradients included.
        weights: numbers of elements that a weight of one layer, or an embedding, has.
        counted: which of the products count.

    A `while` whose turns are not known counts once, a `cond` as its dearest branch.
    """
    flops = 0.0
    moved = {True: 0.0, False: 0.0}
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    for equation, times in equations(needed):
        if equation.primitive.name != "dot_general" or not counted(equation):
            continue
        flops += times * _flops_of(equation)
        for array in (var.aval for var in (*equation.invars, *equation.outvars)):
            moved[array.size in weights] += times * array.size * array.dtype.itemsize
    return Work(flops, moved[True], moved[False])


def _flops_of(product: Any) -> int:
    (contracted, _), _ = product.params["dimension_numbers"]
    return 2 * product.outvars[0].aval.size * math.prod(product.invars[0].aval.shape[axis] for axis in contracted)


def equations(jaxpr: Any) -> Iterator[tuple[Any, float]]:
    """Yield every equation of a program and of the programs in it, with the times that it runs on all devices."""
    if isinstance(jaxpr, ClosedJaxpr):
        inner = jaxpr.jaxpr
    else:
        inner = jaxpr
    for equation in inner.eqns:
        yield equation, 1.0
        name = equation.primitive.name
        params = equation.params
        if name == "cond":
            branches = [list(equations(branch)) for branch in params["branches"]]
            yield from max(branches, key=lambda each: sum(times for _, times in each))
        else:
            repeats = params["length"] if name == "scan" else 1
            if name == "shard_map":
                manual = params.get("newly_manual_axes", params.get("manual_axes"))  # by jax's version
                repeats = math.prod(size for axis, size in params["mesh"].shape.items() if axis in manual)
            if name == "linear_call":
                values = [params["callee"]]
            else:
                values = params.values()
            flat = (each for value in values for each in (value if isinstance(value, tuple | list) else [value]))
            for part in (each for each in flat if isinstance(each, ClosedJaxpr | Jaxpr)):
                for found, times in equations(part):
                    yield found, times * repeats


# --- between chips -------------------------------------------------------------------------------

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


class Collectives(NamedTuple):
    """What a compiled program sends from each device, by kind of operation."""

    bytes: dict[str, float]
    largest: dict[str, float]
    """The largest result of one operation."""


def collectives_of(text: str, devices: int) -> Collectives:
    """Read off the text of a compiled program how many bytes each device sends over its links in one run.

    On a ring of n devices, for a result of R bytes: all-gather and all-to-all (n-1)/n · R, all-reduce 2 (n-1)/n · R,
    reduce-scatter (n-1) · R, permutation R. An operation that is cut into steps has one channel and counts once. A loop
    turns as often as the constant in its condition says; one that has none, once.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start and line.rstrip().endswith("{"):
            lines = computations[start[1]] = []
            entry = start[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("program: expected the text of a compiled program with an ENTRY, found none")
    times: dict[str, float] = defaultdict(float)
    _walk(entry, 1.0, computations, times)
    total: dict[str, float] = defaultdict(float)
    largest: dict[str, float] = defaultdict(float)
    counted: set[str] = set()
    for name, line in ((name, line) for name, lines in computations.items() if times[name] for line in lines):
        found = _COLLECTIVE.match(line)
        channel = re.search(r"channel_id=(\d+)", line)
        if not found or (channel and channel[1] in counted):
            continue
        counted |= {channel[1]} if channel else set()
        kind = found[2]
        size = _size(found[1], halved=bool(found[3]))
        n = _group_size(line, devices)
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        total[kind] += times[name] * size * share.get(kind, (n - 1) / n)
        largest[kind] = max(largest[kind], size)
    return Collectives(dict(total), dict(largest))


def _walk(name: str, count: float, computations: dict[str, list[str]], times: dict[str, float]) -> None:
    """Count how often a computation runs, and each that it calls."""
    times[name] += count
    for line in computations[name]:
        loop = _WHILE.search(line)
        for one, several in _CALLED.findall(line):
            for inner in (each.strip() for each in (one or several).replace("%", "").split(",")):
                if inner in computations:
                    looped = loop and inner in loop.groups()
                    turns = 1
                    if loop and looped:
                        turns = _turns(*(computations[each] for each in loop.groups()))
                    _walk(inner, count * turns, computations, times)


def _turns(condition: list[str], body: list[str]) -> int:
    """Tell how often a loop turns: from the constant that its counter stays below, and what is added to it."""
    if not (constants := _constants(condition)):
        return 1
    compare = next((line for line in condition if " compare(" in line and "direction=LT" in line), "")
    operands = compare.partition(" compare(")[2].partition(")")[0].replace("%", "").replace(" ", "")
    left, _, right = operands.partition(",")
    limit = constants.get(right, max(constants.values()))
    element = re.compile(rf"^\s*%?{re.escape(left)} = .*get-tuple-element\(.*\), index=(\d+)")
    place = next((int(found[1]) for line in condition if left and (found := element.search(line))), None)
    if place is None:
        return limit
    return max(1, -(-limit // _step(body, place)))


def _constants(lines: list[str]) -> dict[str, int]:
    found = (re.match(r"\s*%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {each[1]: int(each[2]) for each in found if each}


def _step(body: list[str], place: int) -> int:
    """Tell what a turn adds to the counter at a place of the loop's tuple; 1 where that cannot be read."""
    root = next((line for line in body if line.lstrip().startswith("ROOT") and " tuple(" in line), "")
    names = re.sub(r"/\*.*?\*/", "", root.partition(" tuple(")[2]).split(",")
    constants = _constants(body)
    total = 0
    name = ""
    if place < len(names):
        name = names[place].strip().lstrip("%").rstrip(") ")
    while True:  # along the additions that make a scalar
        add = rf"^\s*(?:ROOT )?%?{re.escape(name)} = [su]32\[\]\S* add\(%?([\w.\-]+), %?([\w.\-]+)\)"
        operands = next((each.groups() for line in body if (each := re.match(add, line))), ())
        added = [operand for operand in operands if operand in constants]
        if not added:
            return total or 1
        total += constants[added[0]]
        name = next((operand for operand in operands if operand != added[0]), "")


def _size(shape: str, *, halved: bool) -> float:
    """Count the bytes of a result; that of a started operation holds the operand beside it."""
    sizes = []
    for kind, dimensions in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        bits = re.search(r"\d+$", kind)
        if kind == "pred":
            width = 1.0
        elif bits:
            width = int(bits[0]) / 8
        else:
            width = 0.0
        sizes.append(width * math.prod(int(each) for each in dimensions.split(",") if each))
    if halved and len(sizes) > 1:
        return max(sizes)
    return sum(sizes)


def _group_size(line: str, devices: int) -> int:
    """Count the devices that take part in one group of an operation."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", named[2]) if axis in sizes)
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return devices


def shard_bytes(tree: Any) -> int:
    """Count the bytes that each device holds of a tree of arrays, concrete or abstract, with their shardings."""

    def one(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        if place is None:
            shape = leaf.shape
        else:
            shape = place.shard_shape(tuple(leaf.shape))
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))
