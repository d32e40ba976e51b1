"""Orders of rows: each epoch has one of its own, and a row's place in it is computed alone, without the others'.

A permutation of a power of two is a Feistel network with the round function of SIMON (Beaulieu et al., 2013), and keys
that `std::seed_seq` of C++ makes of the seed. What lands beyond the last row is encrypted again until it does not
(Black and Rogaway's cycle walking). It is the order of Grain's `MapDataset.shuffle`, so that trainings that were begun
with it go on.
"""

import numpy as np
from jaxtyping import UInt64

ROUNDS = 4

NARROW = 16
"""Bits of the narrowest block: patterns show in smaller ones."""


def shuffled(count: int, seed: int, epoch: int) -> UInt64[np.ndarray, " rows"]:
    """Return the numbers from 0 to `count` - 1 in the order of an epoch.

    >>> shuffled(6, seed=3, epoch=0).tolist(), shuffled(6, seed=3, epoch=1).tolist()
    ([4, 3, 0, 1, 2, 5], [5, 0, 4, 3, 2, 1])
    """
    order = np.arange(count, dtype=np.uint64)
    if count < 2:
        return order
    bits = max((count - 1).bit_length(), NARROW)
    keys = _keys((seed + epoch) % 2**32)
    outside = np.ones(count, bool)
    while outside.any():
        order[outside] = _encrypted(order[outside], keys, word=(bits + 1) // 2)
        outside = order >= count
    return order


def _encrypted(values: UInt64[np.ndarray, " rows"], keys: list[int], word: int) -> UInt64[np.ndarray, " rows"]:
    """Encrypt numbers of two words of so many bits."""
    ones = np.uint64(2**word - 1)

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << np.uint64(by) | x >> np.uint64(word - by)) & ones

    left = values >> np.uint64(word)
    right = values & ones
    for key in keys:
        mixed = rotated(right, 1) & rotated(right, 8) ^ rotated(right, 2)
        left, right = right, left ^ mixed ^ np.uint64(key) & ones
    return left << np.uint64(word) | right


def _keys(seed: int) -> list[int]:
    """Make the keys of the rounds as `std::seed_seq{seed}` does (C++, [rand.util.seedseq]), of four words."""
    words = [0x8B8B8B8B] * ROUNDS
    for place, added in enumerate((1, 1 + seed, 2, 3)):
        first, second, third, last = (words[(place + offset) % ROUNDS] for offset in range(ROUNDS))
        value = _mixed(first ^ second ^ last, 1664525)
        words[(place + 1) % ROUNDS] = (second + value) % 2**32
        words[(place + 2) % ROUNDS] = (third + value + added) % 2**32
        words[place] = (value + added) % 2**32
    for place in range(ROUNDS):
        first, second, third, last = (words[(place + offset) % ROUNDS] for offset in range(ROUNDS))
        value = _mixed((first + second + last) % 2**32, 1566083941)
        words[(place + 1) % ROUNDS] = second ^ value
        words[(place + 2) % ROUNDS] = third ^ (value - place) % 2**32
        words[place] = (value - place) % 2**32
    return words


def _mixed(value: int, factor: int) -> int:
    return factor * (value ^ value >> 27) % 2**32
