"""A teacher's likeliest tokens on disk, made once before a training that then does without the teacher.

`about.json` says what they were made of. Beside it are blocks of the rows that are trained on, in the text's order:

| file            | type    | shape                    |                                                       |
|-----------------|---------|--------------------------|-------------------------------------------------------|
| `N.indices.npy` | int32   | `[rows, seq - 1, k]`     | the k likeliest tokens behind each token but the last |
| `N.masses.npy`  | float32 | `[rows, seq - 1, k + 1]` | log p of each at the temperature, and of all others   |

The others have no bucket where k is the whole vocabulary. Blocks are written whole or not at all, so what was killed
goes on with the first block that is not there; rows are read where they lie, by memory maps.
"""

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from saap_jax.config.mesh import BATCH
from saap_jax.data.packing import FIELDS, Rows, padded_rows
from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import Llama
from saap_jax.llama.packed import packed_hidden
from saap_jax.recovery.objective import Objective, Packed, TopK, cast, masses_of
from saap_jax.runtime.constraints import batch_shards, in_force, on_mesh_of, vocab_shards
from saap_jax.runtime.files import encoded, read_json, write_atomically
from saap_jax.runtime.gather import fetched, first_not_finite
from saap_jax.runtime.mesh import shard
from saap_jax.runtime.processes import barrier, broadcast
from saap_jax.runtime.progress import Track, quiet

BLOCK = 2**25
"""Bytes of a block, about: what is in memory before it is written, and made again after a kill."""

_DAMAGED = (OSError, ValueError, EOFError, SyntaxError)
"""What numpy raises for a file that is missing, cut short or none of its own."""


class Kept(NamedTuple):
    """Where the likeliest tokens of some rows are, or will be."""

    directory: Path
    rows: Int32[np.ndarray, "rows"]
    """Their numbers in the text, ascending."""
    before: int
    """Tokens of a row that have one behind them: seq - 1."""
    k: int
    vocab: int
    batch: int
    """Rows that the teacher reads at once."""

    @property
    def files(self) -> dict[str, tuple[int, Any]]:
        """The arrays: numbers a token, and their type."""
        buckets = self.k + (self.k < self.vocab)
        return {"indices": (self.k, np.int32), "masses": (buckets, np.float32)}

    @property
    def row_bytes(self) -> int:
        return self.before * sum(count * np.dtype(dtype).itemsize for count, dtype in self.files.values())

    @property
    def nbytes(self) -> int:
        """What they take on disk, beside a header of 128 bytes a file."""
        return len(self.rows) * self.row_bytes

    @property
    def block_rows(self) -> int:
        """Rows of each block but the last."""
        return self.batch * max(1, BLOCK // (self.batch * self.row_bytes))

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-len(self.rows) // self.block_rows)

    def numbers(self, block: int) -> Int32[np.ndarray, "some"]:
        """List the numbers of the rows of a block."""
        return self.rows[block * self.block_rows :][: self.block_rows]

    def path(self, block: int, name: str) -> Path:
        """Name the file of an array of a block."""
        return self.directory / f"{block:06}.{name}.npy"

    def has(self, block: int) -> bool:
        """Say whether a block is there, of the types and sizes that it has to have."""
        return all(self._map(block, name) is not None for name in self.files)

    def of(self, rows: Int[np.ndarray, "batch"]) -> tuple[np.ndarray, np.ndarray]:
        """Read what is known of rows; those numbered -1, which are padding, are any row.

        Returns:
            The fields of `TopK`: indices `[batch, seq - 1, k]` and masses `[batch, seq - 1, buckets]`.

        Raises:
            ValueError: a file is missing or damaged.
        """
        places = np.searchsorted(self.rows, np.where(rows < 0, self.rows[0], rows))
        indices, masses = (
            np.stack([self._row(*divmod(int(place), self.block_rows), name) for place in places]) for name in self.files
        )
        if indices.min() < 0 or indices.max() >= self.vocab or not np.isfinite(masses).all():
            raise ValueError(
                f"{self.directory}: expected tokens of a vocabulary of {self.vocab} and finite numbers for the rows "
                f"{rows.tolist()}, found others; the files were changed or damaged: remove the directory, and the same "
                "command makes them again"
            )
        return indices, masses

    def _row(self, block: int, row: int, name: str) -> np.ndarray:
        array = self._map(block, name)
        if array is None:
            raise ValueError(
                f"{self.path(block, name)}: expected an array of the dense model's likeliest tokens, found none that "
                "is whole; it was removed or damaged: the same command makes it again"
            )
        return array[row]

    def _map(self, block: int, name: str) -> np.ndarray | None:
        """Map an array of a block where it lies, None where it is not what it has to be."""
        count, dtype = self.files[name]
        try:
            array = np.load(self.path(block, name), mmap_mode="r", allow_pickle=False)
        except _DAMAGED:
            return None
        shape = (len(self.numbers(block)), self.before, count)
        return array if isinstance(array, np.ndarray) and (array.shape, array.dtype) == (shape, dtype) else None


def keep_top_k(
    kept: Kept,
    teacher: Llama,
    rows: Rows,
    objective: Objective,
    about: Mapping[str, Any],
    *,
    track: Track = quiet,
) -> int:
    """Make and write the likeliest tokens that are not there yet; return how many tokens the teacher read.

    All processes of a job have to call this; the first one writes.

    Args:
        rows: the text, of which those are read that `kept` names.
        objective: `compute` and `temperature` count.
        about: what identifies teacher and text, plain values.

    Raises:
        ValueError: the directory holds those of something else, or the teacher's logits are not finite.
        OSError: a file cannot be written, as on a full disk.
    """
    missing = broadcast(lambda: _missing(kept, about))
    for block in track("keep the dense model's likeliest tokens", missing, len(missing)):
        numbers = kept.numbers(block)
        made = [
            _made(kept, teacher, rows, numbers[first : first + kept.batch], objective)
            for first in range(0, len(numbers), kept.batch)
        ]
        for name, parts in zip(kept.files, zip(*made, strict=True), strict=True):
            file = io.BytesIO()
            np.save(file, np.concatenate(parts), allow_pickle=False)
            write_atomically(kept.path(block, name), file.getvalue())
    barrier("the dense model's likeliest tokens")
    return sum(int((rows.segments[kept.numbers(block)] >= 0).sum()) for block in missing)


def _missing(kept: Kept, about: Mapping[str, Any]) -> list[int]:
    """List the blocks that have to be made, in a directory that then says what they are of."""
    file = kept.directory / "about.json"
    if file.exists():
        found = read_json(file)
        before = found if isinstance(found, dict) else {}
        differing = [f"{key} {before.get(key)} -> {value}" for key, value in about.items() if before.get(key) != value]
        if differing:
            raise ValueError(
                f"{kept.directory} holds likeliest tokens of something else: {', '.join(differing[:3])}; remove the "
                "directory to make them again, or choose another --name"
            )
        return [block for block in range(kept.blocks) if not kept.has(block)]
    kept.directory.mkdir(parents=True, exist_ok=True)
    for path in kept.directory.glob("*.npy"):  # of what, nobody knows
        path.unlink()
    write_atomically(file, encoded(about, indent=1))
    return list(range(kept.blocks))


def _made(kept: Kept, teacher: Llama, rows: Rows, numbers: np.ndarray, objective: Objective) -> list[np.ndarray]:
    """Make the arrays of some rows, at most `kept.batch`."""
    batch = padded_rows({name: rows.arrays()[name][numbers] for name in FIELDS}, kept.batch)
    packed = Packed(*(shard(batch[name], teacher) for name in FIELDS), top=None)
    with on_mesh_of(teacher):
        top = top_k_of(teacher, packed, k=kept.k, objective=objective)
    indices, masses = (fetched(array)[: len(numbers)] for array in top)
    bad = numbers[~np.isfinite(masses).all(axis=(1, 2))]
    if len(bad):
        place = first_not_finite(teacher)
        cause = f"it has numbers that are not finite, in {place}; load another model"
        if place is None:
            cause = "its activations overflow; try --training.compute float32"
        raise ValueError(
            f"training.top_k_logits: expected finite logits of the dense model, got others on row {bad[0]} "
            f"({', '.join(rows.names[bad[0]][:3])}): {cause}"
        )
    return [array.astype(dtype) for array, (_, dtype) in zip((indices, masses), kept.files.values(), strict=True)]


@functools.partial(jax.jit, static_argnames=("k", "objective"))
def top_k_of(teacher: Llama, rows: Packed, *, k: int, objective: Objective) -> TopK:
    """Find the k likeliest tokens behind each token of rows `[batch, seq]` but the last, at the temperature.

    The logits of all positions are in memory at once only where they are few, see `over_positions`.
    """
    model = cast(teacher, objective.compute)
    hidden = packed_hidden(model, rows.tokens, rows.positions, rows.segments)

    def of_tokens(hidden: Array) -> TopK:
        logits = model.logits(hidden) / objective.temperature
        indices = _likeliest(logits, k)
        return TopK(indices, masses_of(logits, indices))

    return over_positions(of_tokens, hidden[:, :-1], logits=[model] * vocab_shards(model.embedding.shape[0]))


def _likeliest(logits: Float[Array, "batch seq vocab"], k: int) -> Int[Array, "batch seq k"]:
    """Find the k likeliest tokens; each device looks at whole logits, of its own examples alone.

    A sort is not split by itself: left to the partitioner, every device would gather those of the whole batch.
    """

    def find(some: Array) -> Array:
        return jax.lax.top_k(some, k)[1]

    if not in_force():
        return find(logits)
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = tuple(axis for axis in BATCH if sizes.get(axis, 1) > 1) if batch_shards(len(logits)) > 1 else ()
    spec = PartitionSpec(parts or None)
    return jax.shard_map(find, in_specs=spec, out_specs=spec)(logits)
