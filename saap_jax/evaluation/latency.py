"""Stage 4: how fast a model of any widths is on this device, from a table of sub-block times at a few widths.

A layer's attention and its MLP are timed inside whole models of equal layers in which the other one is empty:
t(width) = (time of that model - time of the model without any) / layers. There are as many layers as it takes for their
weights to come from memory and not from the cache, as in a real model. A model's time is then

    T = scale · (T_empty + Σ_l t_attention(kv_heads_l) + Σ_l t_mlp(channels_l)),

times between measured widths interpolated linearly, and `scale` such that the unpruned model gets the time that was
measured for it in the same rounds. All models take turns, and medians count.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.evaluation.timing import Programs, Times, Workload, compile_programs, spread, time_in_turns
from saap_jax.llama import LayerWidths, Llama, LlamaSpec, random_llama
from saap_jax.llama.generate import decoder_of

ENOUGH = 256 * 2**20
"""Bytes of weights that the equal layers of a timed model take, unless the given model has not as many layers."""

FEWEST = 2
"""Layers of a timed model, at least."""

POINTS = 4
"""Widths of a structure that are timed, beside none."""

Progress = Callable[[Sequence[int]], Iterator[int]]


class Phase(NamedTuple):
    """Seconds of one phase: reading the prompts, or a step that generates a token of each row."""

    empty: float
    """Of a model without any sub-block: embedding, norm, unembedding."""
    attention: tuple[float, ...]
    """Of one layer's attention, a number for each of `LatencyTable.kv_heads`."""
    mlp: tuple[float, ...]
    scale: float
    """Measured over summed, of the unpruned model."""

    def seconds(self, spec: LlamaSpec, table: "LatencyTable") -> float:
        """Return the time of a model of other widths."""
        parts = [
            np.interp(layer.kv_heads, table.kv_heads, self.attention) + np.interp(layer.mlp, table.mlp_widths, self.mlp)
            for layer in spec.layers
        ]
        return self.scale * (self.empty + float(np.sum(parts)))


class LatencyTable(NamedTuple):
    """What was measured, for one workload on one device."""

    workload: Workload
    device: str
    kv_heads: tuple[int, ...]
    """Widths at which attention was timed, ascending from 0."""
    mlp_widths: tuple[int, ...]
    reading: Phase
    step: Phase

    def latency(self, spec: LlamaSpec) -> float:
        """Return the seconds that a model of these widths takes to read the prompts."""
        return self.reading.seconds(spec, self)

    def tokens_per_second(self, spec: LlamaSpec) -> float:
        """Return the tokens that it generates, all rows together."""
        return self.workload.batch / self.step.seconds(spec, self)


def measure_table(model: Llama, workload: Workload, *, repeats: int = 5, progress: Progress = iter) -> LatencyTable:
    """Time the sub-blocks of models shaped like this one; one more model is the given one itself.

    Raises:
        ValueError: the workload does not fit the model's positions.
    """
    spec, dtype = model.spec, model.embedding.dtype
    widest = LayerWidths(
        kv_heads=max(layer.kv_heads for layer in spec.layers),
        q_per_kv=max(layer.q_per_kv for layer in spec.layers),
        mlp=max(layer.mlp for layer in spec.layers),
        channels=max(layer.channels or 0 for layer in spec.layers) or None,
    )
    kv_heads, mlp = points(widest.kv_heads), points(widest.mlp)
    shapes = [dataclasses.replace(widest, kv_heads=k, mlp=0) for k in kv_heads]
    shapes += [dataclasses.replace(widest, kv_heads=0, mlp=width) for width in mlp[1:]]
    layers = [layers_of(spec, shape, dtype) for shape in shapes]
    programs = [compile_programs(decoder_of(model), workload)]
    for shape, count in zip(shapes, layers, strict=True):
        small = random_llama(dataclasses.replace(spec, layers=(shape,) * count), jax.random.key(0), dtype)
        programs.append(compile_programs(decoder_of(small), workload))
    whole, *parts = time_in_turns(programs, repeats, progress=progress)

    def phase(pick: Callable[[Times], float]) -> Phase:
        seconds = [spread(pick(each) for each in times).median for times in parts]
        empty, end = seconds[0], len(kv_heads)
        attention = layer_times(empty, seconds[1:end], layers[1:end])
        made = Phase(empty, attention, layer_times(empty, seconds[end:], layers[end:]), 1.0)
        table = LatencyTable(workload, "", kv_heads, mlp, made, made)
        return made._replace(scale=spread(pick(each) for each in whole).median / made.seconds(spec, table))

    device = jax.devices()[0].device_kind
    return LatencyTable(workload, device, kv_heads, mlp, phase(lambda t: t.prefill), phase(lambda t: t.step))


def points(widest: int) -> tuple[int, ...]:
    """Return the widths that are timed, ascending from 0.

    >>> points(1536), points(3)
    ((0, 384, 768, 1152, 1536), (0, 1, 2, 3))
    """
    return tuple(sorted({round(widest * part / POINTS) for part in range(POINTS + 1)}))


def layers_of(spec: LlamaSpec, shape: LayerWidths, dtype: Any) -> int:
    """Return the number of layers of such widths whose weights fill `ENOUGH`, no more than the model has.

    A model of one layer is timed as `FEWEST` of it.
    """
    heads = 2 * shape.kv_heads * (shape.q_per_kv + 1) * spec.head_dim
    layer = spec.embed * (heads + 3 * shape.mlp_channels) * jnp.dtype(dtype).itemsize
    return max(FEWEST, min(len(spec.layers), math.ceil(ENOUGH / max(layer, 1))))


def layer_times(empty: float, seconds: Sequence[float], layers: Sequence[int]) -> tuple[float, ...]:
    """Return the time of one layer's sub-block at each width, from those of whole models; never less at a larger one.

    >>> layer_times(1.0, [7.0, 4.0, 13.0], [6, 6, 6])
    (0.0, 1.0, 1.0, 2.0)
    """
    each = [max(0.0, (second - empty) / count) for second, count in zip(seconds, layers, strict=True)]
    return (0.0, *np.maximum.accumulate([0.0, *each])[1:].tolist())


def measured(models: Sequence[Programs], repeats: int, progress: Progress = iter) -> list[tuple[float, float]]:
    """Return the seconds of reading, and the tokens a second, of models that take turns; medians."""
    found = []
    for program, times in zip(models, time_in_turns(models, repeats, progress=progress), strict=True):
        step = spread(each.step for each in times).median
        found.append((spread(each.prefill for each in times).median, program.workload.batch / step))
    return found
