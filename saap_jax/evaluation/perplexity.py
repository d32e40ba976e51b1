"""Stage 4: perplexity over non-overlapping windows, of gates and of cut models, by one compiled program a shape.

Many pruned models are keep-sets as gates, in groups, by one compiled program. A group shares the text, the weights and
the layers in front of the first one in which two of them differ, whole or pruned alike, which run once. A candidate's
cost is then that of the remaining layers at the width that it keeps, and nothing compiles anew: gates and layer bounds
are inputs. Where units cannot be taken together (a mesh, experts), a group is a batch of masked models at full width.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Batch
from saap_jax.llama.attention import at_least_float32
from saap_jax.llama.loss import next_token_losses, predicted_tokens, summed_losses
from saap_jax.llama.model import Llama
from saap_jax.llama.passes import fits_kept_width, run_layers
from saap_jax.llama.segments import existing_units, ones_gates
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import shard
from saap_jax.runtime.progress import within
from saap_jax.types import STRUCTURES, Gates, Keep, WindowLosses

tell_windows = functools.partial(within, "batches of windows")
"""Yields batches, and tells of each as a step within whatever they are read for."""


@jax.jit
def loss_step(
    model: Llama, tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"], gates: Gates
) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
    """Return each window's summed loss and predicted tokens; gates are inputs, so no candidate compiles anew."""
    return next_token_losses(model, tokens, mask, gates)[0], predicted_tokens(mask)


def window_losses(
    model: Llama,
    batches: Collection[Batch],
    gates: Gates | None = None,
) -> WindowLosses:
    """Return the loss of each window under `gates` (None: nothing removed). Padding rows are left out.

    Raises:
        ValueError: no window at all.
    """
    if gates is None:
        gates = ones_gates(model.segments)
    sums = []
    counts = []
    for tokens, mask in tell_windows(batches):
        with on_mesh_of(model):
            batch_sums, batch_counts = loss_step(model, shard(tokens, model), shard(mask, model), gates)
        sums.append(fetched(batch_sums).astype(np.float64))
        counts.append(fetched(batch_counts))
    if not sums:
        raise ValueError("evaluation: expected at least one window, got none")
    all_counts = np.concatenate(counts)
    real = all_counts > 0
    return WindowLosses(np.concatenate(sums)[real], all_counts[real])


def metric_name(length: int, source: str) -> str:
    """Return the name of a perplexity, which always tells the window length: `ppl@128 builtin:reference`.

    >>> metric_name(128, "builtin:reference")
    'ppl@128 builtin:reference'
    """
    return f"ppl@{length} {source}"


# --- candidates ------------------------------------------------------------------------------------


class CandidateGroup(NamedTuple):
    """Candidates that are evaluated together, by their number, and how many layers from the first on are common."""

    members: tuple[int, ...]
    common: int


class GroupBatch(NamedTuple):
    """A batch of windows, by its number, under a group of candidates."""

    group: CandidateGroup
    batch: int


def candidate_losses(
    model: Llama,
    batches: Sequence[Batch],
    keeps: Sequence[Keep],
    *,
    done: Collection[int] = (),
    at_once: int = 8,
    progress: Callable[[Sequence[GroupBatch]], Iterator[GroupBatch]] = tell_windows,
) -> Iterator[dict[int, WindowLosses]]:
    """Yield the losses of each window under each keep-set, by the number of the keep-set, a group at a time.

    How keep-sets are grouped depends on all of them and not on `done`, so that a sweep that is taken up again gives the
    same numbers to the last bit.

    Args:
        batches: (tokens, mask) pairs, all of one shape; rows without real tokens are padding.
        keeps: `[layers, units]` a structure each.
        done: numbers that need no evaluation; a group of such only is left out.
        at_once: candidates in one group, filled up where there are fewer; changes speed and memory.
        progress: wraps the steps, each a batch of windows under a group of keep-sets, to show progress.
    """
    whole_model = existing_units(model.segments)
    groups = [g for g in grouped(keeps, whole_model, at_once) if not set(g.members) <= set(done)]
    steps = progress([GroupBatch(group, number) for group in groups for number in range(len(batches))])
    for group in groups:
        rows = [*group.members, *group.members[-1:] * (at_once - len(group.members))]
        gates = {name: jnp.asarray(np.stack([keeps[row][name] for row in rows]), jnp.float32) for name in STRUCTURES}
        common, count = (jnp.asarray(number, jnp.int32) for number in (group.common, len(group.members)))
        first = {name: gate[0] for name, gate in gates.items()}
        sums = []
        counts = []
        for step in itertools.islice(steps, len(batches)):
            tokens, mask = batches[step.batch]
            inputs = shard(tokens, model), shard(mask, model)
            with on_mesh_of(model):
                shared = shared_step(model, inputs[0], first, common)
                made = candidates_step(model, shared, gates, common, count, *inputs)
            sums.append(fetched(made))
            counts.append(np.asarray(mask)[:, 1:].sum(axis=1))
        by_candidate = np.concatenate(sums, axis=1).astype(np.float64)
        tokens_each = np.concatenate(counts)
        real = tokens_each > 0
        yield {
            member: WindowLosses(by_candidate[row][real], tokens_each[real]) for row, member in enumerate(group.members)
        }
    next(steps, None)  # so that they are shown to be done


def grouped(keeps: Sequence[Keep], existing: Keep, at_once: int) -> list[CandidateGroup]:
    """Group keep-sets that agree in many layers from the first on, so that much is shared; the order is kept among
    those that agree in as many with the whole model, or with the first keep-set.

    >>> whole, cut = np.array([[True], [True]]), np.array([[True], [False]])
    >>> keeps = [{"attention": whole, "mlp": mlp} for mlp in (cut, whole, cut)]
    >>> grouped(keeps, keeps[1], 2)
    [CandidateGroup(members=(0, 1), common=1), CandidateGroup(members=(2,), common=2)]
    """
    if not keeps:
        return []
    whole, *layers = [np.concatenate([keep[name] for name in STRUCTURES], axis=1) for keep in (existing, *keeps)]
    shared = [max(_common([of, each]) for of in (whole, layers[0])) for each in layers]
    order = sorted(range(len(keeps)), key=lambda number: -shared[number])
    pieces = [order[first : first + at_once] for first in range(0, len(order), at_once)]
    return [CandidateGroup(tuple(piece), _common([layers[n] for n in piece])) for piece in pieces]


def _common(layers: Sequence[Bool[np.ndarray, "_layers _units"]]) -> int:
    """Count the layers that, from the first on, are the same in several keep-sets."""
    differs = np.any([(each != layers[0]).any(axis=1) for each in layers], axis=0)
    if differs.any():
        return int(np.argmax(differs))
    return len(differs)


def keep_digest(keep: Keep) -> str:
    """Make a name of a keep-set that equal ones share, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, kept in sorted(keep.items()):
        digest.update(f"{name}{kept.shape}".encode() + np.packbits(kept).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def shared_step(
    model: Llama, tokens: Int[Array, "batch seq"], gates: Gates, common: Int[Array, ""]
) -> Float[Array, "batch seq embed"]:
    """Run to the residual stream behind the layers that are the same in all candidates, `[layers, units]` of gates."""
    return run_layers(model, model.embedded(tokens), 0, common, gates)


@jax.jit
def candidates_step(
    model: Llama,
    shared: Float[Array, "batch seq embed"],
    gates: Gates,
    common: Int[Array, ""],
    count: Int[Array, ""],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "candidates batch"]:
    """Sum each window's loss under the gates of the first `count` candidates, `[candidates, layers, units]`."""
    candidates = len(gates[STRUCTURES[0]])
    batch = len(tokens)
    layers = len(model.spec.layers)
    if fits_kept_width(model):

        def one(number: Int[Array, ""], sums: Array) -> Array:
            own = {name: gate[number] for name, gate in gates.items()}
            hidden = model.final(run_layers(model, shared, common, layers, own, kept_width=True))
            return sums.at[number].set(summed_losses(model, hidden[None], tokens, mask)[0])

        nothing = jnp.zeros((candidates, batch), at_least_float32(shared.dtype))
        return jax.lax.fori_loop(0, count, one, nothing)
    states = jnp.broadcast_to(shared[None], (candidates, *shared.shape))
    own = {name: jnp.repeat(gate, batch, axis=0) for name, gate in gates.items()}
    x = run_layers(model, states.reshape(-1, *shared.shape[1:]), common, layers, own)
    hidden = model.final(x)
    return summed_losses(model, hidden.reshape(states.shape), tokens, mask)
