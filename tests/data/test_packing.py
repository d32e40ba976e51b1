"""Packed rows hold each piece once and whole; the feed gives each row once an epoch and goes on from where it was."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saap_jax.recovery.packing import Feed, Piece, count_batches, pack, split_pieces
from saap_jax.recovery.shuffle import shuffled

LENGTH = 8


def pieces_of(sizes) -> list[Piece]:
    """Pieces whose tokens tell piece and place: 100 · piece + place."""
    return [
        Piece(f"piece {n}", np.arange(size, dtype=np.int32) + 100 * n, np.arange(size) >= max(1, size // 2))
        for n, size in enumerate(sizes, start=1)
    ]


sizes = st.lists(st.integers(2, LENGTH), min_size=1, max_size=30)


@given(sizes=sizes)
def test_every_piece_is_somewhere_whole(sizes):
    pieces = pieces_of(sizes)
    rows = pack(pieces, LENGTH)
    found = {}
    for row in range(len(rows.tokens)):
        for segment in range(1, rows.segments[row].max() + 1):
            here = rows.segments[row] == segment
            name = rows.names[row][segment - 1]
            found[name] = (rows.tokens[row, here], rows.targets[row, here])
            np.testing.assert_array_equal(rows.positions[row, here], np.arange(here.sum()))
    assert len(found) == len(pieces)
    for piece in pieces:
        np.testing.assert_array_equal(found[piece.name][0], piece.tokens)
        np.testing.assert_array_equal(found[piece.name][1], piece.targets)
    assert rows.predicted == sum(piece.targets.sum() for piece in pieces)
    assert (rows.segments > 0).sum() == sum(sizes)
    assert not rows.targets[rows.segments < 0].any()


def test_first_fit_fills_rows():
    rows = pack(pieces_of([5, 6, 3, 2]), LENGTH)
    assert rows.names == (("piece 1", "piece 3"), ("piece 2", "piece 4"))


def test_the_held_out_pieces_are_others():
    pieces = pieces_of([3] * 20)
    kept, held = split_pieces(pieces, 0.1)
    assert [len(kept), len(held)] == [18, 2]
    assert not {piece.name for piece in kept} & {piece.name for piece in held}
    assert split_pieces(pieces, 0.0) == (tuple(pieces), ())
    assert len(split_pieces(pieces, 0.001)[1]) == 1
    with pytest.raises(ValueError, match="expected two pieces of text or more"):
        split_pieces(pieces[:1], 0.5)


def rows_of(count: int):
    return pack(pieces_of([LENGTH] * count), LENGTH)


def test_each_row_comes_once_an_epoch_in_another_order():
    batches = list(Feed(rows_of(10), batch_size=4, epochs=2, seed=3))
    order = np.concatenate([batch["row"] for batch in batches])
    assert len(batches) == count_batches(rows_of(10), batch_size=4, epochs=2) == 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    again = np.concatenate([batch["row"] for batch in Feed(rows_of(10), batch_size=4, epochs=2, seed=3)])
    other = np.concatenate([batch["row"] for batch in Feed(rows_of(10), batch_size=4, epochs=2, seed=4)])
    np.testing.assert_array_equal(order, again)
    assert order.tolist() != other.tolist()


def test_the_last_batch_is_filled_with_padding():
    *_, last = Feed(rows_of(5), batch_size=4, epochs=1, seed=0)
    assert (last["row"] >= 0).tolist() == [True, False, False, False]
    assert not last["targets"][1:].any()
    assert (last["segments"][1:] == -1).all()


def test_the_place_survives_json():
    batches = Feed(rows_of(7), batch_size=2, epochs=3, seed=0)
    for _ in range(4):
        next(batches)
    place = json.loads(json.dumps(batches.get_state()))
    rest = [batch["row"].tolist() for batch in batches]
    other = Feed(rows_of(7), batch_size=2, epochs=3, seed=0)
    other.set_state(place)
    assert [batch["row"].tolist() for batch in other] == rest
    assert len(rest) == 7


@pytest.mark.parametrize(
    ("count", "seed", "epoch", "expected"),
    [
        (1, 5, 0, [0]),
        (10, 3, 0, [4, 7, 0, 8, 2, 5, 3, 6, 1, 9]),
        (10, 3, 1, [6, 0, 4, 3, 2, 1, 9, 8, 7, 5]),
        (7, 2**32 - 1, 1, [0, 4, 6, 2, 5, 3, 1]),
        (1000, 5, 0, "4f582bcba355c482"),
        (70000, 11, 0, "a765b91d8af2528b"),
    ],
)
def test_an_order_is_that_of_grain(count, seed, epoch, expected):
    """As Grain 0.2.18's `MapDataset.range(count).shuffle(seed).repeat(epoch + 1)` has it; of many, a digest."""
    order = shuffled(count, seed, epoch)
    digest = hashlib.sha256(order.tobytes()).hexdigest()[:16]
    assert expected in (order.tolist(), digest)


@pytest.mark.parametrize("count", [2, 257, 2**16, 2**16 + 1])
def test_an_order_has_each_row_once(count):
    assert np.array_equal(np.sort(shuffled(count, seed=1, epoch=0)), np.arange(count))
    assert not np.array_equal(shuffled(count, seed=1, epoch=0), shuffled(count, seed=2, epoch=0)), "control"
