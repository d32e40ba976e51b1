"""Stage 4: the time of prefill and decoding, models taking turns; what their operations and bytes predict.

Prefill does many operations with each weight it reads, so its time is predicted by multiply-accumulates; a decoding
step reads all weights to make one token a row, so its time is predicted by bytes.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.evaluation.cost import in_turns, prefill_macs, program_bytes, step_bytes
from saap_jax.llama.decoder import Sampling, settings_of
from saap_jax.llama.generate import STEPS, DecodingState, decode_steps, padded, prefill, rounded, stops_of
from saap_jax.llama.model import Llama


class Workload(NamedTuple):
    """What is timed: `batch` prompts of `prompt` random tokens, read at once, then `new` tokens each, greedily."""

    batch: int
    prompt: int
    new: int


class Times(NamedTuple):
    """One measurement, in seconds."""

    prefill: float
    """The program that reads the prompts and draws the first tokens."""
    first_token: float
    """From prompts on the host to first tokens on the host."""
    step: float
    """One token of each row, the mean over all but the first."""


class Spread(NamedTuple):
    """Median, smallest and largest of several measurements."""

    median: float
    low: float
    high: float


class Predicted(NamedTuple):
    """How many times faster than the baseline a model should be, and was."""

    prefill: float
    """Ratio of multiply-accumulates."""
    step: float
    """Ratio of bytes read."""
    measured_prefill: Spread
    """Ratio of times, each of the two models in the same round."""
    measured_step: Spread


class Programs(NamedTuple):
    """Both programs of one model and workload, compiled, and the inputs that stay the same."""

    model: Llama
    workload: Workload
    prompts: list[list[int]]
    keys: Any
    prefill: Callable[..., tuple[Any, DecodingState]]
    decode: Callable[..., tuple[Any, DecodingState]]
    memory_bytes: int | None
    """The most that one of the two programs holds, by the compiler's own analysis; None where it gives none."""


def compile_programs(model: Llama, workload: Workload) -> Programs:
    """Compile prefill and decoding of a model for a workload; pass what `decoder_of` returns to time that form.

    Raises:
        ValueError: the workload does not fit the model's positions.
    """
    batch, prompt, new = workload
    if prompt + new > model.constants.positions:
        raise ValueError(
            f"bench: {prompt} tokens and {new} new ones make {prompt + new}, more than the model's "
            f"{model.constants.positions} positions; ask for fewer"
        )
    prompts = np.random.default_rng(0).integers(0, model.embedding.shape[0], (batch, prompt)).tolist()
    keys = jax.random.split(jax.random.key(0), batch)
    inputs = padded(prompts, batch)
    settings = settings_of(Sampling())
    stops = stops_of(())
    arguments = (model, inputs, keys, settings, stops)
    lowered = prefill.lower(*arguments, slots=rounded(inputs.tokens.shape[1] + new))
    _, state = lowered.out_info
    programs = lowered.compile(), decode_steps.lower(model, state, settings, stops, jnp.int32(1)).compile()
    memory = [program.memory_analysis() for program in programs]
    held = None
    if None not in memory:
        held = max(map(program_bytes, memory))
    return Programs(model, workload, prompts, keys, *programs, held)


def time_once(programs: Programs) -> Times:
    """Read the prompts and make the new tokens once; every number is of work that has ended."""
    settings = settings_of(Sampling())
    stops = stops_of(())
    model = programs.model
    start = time.perf_counter()
    inputs = jax.block_until_ready(padded(programs.prompts, programs.workload.batch))
    ready = time.perf_counter()
    token, state = programs.prefill(model, inputs, programs.keys, settings, stops)
    jax.block_until_ready((token, state))
    read = time.perf_counter()
    np.asarray(token)
    shown = time.perf_counter()
    left = programs.workload.new - 1
    for first in range(0, left, STEPS):
        _, state = programs.decode(model, state, settings, stops, jnp.int32(min(STEPS, left - first)))
    jax.block_until_ready(state)
    if left:
        step = (time.perf_counter() - shown) / left
    else:
        step = float("nan")
    return Times(prefill=read - ready, first_token=shown - start, step=step)


def time_in_turns(
    programs: Sequence[Programs], repeats: int, *, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> list[list[Times]]:
    """Measure each model `repeats` times; see `in_turns`. Time one model by giving one."""
    return in_turns([functools.partial(time_once, each) for each in programs], repeats, progress)


def spread(values: Iterable[float]) -> Spread:
    """Take median, smallest and largest.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=3.0)
    """
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def speed_up(model: Programs, times: Sequence[Times], base: Programs, base_times: Sequence[Times]) -> Predicted:
    """Tell how many times faster than the baseline a model should be, by operations and bytes, and was."""
    batch, prompt, new = model.workload
    seq = rounded(prompt)
    context = prompt + new / 2
    pairs = list(zip(times, base_times, strict=True))
    return Predicted(
        prefill=prefill_macs(base.model, batch, seq) / prefill_macs(model.model, batch, seq),
        step=step_bytes(base.model, batch, context) / step_bytes(model.model, batch, context),
        measured_prefill=spread(theirs.prefill / ours.prefill for ours, theirs in pairs),
        measured_step=spread(theirs.step / ours.step for ours, theirs in pairs),
    )
