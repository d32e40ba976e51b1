"""Chips: their memory and what bounds their speed, by data sheet; and how a target such as `v5e-16` is spelled.

Sources: the vendors' public specifications and, for the links of a TPU, "How to Scale Your Model" (Google DeepMind,
2025), chapter 2, which has nine tenths of the data sheet's rate; those of tpu7x, 8t and 8i are taken in proportion.
Peak rates are those of dense bfloat16 products.
"""

import math
import re
from typing import Literal, NamedTuple

GIB = 2.0**30


class Chip(NamedTuple):
    """One chip, or one GPU."""

    kind: str
    memory: float
    """Bytes that a program may use."""
    flops: float
    """Operations a second, bfloat16."""
    bandwidth: float
    """Bytes a second between memory and cores."""
    link: float
    """Bytes a second that a chip sends along one axis of the mesh, both directions of a ring."""
    dimensions: int
    """Of the torus that the chips form; 0 where any of them reaches any other."""
    most: int
    """Chips of the largest machine."""
    devices: int = 1
    """Devices a chip, as the compiler sees it."""
    maker: Literal["tpu", "gpu"] = "tpu"
    assumed: str = ""
    """What of this no data sheet says."""

    @property
    def compiled(self) -> bool:
        """True where there is a compiler for it here; for others everything is arithmetic."""
        return self.dimensions > 0

    @property
    def word(self) -> str:
        """What a target of some of them begins with, where nothing compiles for them: `gpu:h100`."""
        if self.compiled:
            return self.kind
        return f"{self.maker}:{self.kind}"


QUARTER = "bfloat16 at a quarter of its FP4 peak, links as those of its peers"

CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("v4", 31.75 * GIB, 2.75e14, 1.2e12, 9e10, 3, 4096, 2),
        Chip("v5e", 15.75 * GIB, 1.97e14, 8.1e11, 9e10, 2, 256),
        Chip("v5p", 95.74 * GIB, 4.59e14, 2.8e12, 1.8e11, 3, 8960),
        Chip("v6e", 31.25 * GIB, 9.2e14, 1.6e12, 1.8e11, 2, 256),
        Chip("tpu7x", 189.4 * GIB, 2.307e15, 7.38e12, 3.6e11, 3, 9216, 2),
        Chip("8t", 201.0 * GIB, 3.15e15, 6.5e12, 7.2e11, 0, 9600, assumed=QUARTER),
        Chip("8i", 268.0 * GIB, 2.525e15, 8.6e12, 1.08e12, 0, 1152, assumed=QUARTER),
        Chip("a100", 79.0 * GIB, 3.12e14, 2.0e12, 3e11, 0, 8, maker="gpu"),
        Chip("h100", 79.0 * GIB, 9.9e14, 3.35e12, 4.5e11, 0, 8, maker="gpu"),
        Chip("h200", 139.0 * GIB, 9.9e14, 4.8e12, 4.5e11, 0, 8, maker="gpu"),
        Chip("b200", 178.0 * GIB, 2.25e15, 8.0e12, 9e11, 0, 8, maker="gpu"),
    )
}
"""By kind; the GPUs are the SXM modules."""


class Machine(NamedTuple):
    """Chips of one kind, joined in one machine."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis of the torus; of those without a compiler, their number."""

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of devices, as a program sees them."""
        return self.chips * self.chip.devices

    @property
    def topology(self) -> str:
        """Name of the topology, as the compiler wants it: `v5e:4x4`; where there is none, as it was given."""
        return f"{self.chip.word}:{'x'.join(map(str, self.shape))}"

    @property
    def memory(self) -> float:
        """Bytes a device."""
        return self.chip.memory / self.chip.devices


def target_of(name: str) -> Machine:
    """Read a target: `v5e:4x4`, `v5e-16`, `v5p:2x2x2`, `v5p-64` (64 cores, 32 chips), `gpu:h100:8`.

    Raises:
        ValueError: an unknown kind of chip, or a shape that no machine of that kind has.

    >>> target_of("v5e-16").shape, target_of("v5p-64").shape, target_of("gpu:h100:8").chips
    ((4, 4), (2, 4, 4), 8)
    """
    by_word = {chip.word: chip for chip in CHIPS.values()}
    found = re.fullmatch(r"((?:(?:gpu|tpu):)?\w+)(?::(\d+)|:(\d+(?:x\d+)+)|-(\d+))", name)
    word, number, shape, count = found.groups() if found else ("", "", "", "")
    chip = by_word.get(word)
    if chip is None or chip.compiled == bool(number):
        compiled, others = ([w for w, chip in by_word.items() if chip.compiled == which] for which in (True, False))
        raise ValueError(
            f"target: expected KIND:SHAPE or KIND-N with a kind of {', '.join(compiled)}, such as v5e:4x4 or v5e-16, "
            f"or, by arithmetic, WORD:N with a word of {', '.join(others)}, such as gpu:h100:8, got {name!r}"
        )
    if number:
        target = Machine(chip, (int(number),))
        if not 1 <= target.chips <= chip.most:
            raise ValueError(f"target: expected 1 to {chip.most} that reach each other, got {name!r}")
        return target
    if shape:
        target = Machine(chip, tuple(map(int, shape.split("x"))))
        if len(target.shape) != chip.dimensions or min(target.shape) < 1 or target.chips > chip.most:
            raise ValueError(
                f"target: expected {chip.dimensions} sizes that multiply to at most {chip.most} chips for {word}, such "
                f"as {targets(chip)[3].topology}, got {name!r}"
            )
        return target
    each = 2 if chip.dimensions == 3 else 1  # of the chips with a 3D torus the name counts cores, two a chip
    by_count = {each * target.chips: target for target in targets(chip)}
    if int(count) not in by_count:
        names = ", ".join(f"{word}-{known}" for known in list(by_count)[:8])
        raise ValueError(f"target: expected one of {names}, …, got {name!r}; or give its shape, such as {word}:4x4")
    return by_count[int(count)]


def targets(chip: Chip) -> list[Machine]:
    """List the machines that can be asked for, from the smallest: each axis doubled in turn.

    >>> [target.topology for target in targets(CHIPS["v5e"])][:4]
    ['v5e:1x1', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4']
    """
    if not chip.compiled:
        return [Machine(chip, (1 << power,)) for power in range(chip.most.bit_length())]
    shapes: list[tuple[int, ...]] = [(1, 1), (2, 2)] if chip.dimensions == 2 else [(2, 2, 1), (2, 2, 2)]
    while math.prod(shapes[-1]) * 2 <= chip.most:
        last = list(shapes[-1])
        last[0 if len(set(last)) > 1 else -1] *= 2  # they are sorted
        shapes.append(tuple(sorted(last)))
    return [Machine(chip, shape) for shape in shapes]
