"""What trains gates of units: rounds over the microbatches of a text, and steps of Adam on arrays of numpy."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saap_jax.types import HELD_OUT, Scores


def rounds(parts: int, steps: Iterable[int], done: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Yield the microbatches of each round with the numbers of their steps: each once a round, in another order.

    Args:
        done: how many rounds there were before.
    """
    random = np.random.default_rng(0)
    left = iter(steps)
    for _ in range(done):
        random.permutation(parts)
    while some := list(zip(random.permutation(parts).tolist(), left, strict=False)):
        yield some


def trained(steps: int, parts: int) -> float:
    """Estimate the forward passes over a text that so many steps take, each 2.6 over a part, and judging each round."""
    held = 1 / HELD_OUT
    return (2.6 * steps + held * steps / (1 - held)) / parts + held


def cosine(rate: float, step: int, steps: int) -> float:
    """Compute the rate of a step, counted from 0, which falls to 0 as a cosine."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def adam_start(values: Scores) -> Any:
    """Return the state before the first step of Adam."""
    return optax.scale_by_adam().init({name: jnp.zeros(np.shape(each), jnp.float32) for name, each in values.items()})


def adam(values: Scores, slopes: Scores, state: Any, rate: float, eps: float = 1e-8) -> tuple[Scores, Any]:
    """Return values and state after a step of Adam down the slopes."""
    updates: Any
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer count
        given = {name: jnp.asarray(slope, jnp.float32) for name, slope in slopes.items()}
        updates, state = optax.scale_by_adam(eps=eps).update(given, state)
    return {name: values[name] - rate * np.asarray(updates[name], np.float64) for name in values}, state
