"""How layers see positions: the angles that heads are turned by, and which positions a token sees.

In most families all layers see them alike. In some, layers apart from the rest have a window or a base of their own
(`Constants.apart`): a pass makes both sights once, and each layer takes its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.segments import SegmentBounds
from saap_jax.llama.spec import Apart, Constants

Rotation = tuple[Float[Array, "*batch seq half"], Float[Array, "*batch seq half"]]
"""Cosine and sine of each position's rotary angles; with a batch axis where rows start at different positions."""


class Sight(NamedTuple):
    """What a layer sees: angles of positions, and which position sees which."""

    rotation: Rotation
    allowed: Bool[Array, "#batch seq seen"] | None
    """Whether position t sees position s, `[b, t, s]`, at least one of them; None stands for s <= t."""
    apart: "Sight | None" = None
    """That of the layers of `Constants.apart`."""

    def of(self, apart: Any) -> "Sight":
        """Return the sight of a layer: `apart` says whether it is one of those, None that there are none.

        It may be an input of a program, as in a loop over layers.
        """
        if self.apart is None or apart is None:
            return self
        if isinstance(apart, bool | np.bool_):
            return self.apart if apart else self._replace(apart=None)
        allowed = [_all_before(each) if each.allowed is None else each.allowed for each in (self.apart, self)]
        rotation = jax.tree.map(lambda own, main: jnp.where(apart, own, main), self.apart.rotation, self.rotation)
        return Sight(rotation, jnp.where(apart, *allowed))


def _all_before(sight: Sight) -> Bool[Array, "1 seq seq"]:
    length = sight.rotation[0].shape[-2]
    return jnp.tril(jnp.ones((length, length), bool))[None]


def sight_of(length: int, head_dim: int, constants: Constants) -> Sight:
    """Return what layers see of a text whose tokens are at 0 … length - 1, those before each and itself."""
    own = None
    if (apart := constants.apart) is not None:
        own = Sight(rotary(length, head_dim, apart), in_window(length, apart.sliding_window))
    return Sight(rotary(length, head_dim, constants), in_window(length, constants.sliding_window), own)


def sight_at(
    positions: Int[Array, "batch seq"], allowed: Bool[Array, "batch seq seq"], head_dim: int, constants: Constants
) -> Sight:
    """Return what layers see of tokens at any positions of which each sees some, those beyond its window excluded."""

    def one(how: Constants | Apart) -> Sight:
        seen = allowed
        if (window := how.sliding_window) is not None and window < positions.shape[1]:
            seen = allowed & (positions[:, :, None] - positions[:, None] < window)
        return Sight(rotary_at(positions, head_dim, how), seen)

    return one(constants)._replace(apart=None if constants.apart is None else one(constants.apart))


def apart_of(constants: Constants, bounds: Sequence[SegmentBounds]) -> list[Bool[np.ndarray, "layers"] | None]:
    """Return for each segment which of its layers are apart from the rest; None where no layer of the model is."""
    if constants.apart is None:
        return [None] * len(bounds)
    return [np.isin(np.arange(each.start, each.stop), constants.apart.layers) for each in bounds]


def in_window(length: int, window: int | None) -> Bool[Array, "1 seq seq"] | None:
    """Return which positions see which where a sliding window w cuts something off: t - w < s <= t; else None."""
    if window is None or window >= length:
        return None
    position = jnp.arange(length)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None]


def rotary(length: int, head_dim: int, how: Constants | Apart) -> Rotation:
    """Cosines and sines of the rotary embedding for positions 0 … length - 1, float32 `[seq, head_dim / 2]`."""
    return rotary_at(jnp.arange(length), head_dim, how)


def rotary_at(positions: Int[Array, "*batch seq"], head_dim: int, how: Constants | Apart) -> Rotation:
    """Cosines and sines of the rotary embedding at any positions, float32 `[*batch, seq, head_dim / 2]`.

    Without a base heads are not turned: all angles are 0. Source: RoFormer (arXiv:2104.09864) in the half-split layout
    of Hugging Face; `llama3` scaling as in Llama 3.1.
    """
    if how.rope_theta is None:
        angle = jnp.zeros((*positions.shape, head_dim // 2), jnp.float32)
        return jnp.cos(angle), jnp.sin(angle)
    frequency = how.rope_theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    scaling = how.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        turns = scaling.original_max_positions * frequency / (2 * jnp.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / scaling.factor)
    angle = positions.astype(jnp.float32)[..., None] * frequency.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of `[batch, seq, ..., head_dim]` by its position's angle, in f32."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    batch = rotation[0].shape[0] if rotation[0].ndim == 3 else 1
    shape = (batch, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = (angle.reshape(shape).astype(wide) for angle in rotation)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
