"""Sizes of axes as expressions over shared atoms, with union-find: which axes have to keep the same size.

The size of an axis is an atom, a product (`heads · head_dim`, major factor first) or a sum (the parts of a fused
projection, side by side). Uniting two axes unites their atoms; where one expression is coarser than the other, its atom
is replaced, everywhere at once, by the finer expression. What cannot be united is pinned instead: a pinned atom never
changes its size, so every equation between pinned atoms stays true.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

REASONS: dict[str, str] = {
    "output": "reaches an output",
    "input": "reaches an input",
    "constant": "meets a constant of that size",
    "scan": "is what a loop runs over: a unit is an iteration",
    "unknown": "meets an operation without a rule",
    "order": "holds values whose order counts",
    "split": "is split and recombined",
    "lookup": "is looked up by position",
    "window": "is spanned by a window",
    "repeat": "has size 1 and is repeated",
    "reshape": "is reshaped across its blocks",
    "random": "is drawn at random",
    "unused": "has no effect on an output",
}
"""Why an atom keeps its size, by kind."""


class Place(NamedTuple):
    """Where the units of an atom lie in an axis: unit i has indices offset + i · block + [0, block) + Σ r_j stride_j.

    `repeats` are pairs (count_j, stride_j), 0 <= r_j < count_j.
    """

    offset: int
    block: int
    repeats: tuple[tuple[int, int], ...] = ()

    def indices(self, unit: int) -> list[int]:
        """List the positions, in the axis, of one unit."""
        starts = [self.offset + unit * self.block]
        for count, stride in self.repeats:
            starts = [start + each * stride for start in starts for each in range(count)]
        return [start + each for start in starts for each in range(self.block)]


class Pin(NamedTuple):
    """A node the atoms of which keep their size, why, and where in the program that was seen."""

    node: int
    kind: str
    detail: str
    site: Any


ONE = 0
"""The node of every axis of size 1 that a program puts in itself: it stretches to any size, so it couples nothing."""


class Axes:
    """A forest of size expressions. Nodes are integers; a node stays valid when its atom is replaced or united."""

    def __init__(self) -> None:
        self._size = [1]
        self._alias = [ONE]
        self._parts: list[tuple[bool, tuple[int, ...]] | None] = [None]  # (is a sum, parts); None: an atom
        self.site: Any = None
        """Where the program is that is being followed; kept with each pin."""
        self.pins: list[Pin] = []
        self._kept: set[int] = set()
        """Atoms that are known to be pinned by now."""

    def atom(self, size: int) -> int:
        """Make a node of its own."""
        return self._new(size, None)

    def fresh(self, size: int) -> int:
        """Make the node of an axis that the program makes: `ONE`, or a new atom."""
        return ONE if size == 1 else self.atom(size)

    def pinned(self, size: int, kind: str, detail: str) -> int:
        """Make the node of an axis that keeps its size for the reason given."""
        node = self.fresh(size)
        self.pin(node, kind, detail)
        return node

    def pin(self, node: int, kind: str, detail: str) -> None:
        """Say that no atom of a node may change its size."""
        if node != ONE:
            self.pins.append(Pin(node, kind, detail, self.site))
            self._kept.update(self.atoms(node))

    def size(self, node: int) -> int:
        """Count the indices of an axis."""
        return self._size[node]

    def find(self, node: int) -> int:
        """Find the node that stands for all that were united with this one."""
        while self._alias[node] != node:
            self._alias[node] = self._alias[self._alias[node]]
            node = self._alias[node]
        return node

    def product(self, nodes: Sequence[int]) -> int:
        """Merge axes into one, the major one first; axes of size 1 vanish."""
        flat = [factor for node in nodes for factor in self.factors(node) if factor != ONE]
        if len(flat) < 2:
            return flat[0] if flat else ONE
        return self._new(math.prod(map(self.size, flat)), (False, tuple(flat)))

    def total(self, nodes: Sequence[int]) -> int:
        """Join axes end to end."""
        flat = [part for node in nodes if self.size(node) for part in self.segments(node)]
        for place in [place for place, part in enumerate(flat) if part == ONE]:
            flat[place] = self.atom(1)
            self.pin(flat[place], "split", "is stacked with others")
        if len(flat) < 2:
            return flat[0] if flat else self.atom(0)
        return self._new(sum(map(self.size, flat)), (True, tuple(flat)))

    def factors(self, node: int) -> list[int]:
        """List the factors of a product, major first; of anything else itself."""
        return self._flat(node, is_sum=False)

    def segments(self, node: int) -> list[int]:
        """List the terms of a sum in their order; of anything else itself."""
        return self._flat(node, is_sum=True)

    def _flat(self, node: int, is_sum: bool) -> list[int]:
        node = self.find(node)
        parts = self._parts[node]
        if parts is None or parts[0] != is_sum:
            return [node]
        return [each for part in parts[1] for each in self._flat(part, is_sum)]

    def equate(self, first: int, second: int, detail: str) -> None:
        """Say that two axes have the same size; pin both if their blocks do not fit together."""
        if not self._unite(first, second):
            self.pin(first, "reshape", detail)
            self.pin(second, "reshape", detail)

    def split_at(self, node: int, at: int) -> tuple[int, int] | None:
        """Cut an axis at an index inside it into two sides; None if that cuts a block."""
        node = self.find(node)
        parts = self._parts[node]
        if parts is None:
            sides = self.atom(at), self.atom(self.size(node) - at)
            self._alias[node] = self._new(self.size(node), (True, sides))
            self._kept.update(sides if node in self._kept else ())
            return sides
        if not parts[0]:
            major, *minor = self.factors(node)
            inner = self.size(node) // self.size(major)
            sides = None
            if not at % inner:
                sides = self.split_at(major, at // inner)
            return sides and (self._times(sides[0], minor), self._times(sides[1], minor))
        left = []
        right = []
        start = 0
        for segment in self.segments(node):
            end = start + self.size(segment)
            if start < at < end:
                sides = self.split_at(segment, at - start)
                if sides is None:
                    return None
                left.append(sides[0])
                right.append(sides[1])
            else:
                (left if end <= at else right).append(segment)
            start = end
        return self.total(left), self.total(right)

    def factor_at(self, node: int, major: int) -> tuple[int, int] | None:
        """Factor an atom (or a sum of equal terms), the major factor having a given size; None if that cannot be."""
        node = self.find(node)
        size = self.size(node)
        parts = self._parts[node]
        if major == 0 or size % major:
            return None
        if parts is None:
            factors = self.atom(major), self.atom(size // major)
        else:
            segments = self.segments(node)
            if not parts[0] or len(segments) != major or len({self.size(segment) for segment in segments}) > 1:
                return None
            if not all(self._unite(segments[0], segment) for segment in segments[1:]):
                return None
            factors = self.atom(major), segments[0]
            self.pin(factors[0], "split", "numbers the parts of a fused axis")
        self._alias[node] = self._new(size, (False, factors))
        self._kept.update(factors if node in self._kept else ())
        return factors

    def atoms(self, node: int) -> tuple[int, ...]:
        """List the atoms of an expression, in order, each as often as it occurs."""
        node = self.find(node)
        parts = self._parts[node]
        if parts is None:
            return (node,)
        return tuple(atom for part in parts[1] for atom in self.atoms(part))

    def drop(self, node: int, atom: int) -> int:
        """Count the indices that an axis loses when `atom` loses one unit."""
        return self.size(node) - self.resized(node, {atom: 1})

    def resized(self, node: int, removed: dict[int, int]) -> int:
        """Size an axis anew when atoms lose units: how many each loses."""
        node = self.find(node)
        parts = self._parts[node]
        if parts is None:
            return self.size(node) - removed.get(node, 0)
        sizes = [self.resized(part, removed) for part in parts[1]]
        if parts[0]:
            return sum(sizes)
        return math.prod(sizes)

    def places(self, node: int, atom: int) -> tuple[Place, ...]:
        """Find the units of an atom in an axis, once for each of its occurrences."""
        return tuple(self._places(node, atom, Place(0, 1)))

    def _places(self, node: int, atom: int, within: Place) -> list[Place]:
        node = self.find(node)
        parts = self._parts[node]
        if parts is None:
            return [within] if node == atom else []
        found = []
        (is_sum, children) = parts
        if is_sum:
            offset = within.offset
            for child in children:
                found += self._places(child, atom, within._replace(offset=offset))
                offset += self.size(child) * within.block
            return found
        inner = self.size(node) * within.block
        repeats = within.repeats
        for child in children:
            outer = inner
            inner = inner // self.size(child)
            found += self._places(child, atom, Place(within.offset, inner, repeats))
            merges = repeats and len(repeats) > len(within.repeats) and repeats[-1][1] == outer
            count = self.size(child) * (repeats[-1][0] if merges else 1)
            repeats = (*(repeats[:-1] if merges else repeats), (count, inner))
        return found

    def _unite(self, first: int, second: int) -> bool:
        first = self.find(first)
        second = self.find(second)
        if first == second or self.size(first) == 0:
            return True
        if ONE in (first, second):
            self.pin(first or second, "repeat", "meets an axis of size 1")
            return True
        one = self._parts[first]
        other = self._parts[second]
        if one is None or other is None:
            atom, kept = (first, second) if one is None else (second, first)
            self._alias[atom] = kept
            self._kept.update(self.atoms(kept) if atom in self._kept else ())
            return True
        if self._kept.issuperset(self.atoms(first)) and self._kept.issuperset(self.atoms(second)):
            return True  # no part changes its size; a shifted time axis would have as many parts as it is long
        if one[0] or other[0]:
            if one[0]:
                united = self._unite_sum(first, second)
            else:
                united = self._unite_sum(second, first)
        else:
            united = self._unite_products(self.factors(first)[::-1], self.factors(second)[::-1])
        if united and self.find(first) != self.find(second):
            self._alias[self.find(first)] = self.find(second)
        return united

    def _unite_sum(self, first: int, rest: int) -> bool:
        *segments, last = self.segments(first)
        for segment in segments:
            sides = self.split_at(rest, self.size(segment))
            if sides is None or not self._unite(segment, sides[0]):
                return False
            rest = sides[1]
        return self._unite(last, rest)

    def _unite_products(self, first: list[int], second: list[int]) -> bool:
        """Unite two lists of factors, the major one last."""
        while first and second:
            one = first.pop()
            other = second.pop()
            if self.size(one) == self.size(other):
                if not self._unite(one, other):
                    return False
                continue
            small, large, rest = (one, other, second) if self.size(one) < self.size(other) else (other, one, first)
            *more, large = self.factors(large)[::-1]  # an atom may have become a product in the meantime
            if more:
                rest += [*more, large]
                (first if rest is second else second).append(small)
                continue
            factors = self.factor_at(large, self.size(small))
            if factors is None or not self._unite(small, factors[0]):
                return False
            rest.append(factors[1])
        return not first and not second

    def _times(self, major: int, minor: list[int]) -> int:
        if self.size(major) == 1:
            self.pin(major, "split", "numbers the parts of a fused axis")
            return self.product(minor)
        return self.product([major, *minor])

    def _new(self, size: int, parts: tuple[bool, tuple[int, ...]] | None) -> int:
        self._size.append(size)
        self._alias.append(len(self._alias))
        self._parts.append(parts)
        return len(self._size) - 1
