"""A teacher's likeliest tokens on disk, made once before a training that then does without the teacher.

`about.json` says what they were made of. Beside it, of the rows that are trained on, in the text's order, lie:

| file          | type    | shape                    |                                                       |
|---------------|---------|--------------------------|-------------------------------------------------------|
| `indices.npy` | int32   | `[rows, seq - 1, k]`     | the k likeliest tokens behind each token but the last |
| `masses.npy`  | float32 | `[rows, seq - 1, k + 1]` | log p of each at the temperature, and of all others   |

The others have no bucket where k is the whole vocabulary. Rows are read where they lie, by memory maps.
"""

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from saap_jax.errors import reading
from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import Llama
from saap_jax.llama.passes import packed_hidden
from saap_jax.recovery.objective import Objective, Packed, TopK, cast, masses_of
from saap_jax.recovery.packing import FIELDS, Rows, padded_rows
from saap_jax.runtime.constraints import batch_parts, in_force, on_mesh_of, vocab_shards
from saap_jax.runtime.files import encoded, read_json, write_atomically
from saap_jax.runtime.gather import fetched, first_not_finite
from saap_jax.runtime.mesh import shard
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import Track, quiet

_WHOLE = "the dense model's likeliest tokens (remove the directory, and the same command makes them again)"


class KeptLogits(NamedTuple):
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
    def files(self) -> dict[str, tuple[tuple[int, int, int], Any]]:
        """Shape and type of each array."""
        sizes = {"indices": (self.k, np.int32), "masses": (self.k + (self.k < self.vocab), np.float32)}
        return {name: ((len(self.rows), self.before, count), dtype) for name, (count, dtype) in sizes.items()}

    @property
    def nbytes(self) -> int:
        """What they take on disk, beside a header of 128 bytes a file."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.files.values())

    def of(self, rows: Int[np.ndarray, "batch"]) -> list[np.ndarray]:
        """Read what is known of rows, the fields of `TopK`; those numbered -1, which are padding, are any row.

        Raises:
            ValueError: a file is missing or damaged.
        """
        places, found = np.searchsorted(self.rows, np.where(rows < 0, self.rows[0], rows)), []
        for name, (shape, dtype) in self.files.items():
            path = self.directory / f"{name}.npy"
            with reading(path, _WHOLE):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if (array.shape, array.dtype) != (shape, dtype):
                    raise ValueError(f"{array.dtype} of shape {array.shape}, not {np.dtype(dtype)} of shape {shape}")
                found.append(np.asarray(array[places]))
                if name == "indices" and not (found[0].min() >= 0 and found[0].max() < self.vocab):
                    raise ValueError(f"tokens beyond a vocabulary of {self.vocab}")
        return found


def keep_top_k(
    kept: KeptLogits,
    teacher: Llama,
    rows: Rows,
    objective: Objective,
    about: Mapping[str, Any],
    *,
    track: Track = quiet,
) -> int:
    """Make and write the likeliest tokens where they are not there yet; return how many tokens the teacher read.

    All processes of a job have to call this; the first one writes.

    Args:
        rows: the text, of which those are read that `kept` names.
        objective: `compute` and `temperature` count.
        about: what identifies teacher and text, plain values.

    Raises:
        ValueError: the directory holds those of something else, or the teacher's logits are not finite.
        OSError: a file cannot be written, as on a full disk.
    """
    if broadcast(lambda: _there(kept, about)):
        return 0
    partial = {name: kept.directory / f".{name}.npy.partial" for name in kept.files}
    with contextlib.ExitStack() as stack:
        writers = []
        for name, (shape, dtype) in kept.files.items() if is_primary() else ():
            stack.callback(partial[name].unlink, missing_ok=True)
            writers.append(stack.enter_context(partial[name].open("wb")))
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(writers[-1], header)
        starts = range(0, len(kept.rows), kept.batch)
        for start in track("keep the dense model's likeliest tokens", starts, len(starts)):
            made = _made(kept, teacher, rows, kept.rows[start : start + kept.batch], objective)
            for writer, array in zip(writers, made, strict=False):
                writer.write(array.tobytes())
        for writer, (name, path) in zip(writers, partial.items(), strict=False):
            writer.close()
            os.replace(path, kept.directory / f"{name}.npy")
    write_atomically(kept.directory / "about.json", encoded(about, indent=1))
    barrier("the dense model's likeliest tokens")
    return int((rows.segments[kept.rows] >= 0).sum())


def _there(kept: KeptLogits, about: Mapping[str, Any]) -> bool:
    """Say whether all is there, in a directory that then is."""
    file = kept.directory / "about.json"
    if not file.exists():
        kept.directory.mkdir(parents=True, exist_ok=True)
        return False
    found = read_json(file)
    before = found if isinstance(found, dict) else {}
    differing = [f"{key} {before.get(key)} -> {value}" for key, value in about.items() if before.get(key) != value]
    if differing:
        raise ValueError(
            f"{kept.directory} holds likeliest tokens of something else: {', '.join(differing[:3])}; remove the "
            "directory to make them again, or choose another --name"
        )
    return True


def _made(kept: KeptLogits, teacher: Llama, rows: Rows, numbers: np.ndarray, objective: Objective) -> list[np.ndarray]:
    """Make the arrays of some rows, at most `kept.batch`."""
    batch = padded_rows({name: rows.arrays()[name][numbers] for name in FIELDS}, kept.batch)
    packed = Packed(*(shard(batch[name], teacher) for name in FIELDS), top=None)
    with on_mesh_of(teacher):
        top = top_k_of(teacher, packed, k=kept.k, objective=objective)
    indices, masses = (fetched(array)[: len(numbers)] for array in top)
    bad = numbers[~np.isfinite(masses).all(axis=(1, 2))]
    if len(bad):
        place = first_not_finite(teacher)
        cause = f"its weights are not finite, in {place}" if place else "try --training.compute float32"
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
    hidden, _ = packed_hidden(model, rows.tokens, rows.positions, rows.segments)

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
    spec = PartitionSpec(batch_parts(len(logits)) or None)
    return jax.shard_map(find, in_specs=spec, out_specs=spec)(logits)
