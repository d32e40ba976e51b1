"""Stage 4: what a model costs: bytes and time."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saap_jax.llama.model import Llama


@jax.jit
def forward_step(model: Llama, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
    """Return the logits: the timed program."""
    return model(tokens)


def forward_seconds(
    models: Sequence[Llama], tokens: Int[np.ndarray, "batch seq"], *, repeats: int = 5
) -> tuple[float, ...]:
    """Return each model's median seconds for one forward pass, warm; the models take turns, so drift hits all alike."""
    inputs = jnp.asarray(tokens)
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        jax.block_until_ready(forward_step(model, inputs))
    for _ in range(repeats):
        for model, seconds in zip(models, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(forward_step(model, inputs))
            seconds.append(time.perf_counter() - start)
    return tuple(statistics.median(seconds) for seconds in times)


def forward_bytes(model: Llama, tokens: Int[np.ndarray, "batch seq"]) -> int:
    """Return the bytes that a forward pass takes: all parameters, and the compiled program's results and temporaries.

    Raises:
        ValueError: the device's compiler tells no memory.
    """
    memory = forward_step.lower(model, jnp.asarray(tokens)).compile().memory_analysis()
    if memory is None:
        kind = jax.devices()[0].device_kind
        raise ValueError(f"memory: expected the compiler's memory analysis, got none on {kind}; leave this limit out")
    added = memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return weight_bytes(model) + added


def weight_bytes(model: Llama) -> int:
    """Return the bytes of all parameters in memory; a tied unembedding counts once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def directory_bytes(directory: Path, pattern: str = "*") -> int:
    """Return the bytes of a directory's files that match a pattern."""
    return sum(path.stat().st_size for path in directory.glob(pattern))
