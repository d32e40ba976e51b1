"""Draw the next token: greedily, or from the distribution cut by temperature, top-k and top-p."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits; the default takes the most probable one.

    Temperature first, then top-k, then top-p of what top-k left, as in `transformers`. Tokens that are exactly as
    probable as the last one kept are kept too.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token and ignores the rest."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the draws. Each prompt has a stream of its own, which its place in the list chooses."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a number of at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 1, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number in [0, 2^32), got {self.seed}")


class Settings(NamedTuple):
    """`Sampling` as arrays, so that other settings need no other program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def settings_of(sampling: Sampling) -> Settings:
    """Return the settings as the compiled programs take them."""
    return Settings(jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))


def draw(logits: Float[Array, "batch vocab"], settings: Settings, keys: Key[Array, "batch"]) -> Int[Array, "batch"]:
    """Draw one token a row, int32; a row depends on its own logits and key alone."""

    def drawn(logits: Array) -> Array:
        cut = truncate(logits.astype(jnp.float32) / settings.temperature, settings.top_k, settings.top_p)
        return jax.vmap(jax.random.categorical)(keys, cut).astype(jnp.int32)

    def most_probable(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(settings.temperature > 0, drawn, most_probable, logits)


def truncate(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Set the logits outside top-k and top-p to -inf.

    Both thresholds are found by bisection over the bits of a float32, 32 counts of the row: no sort, which takes
    longer than a forward pass of a small model, and `top_k` need not be known when the program is compiled.
    """

    def ordered(x: Array) -> Array:
        """Map float32 to int32 so that order is kept."""
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
        return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    rank = ordered(logits)
    wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])
    least = _largest(lambda t: jnp.sum(rank >= t[:, None], axis=-1) >= wanted, logits.shape[0])
    logits = jnp.where(rank >= least[:, None], logits, -jnp.inf)
    share = jax.nn.softmax(logits, axis=-1)
    bits = ordered(share)
    least = _largest(lambda t: jnp.sum(jnp.where(bits >= t[:, None], share, 0.0), axis=-1) >= top_p, logits.shape[0])
    return jnp.where((bits >= least[:, None]) | (top_p >= 1), logits, -jnp.inf)


def _largest(holds: Callable[[Array], Array], rows: int) -> Int[Array, "rows"]:
    """Find for each row the largest int32 that a condition holds for, which holds up to some number and then not.

    Where it holds nowhere: the smallest int32.
    """
    limits = jnp.iinfo(jnp.int32)
    low, high = jnp.full(rows, limits.min, jnp.int32), jnp.full(rows, limits.max, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        held = holds(middle)
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]
