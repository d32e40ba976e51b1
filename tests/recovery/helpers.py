"""A small method that trains few parameters, and packed rows for tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saap_jax.llama.model import Llama
from saap_jax.recovery.adapters import Method
from saap_jax.recovery.objective import Packed
from saap_jax.recovery.packing import Piece, Rows, pack
from tests.helpers import VOCAB

LENGTH = 12


class Adapter(nnx.Param):
    """What the method trains."""


class AdaptedScale(nnx.Module):
    """A norm's scale with a product of two small matrices beside it, which is 0 at first."""

    def __init__(self, scale: nnx.Param, key: jax.Array) -> None:
        self.scale = scale
        self.a = Adapter(jax.random.normal(key, (scale.shape[0], 2)))
        self.b = Adapter(jnp.zeros(2))

    def __getitem__(self, key):
        return self.scale[key] + (self.a[...] @ self.b[...]).astype(self.scale.dtype)


def adapted(model: Llama, key: jax.Array) -> Llama:
    """Put an adapter beside the last norm's scale."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    model.norm = AdaptedScale(model.norm, key)
    return model


def merged(model: Llama) -> Llama:
    """Return the model with the adapted scale as a plain one."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    model.norm = nnx.Param(model.norm[...], axes=("embed",))
    return model


LORA_LIKE = Method("lora-like", adapted, Adapter, merged)


def pieces_of(*sizes: int, seed: int = 0) -> list[Piece]:
    """Pieces of random tokens; the first third is a prompt."""
    random = np.random.default_rng(seed)
    return [
        Piece(f"piece {n}", random.integers(0, VOCAB, size, np.int32), np.arange(size) >= max(1, size // 3))
        for n, size in enumerate(sizes)
    ]


def rows_of(*sizes: int, seed: int = 0, length: int = LENGTH) -> Rows:
    """Rows packed from random pieces of these sizes."""
    return pack(pieces_of(*sizes, seed=seed), length)


def packed(rows: Rows) -> Packed:
    """Return rows on the device."""
    return Packed(*(jnp.asarray(array) for array in rows.arrays().values()))


def regular_rows(count: int, length: int = LENGTH) -> Rows:
    """Rows that can be learned: a token follows from the one before, t + 5 modulo the vocabulary."""
    starts = np.arange(count, dtype=np.int32)[:, None]
    tokens = (starts * 7 + 5 * np.arange(length, dtype=np.int32)) % VOCAB
    pieces = [Piece(f"piece {n}", row.astype(np.int32), np.arange(length) > 0) for n, row in enumerate(tokens)]
    return pack(pieces, length)
