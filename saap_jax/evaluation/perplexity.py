"""Stage 4: perplexity over non-overlapping windows, for gates and for cut models, by one compiled program a shape."""

import functools
from collections.abc import Callable, Collection, Iterator

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.loss import next_token_losses, predicted_tokens
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import ones_gates
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import shard
from saap_jax.runtime.progress import within
from saap_jax.types import Gates, WindowLosses

Batch = tuple[Int[Array | np.ndarray, "batch seq"], Bool[Array | np.ndarray, "batch seq"]]

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
    *,
    progress: Callable[[Collection[Batch]], Iterator[Batch]] = tell_windows,
) -> WindowLosses:
    """Return the loss of each window under `gates` (None: nothing removed). Padding rows are left out.

    Raises:
        ValueError: no window at all.
    """
    gates = ones_gates(model.segments) if gates is None else gates
    sums, counts = [], []
    for tokens, mask in progress(batches):
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
