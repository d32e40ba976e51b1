"""How layers see positions: the angles that heads are turned by, and which positions a token sees.

In most families all layers see them alike. In some, layers apart from the rest have a window or a base of their own
(`Constants.apart`): a pass makes both sights once, and each layer takes its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.segments import SegmentBounds
from saap_jax.llama.spec import Apart, Constants

Rotation = tuple[Float[Array, "*batch seq half"], Float[Array, "*batch seq half"]]
"""Cosine and sine of each position's rotary angles; with a batch axis where rows start at different positions."""


class Seen(NamedTuple):
    """Which positions of a row its tokens see: their own and those before, of their own text and within a window.

    A rule, because the matrix of a long row is large, 64 MiB for 8,192 tokens, and only some rows of it are asked for.
    """

    length: int
    """Tokens of the row."""
    window: int | None = None
    """Positions that a token sees, its own among them; None for all."""
    apart: tuple[Bool[Array, ""], int | None] | None = None
    """Whether the window is another one, which is known when the program runs, and that one."""
    positions: Int[Array, "batch seq"] | None = None
    """By which windows count; None: by places in the row."""
    segments: Int[Array, "batch seq"] | None = None
    """The text that each token is of; None: all of one."""
    shared: bool = False
    """Whether segment 0 is seen by the texts behind it."""

    def by(self, rows: Int[Array, "some"]) -> Bool[Array, "#batch some seq"]:
        """Return whether the tokens at the places `rows` see each place, at least one of them."""
        place = jnp.arange(self.length)
        seen = (place[None] <= rows[:, None])[None]
        if (window := self._window()) is not None:
            position = place[None] if self.positions is None else self.positions
            seen = seen & (position[:, rows, None] - position[:, None] < window)
        if self.segments is not None:
            same = self.segments[:, rows, None] == self.segments[:, None]
            seen = seen & (same | (self.segments == 0)[:, None] if self.shared else same)
        return seen

    def _window(self) -> Int[Array, ""] | int | None:
        if self.apart is None:
            return self.window
        apart, other = self.apart
        return jnp.where(apart, self.length if other is None else other, self.window or self.length)


class Sight(NamedTuple):
    """What a layer sees: angles of positions, and which position sees which."""

    rotation: Rotation
    seen: Seen | Bool[Array, "#batch seq seen"]
    """A rule; or, with caches, whether token t sees slot s."""
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
        rotation = jax.tree.map(lambda own, main: jnp.where(apart, own, main), self.apart.rotation, self.rotation)
        own, main = self.apart.seen, self.seen
        if not isinstance(own, Seen) and not isinstance(main, Seen):
            return Sight(rotation, jnp.where(apart, own, main))
        assert isinstance(own, Seen)
        assert isinstance(main, Seen)
        return Sight(rotation, main if own.window == main.window else main._replace(apart=(apart, own.window)))


def sight_of(length: int, head_dim: int, constants: Constants) -> Sight:
    """Return what layers see of a text whose tokens are at 0 … length - 1, those before each and itself."""
    return _with_apart(constants, lambda how: Sight(rotary(length, head_dim, how), Seen(length, _window(length, how))))


def packed_sight(
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    head_dim: int,
    constants: Constants,
    *,
    shared: bool,
) -> Sight:
    """Return what layers see of packed rows, see `packed`: tokens at any positions, each of which sees its own segment,
    and if `shared` segment 0.
    """
    length = positions.shape[1]

    def one(how: Constants | Apart) -> Sight:
        seen = Seen(length, _window(length, how), positions=positions, segments=segments, shared=shared)
        return Sight(rotary_at(positions, head_dim, how), seen)

    return _with_apart(constants, one)


def _with_apart(constants: Constants, one: Callable[[Constants | Apart], Sight]) -> Sight:
    return one(constants)._replace(apart=None if constants.apart is None else one(constants.apart))


def _window(length: int, how: Constants | Apart) -> int | None:
    """Return the sliding window w of layers where it cuts something off: t - w < s <= t; else None."""
    window = how.sliding_window
    return None if window is None or window >= length else window


def apart_of(constants: Constants, bounds: Sequence[SegmentBounds]) -> list[Bool[np.ndarray, "layers"] | None]:
    """Return for each segment which of its layers are apart from the rest; None where no layer of the model is."""
    if constants.apart is None:
        return [None] * len(bounds)
    return [np.isin(np.arange(each.start, each.stop), constants.apart.layers) for each in bounds]


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


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which norms, softmax and losses are computed: float32, or float64 for float64 arrays."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of `[batch, seq, ..., head_dim]` by its position's angle, in f32."""
    wide = at_least_float32(x.dtype)
    batch = rotation[0].shape[0] if rotation[0].ndim == 3 else 1
    shape = (batch, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = (angle.reshape(shape).astype(wide) for angle in rotation)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
