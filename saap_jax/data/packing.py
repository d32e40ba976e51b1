"""Pieces packed into rows of equal length; batches of rows, shuffled anew each epoch, from a place that can be kept.

A row holds several pieces. `segments` tells them apart, so that none sees another, and `positions` start anew in each:

    tokens      The  cat  sat  |  Dogs  bark  |  -
    segments     1    1    1       2     2      -1
    positions    0    1    2       0     1       0
    targets      F    T    T       F     T       F
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int32

from saap_jax.data.pieces import Piece

OPEN = 128
"""Rows that are looked at for room, the newest ones."""

FIELDS = ("tokens", "segments", "positions", "targets")


class Rows(NamedTuple):
    """Packed rows in host memory; padding is on the right, has segment -1 and is never a target."""

    tokens: Int32[np.ndarray, "rows seq"]
    segments: Int32[np.ndarray, "rows seq"]
    positions: Int32[np.ndarray, "rows seq"]
    targets: Bool[np.ndarray, "rows seq"]
    names: tuple[tuple[str, ...], ...]
    """The pieces of each row."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def first(self, count: int) -> "Rows":
        """Return the first rows, at most so many."""
        tokens, segments, positions, targets = (value[:count] for value in self.arrays().values())
        return Rows(tokens, segments, positions, targets, self.names[:count])

    @property
    def predicted(self) -> int:
        """Tokens that are predicted in all rows."""
        return int(self.targets.sum())


def split_pieces(pieces: Sequence[Piece], share: float) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return pieces to train on and the last `share` of them, which is held out (at least one, if the share is not 0).

    The pieces of a document are neighbours, so at most one document has pieces in both.

    Raises:
        ValueError: one of the two would be empty.
    """
    held = 0 if share == 0 else max(1, round(share * len(pieces)))
    if held >= len(pieces):
        raise ValueError(
            f"data: expected two pieces of text or more, to hold {share:.1%} of them out, got {len(pieces)}; give more "
            "text, or data.held_out 0"
        )
    return tuple(pieces[: len(pieces) - held]), tuple(pieces[len(pieces) - held :])


def pack(pieces: Sequence[Piece], length: int, *, together: bool = True) -> Rows:
    """Put each piece into the first of the newest rows that has room for it (first fit), or into a row of its own.

    Args:
        length: tokens a row; no piece is longer.
        together: False gives each piece a row of its own.
    """
    rows: list[list[Piece]] = []
    room = np.zeros(len(pieces), np.int64)
    for piece in pieces:
        size = len(piece.tokens)
        oldest = max(0, len(rows) - OPEN) if together else len(rows)
        fits = np.flatnonzero(room[oldest : len(rows)] >= size)
        place = oldest + int(fits[0]) if len(fits) else len(rows)
        if place == len(rows):
            rows.append([])
            room[place] = length
        rows[place].append(piece)
        room[place] -= size
    tokens, segments, positions = np.zeros((3, len(rows), length), np.int32)
    segments[:] = -1
    targets = np.zeros((len(rows), length), bool)
    for place, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row, start=1):
            stop = start + len(piece.tokens)
            tokens[place, start:stop] = piece.tokens
            segments[place, start:stop] = segment
            positions[place, start:stop] = np.arange(stop - start)
            targets[place, start:stop] = piece.targets
            start = stop
    names = tuple(tuple(piece.name for piece in row) for row in rows)
    return Rows(tokens, segments, positions, targets, names)


def padded_rows(rows: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return `size` rows, those missing filled with padding; `row` is -1 there."""
    missing = size - len(rows["tokens"])
    blank = {"segments": -1, "row": -1}
    return {
        name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1), constant_values=blank.get(name, 0))
        for name, value in rows.items()
    }


class _Source:
    """Rows by number, as grain takes them; `row` is that number."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {name: value[index] for name, value in self._rows.arrays().items()} | {"row": np.array(index, np.int32)}

    def __repr__(self) -> str:
        return f"{len(self)} packed rows"


def feed(rows: Rows, *, batch_size: int, epochs: int, seed: int) -> grain.DatasetIterator:
    """Return an iterator over batches of `batch_size` rows, `{field: [batch, seq]}` with `row: [batch]`.

    All rows come once an epoch, in an order drawn from seed and epoch; batches run on from one epoch to the next, and
    only the last can be short, where it is filled with padding. `get_state` and `set_state` keep and restore the place.
    """
    batches = grain.MapDataset.source(_Source(rows)).shuffle(seed=seed).repeat(epochs).batch(batch_size)
    filled = batches.map(lambda batch: padded_rows(batch, batch_size))
    return iter(filled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def rows_fed(rows: Rows, *, batch_size: int, epochs: int, seed: int, steps: int) -> Int32[np.ndarray, "fed"]:
    """Return the numbers of the rows that the first batches of `feed` have, in the order of the rows.

    Args:
        steps: how many batches, at most those that there are.
    """
    if steps * batch_size >= len(rows.tokens):
        return np.arange(len(rows.tokens), dtype=np.int32)
    batches = feed(rows, batch_size=batch_size, epochs=epochs, seed=seed)
    return np.sort(np.concatenate([next(batches)["row"] for _ in range(steps)]))


def count_batches(rows: Rows, *, batch_size: int, epochs: int) -> int:
    """Return how many batches `feed` gives."""
    return -(-len(rows.tokens) * epochs // batch_size)
