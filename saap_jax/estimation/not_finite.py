"""Where a pass went wrong: the statistic, the place in the model and the example of a value that is not finite.

A pass pays for one look at each statistic; the search for the example runs only when something was found.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from saap_jax.estimation.base import Batch, Statistic, Statistics
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import segment_bounds
from saap_jax.runtime.finite import first_not_finite, leaves_by_path
from saap_jax.runtime.gather import fetched

POINTS = ("attention_in", "attention", "attention_out", "mlp_in", "mlp", "mlp_out")
"""Points of a layer in the order of the forward pass."""

ADVICE = "check the model's weights and its dtype"


def refuse_not_finite(
    statistics: Statistics, model: Llama, batches: Sequence[Batch], alone: Callable[[int, Statistic], Any]
) -> None:
    """Raise ValueError where a loss or a statistic is not finite.

    `alone(example, statistic)` observes one example, to find the one that a sum does not show.
    """
    wrong = np.flatnonzero(~np.isfinite(fetched(statistics.losses)))
    if len(wrong):
        batch, row = divmod(int(wrong[0]), len(batches[0][0]))
        place = first_activation(model, jnp.asarray(batches[batch][0][row : row + 1]))
        raise ValueError(
            f"calibration: the loss of {len(wrong)} examples is not finite, the first is example {wrong[0]}, "
            f"where it starts in {place}; {ADVICE}"
        )
    for statistic, value in statistics.values.items():
        if (path := first_not_finite(value)) is None:
            continue
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(fetched(leaves_by_path(value)[path])))[0])
        example = _example(statistic, path, index, int(statistics.examples), alone)
        raise ValueError(
            f"calibration: the {statistic.name.replace('_', ' ')} of {_place(statistic, path, index, model)} "
            f"is not finite{'' if example is None else f' on example {example}'}; {ADVICE}"
        )


def first_activation(model: Llama, tokens: Int[Array, "1 seq"]) -> str:
    """Return the first point of the forward pass whose activation is not finite, in words."""
    for bounds, segment in zip(segment_bounds(model.segments), _finite_points(model, tokens), strict=True):
        for layer in range(bounds.stop - bounds.start):
            for point in POINTS:
                if not bool(segment[point][layer]):
                    return f"{point} of layer {bounds.start + layer}"
    return "the logits"


@jax.jit
def _finite_points(model: Llama, tokens: Int[Array, "1 seq"]) -> list[dict[str, Array]]:
    """Return, for each segment, which points are finite in each layer."""
    return model.hidden(tokens, observe=lambda _, activation: jnp.all(jnp.isfinite(activation)))[1]


def _place(statistic: Statistic, path: str, index: tuple[int, ...], model: Llama) -> str:
    """Say in words which parameter or unit of which layer an entry of a statistic belongs to."""
    in_segment = re.fullmatch(r"segments/(\d+)/(.+)", path)
    if in_segment:
        return f"{in_segment[2]} in layer {segment_bounds(model.segments)[int(in_segment[1])].start + index[0]}"
    axes = dict(zip(statistic.axes(path), index, strict=False))
    if not axes:
        return path
    unit = f" unit {axes['units']}" if "units" in axes else ""
    return f"{path.rpartition('/')[2]}{unit} in layer {axes['layers']}"


def _example(
    statistic: Statistic, path: str, index: tuple[int, ...], examples: int, alone: Callable[[int, Statistic], Any]
) -> int | None:
    """Return the first example that shows the entry by itself, None where none does: the sum was too large."""
    axes = statistic.axes(path)
    if axes[:1] == ("examples",):
        return index[0]
    single = [axis not in ("layers", "units") for axis in axes]  # one probe, one microbatch is observed again
    entry = (*(0 if one else place for one, place in zip(single, index, strict=False)), *index[len(axes) :])
    for example in range(examples):
        if not bool(jnp.isfinite(leaves_by_path(alone(example, statistic))[path][entry])):
            return example
    return None
