"""Stage 4: what a model costs: bytes, operations and the time of a forward pass."""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saap_jax.llama.decoder import cache_bytes
from saap_jax.llama.model import Llama
from saap_jax.structures import parameters_by_path


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


def token_macs(model: Llama, context: int | float = 0, *, unembed: bool = True) -> int | float:
    """Return the multiply-accumulates of one token that attends to `context` positions, its own among them.

    Every entry of every matrix once, Σ size over the parameters with `embed` and another axis besides `layers`;
    embedding a token is a look-up and counts nothing, unembedding counts vocab · embed (`unembed`, tied or not).
    Attention adds, in each layer, 2 · kv_heads · q_per_kv · head_dim · context: scores, and the sum of values. Norms,
    biases, rotations and softmax are left out.
    """
    matrices = sum(
        math.prod(parameter.shape)
        for run in model.segments
        for parameter in parameters_by_path(run).values()
        if len(parameter.axes) > 2 and "embed" in parameter.axes
    )
    heads = sum(run.length * math.prod(run.attention.output.shape[-4:-1]) for run in model.segments)
    return matrices + 2 * heads * context + (math.prod(model.embedding.shape) if unembed else 0)


def prefill_macs(model: Llama, batch: int, seq: int) -> int | float:
    """Return the multiply-accumulates of reading `batch` prompts of `seq` tokens; only the last one is unembedded.

    All seq² products of attention count, since the masked ones are computed too.
    """
    return batch * (seq * token_macs(model, seq, unembed=False) + math.prod(model.embedding.shape))


def step_bytes(model: Llama, batch: int, context: int | float) -> int | float:
    """Return the bytes that one decoding step reads: the weights once, and each row's keys and values.

    Of an embedding that is not tied only the rows of the tokens are read.
    """
    read, (vocab, embed) = weight_bytes(model), model.embedding.shape
    if model.unembedding is not None:
        read += (batch - vocab) * embed * jnp.dtype(model.embedding.dtype).itemsize
    return read + cache_bytes(model, batch, 1) * context
