"""Stage 4: what a model costs: bytes and operations, the time of a forward pass; and what a run costs.

    device-hours = seconds · devices / 3600
    USD = device-hours · USD an hour
    USD a million tokens = 1e6 / (tokens a second) / 3600 · devices · USD an hour

*Devices* are all that the run holds, whether they are busy or not, because all are paid for; on a CPU they are the
cores that the run may use. SAAP_USD_PER_HOUR says what one of yours costs, in the place of `PRICES`.
"""

import fnmatch
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saap_jax.llama.decoder import cache_bytes
from saap_jax.llama.model import Llama
from saap_jax.records import Cost, RunRecord
from saap_jax.structures.discovery import parameters_by_path, weight_bytes

Taken = TypeVar("Taken")


@jax.jit
def forward_step(model: Llama, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
    """Compute the logits: the timed program."""
    return model(tokens)


def in_turns(
    measures: Sequence[Callable[[], Taken]], repeats: int, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> list[list[Taken]]:
    """Measure each `repeats` times, in turns, so that drift of the machine hits all alike; one more round warms up."""
    found: list[list[Taken]] = [[] for _ in measures]
    for turn in progress(range(repeats + 1)):
        for measure, each in zip(measures, found, strict=True):
            taken = measure()
            each += [taken] if turn else []
    return found


def forward_seconds(
    models: Sequence[Llama], tokens: Int[np.ndarray, "batch seq"], *, repeats: int = 5
) -> tuple[float, ...]:
    """Take each model's median seconds for one forward pass, warm; the models take turns."""
    inputs = jnp.asarray(tokens)
    return median_seconds([functools.partial(forward_step, model, inputs) for model in models], repeats)


def median_seconds(runs: Sequence[Callable[[], Any]], repeats: int) -> tuple[float, ...]:
    """Take the median seconds of each of some runs, warm; they take turns."""

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    taken = in_turns([functools.partial(seconds, run) for run in runs], repeats)
    return tuple(statistics.median(each) for each in taken)


def forward_bytes(model: Llama, tokens: Int[np.ndarray, "batch seq"]) -> int:
    """Count the bytes that a forward pass takes: all parameters, and the compiled program's results and temporaries.

    Raises:
        ValueError: the device's compiler tells no memory.
    """
    memory = forward_step.lower(model, jnp.asarray(tokens)).compile().memory_analysis()
    if memory is None:
        kind = jax.devices()[0].device_kind
        raise ValueError(f"memory: expected the compiler's memory analysis, got none on {kind}; leave this limit out")
    return weight_bytes(model) + program_bytes(memory) - memory.argument_size_in_bytes


def program_bytes(memory: Any) -> int:
    """Count the most bytes that a program holds at once on one device, from the compiler's analysis of it: arguments,
    results that do not reuse them, temporaries.

    Its own `peak_memory_in_bytes` is the same to 1 % on a TPU, and on a CPU leaves temporaries out.
    """
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def token_macs(model: Llama, context: int | float = 0, *, unembed: bool = True) -> int | float:
    """Count the multiply-accumulates of one token that attends to `context` positions, its own among them.

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
    """Count the multiply-accumulates of reading `batch` prompts of `seq` tokens; only the last one is unembedded.

    All seq² products of attention count, since the masked ones are computed too.
    """
    return batch * (seq * token_macs(model, seq, unembed=False) + math.prod(model.embedding.shape))


def step_bytes(model: Llama, batch: int, context: int | float) -> int | float:
    """Count the bytes that one decoding step reads: the weights once, and each row's keys and values.

    Of an embedding that is not tied only the rows of the tokens are read.
    """
    read = weight_bytes(model)
    (vocab, embed) = model.embedding.shape
    if model.unembedding is not None:
        read += (batch - vocab) * embed * jnp.dtype(model.embedding.dtype).itemsize
    return read + cache_bytes(model, batch, 1) * context


# --- dollars -----------------------------------------------------------------------------------------


class Price(NamedTuple):
    """What an hour of a device costs, or of one core of a CPU."""

    kind: str
    device_kinds: tuple[str, ...]
    """What jax calls such a device; `*` stands for anything."""
    usd_per_hour: float
    date: str


PRICES = (
    Price("TPU v4", ("TPU v4",), 3.22, "2025"),
    Price("TPU v5e", ("TPU v5 lite", "TPU v5e"), 1.20, "2025"),
    Price("TPU v5p", ("TPU v5", "TPU v5p"), 4.20, "2025"),
    Price("TPU v6e", ("TPU v6 lite", "TPU v6e"), 2.70, "2025"),
    Price("NVIDIA H100", ("NVIDIA H100*",), 6.88, "2026-11"),
    Price("NVIDIA A100 80GB", ("NVIDIA A100*80GB*",), 3.43, "2026-11"),
    Price("NVIDIA A100", ("NVIDIA A100*",), 2.74, "2026-11"),
    Price("cpu", ("cpu",), 0.041, "2026-06"),
)
"""List prices on demand, without any discount, the first that fits: of Google Cloud for TPUs, of AWS for the rest (an
eighth of p5.48xlarge, p4de.24xlarge and p4d.24xlarge, half of m7g.large). A starting point, not an offer."""


def read_prices() -> tuple[Price, ...]:
    """Take the prices of `PRICES`, or the one that SAAP_USD_PER_HOUR names for every device, else ValueError."""
    if not (said := os.environ.get("SAAP_USD_PER_HOUR")):
        return PRICES
    try:
        usd = float(said)
    except ValueError:
        usd = -1.0
    if not 0 <= usd < 1e6:
        raise ValueError(f"SAAP_USD_PER_HOUR: expected US dollars an hour of a device, such as 2.10, got {said[:60]!r}")
    return (Price("SAAP_USD_PER_HOUR", ("*",), usd, ""),)


def find_price(device_kind: str, prices: Sequence[Price]) -> Price | None:
    """Find the first price for what jax calls `device_kind`.

    >>> find_price("NVIDIA H100 80GB HBM3", PRICES).usd_per_hour
    6.88
    """
    fits = (price for price in prices for each in price.device_kinds if fnmatch.fnmatchcase(device_kind, each))
    return next(fits, None)


def run_cost(run: RunRecord, prices: Sequence[Price]) -> Cost:
    """Add up `cost` of `run.json` from its `stages`, `devices` and `best`.

    Without a price for the device, amounts in US dollars are None and `note` says how to give one. A run that was taken
    up again counts as if all of it had been on the devices of its last call.
    """
    about = run["devices"]
    best = run.get("best", {})
    if about["platform"] != "cpu":
        devices = about["count"]
    else:
        devices = about["cores"]
    hours = sum((stage["seconds"] for stage in run["stages"]), 0.0) * devices / 3600
    cost: Cost = {"device_hours": hours, "devices": devices, "usd": None, "usd_per_million_tokens": None}
    price = find_price(about["kind"], prices)
    if price is None:
        note = f"no price for devices of kind {about['kind']!r}: set SAAP_USD_PER_HOUR to that of one"
        return {**cost, "prices": None, "note": note}
    if not isinstance(best, list) and {"dense_forward_seconds", "forward_seconds", "forward_tokens"} <= best.keys():
        seconds = (best["dense_forward_seconds"], best["forward_seconds"])
        dense, cut = (1e6 / (best["forward_tokens"] / s) * devices / 3600 * price.usd_per_hour for s in seconds)
        cost["usd_per_million_tokens"] = {"dense": dense, "cut": cut}
    record = {"kind": price.kind, "usd_per_hour": price.usd_per_hour, "date": price.date}
    return {**cost, "usd": hours * price.usd_per_hour, "prices": record}
