"""Stage 4: what a model may take, as targets that a search can meet: sizes counted from widths, times from a table.

The table has the times of sub-blocks at a few widths, of which those of a model of any widths are made. A layer's
attention and its MLP are timed inside whole models of equal layers in which the other one is empty:
t(width) = (time of that model - time of the model without any) / layers. There are as many layers as it takes for their
weights to come from memory and not from the cache, as in a real model. A model's time is then

    T = scale · (T_empty + Σ_l t_attention(kv_heads_l) + Σ_l t_mlp(channels_l)),

times between measured widths interpolated linearly, and `scale` such that the unpruned model gets the time that was
measured for it in the same rounds. All models take turns, and medians count.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.config.checks import read_bound
from saap_jax.config.method import TARGETS, TargetsConfig
from saap_jax.evaluation.cost import prefill_macs, weight_bytes
from saap_jax.evaluation.timing import Programs, Times, Workload, compile_programs, spread, time_in_turns
from saap_jax.llama import LayerWidths, Llama, LlamaSpec, abstract_llama, random_llama
from saap_jax.llama.decoder import cache_bytes
from saap_jax.llama.generate import decoder_of, rounded
from saap_jax.structures import count_parameters

ENOUGH = 256 * 2**20
"""Bytes of weights that the equal layers of a timed model take, unless the given model has not as many layers."""

FEWEST = 2
"""Layers of a timed model, at least."""

POINTS = 4
"""Widths of a structure that are timed, beside none."""

NEW = 9
"""Tokens that are generated behind each prompt when a step is timed: the first is part of reading."""

TIMED = ("latency", "tokens_per_second")
"""Targets that are measured on the device."""

Progress = Callable[[Sequence[int]], Iterable[int]]


class Phase(NamedTuple):
    """Seconds of one phase: reading the prompts, or a step that generates a token of each row."""

    empty: float
    """Of a model without any sub-block: embedding, norm, unembedding."""
    attention: tuple[float, ...]
    """Of one layer's attention, a number for each of `LatencyTable.kv_heads`."""
    mlp: tuple[float, ...]
    scale: float
    """Measured over summed, of the unpruned model."""


class LatencyTable(NamedTuple):
    """What was measured, for one workload on one device."""

    workload: Workload
    device: str
    kv_heads: tuple[int, ...]
    """Widths at which attention was timed, ascending from 0."""
    mlp_widths: tuple[int, ...]
    reading: Phase
    step: Phase

    def seconds(self, phase: Phase, spec: LlamaSpec) -> float:
        """The time of a phase of a model of other widths."""
        parts = [
            np.interp(layer.kv_heads, self.kv_heads, phase.attention) + np.interp(layer.mlp, self.mlp_widths, phase.mlp)
            for layer in spec.layers
        ]
        return phase.scale * (phase.empty + float(np.sum(parts)))

    def latency(self, spec: LlamaSpec) -> float:
        """The seconds that a model of these widths takes to read the prompts."""
        return self.seconds(self.reading, spec)

    def tokens_per_second(self, spec: LlamaSpec) -> float:
        """The tokens that it generates, all rows together."""
        return self.workload.batch / self.seconds(self.step, spec)


def measure_table(model: Llama, workload: Workload, *, repeats: int = 5, progress: Progress = iter) -> LatencyTable:
    """Time the sub-blocks of models shaped like this one; one more model is the given one itself.

    Raises:
        ValueError: the workload does not fit the model's positions.
    """
    spec, dtype = model.spec, model.embedding.dtype

    def most(name: str) -> int:
        return max(getattr(layer, name) or 0 for layer in spec.layers)

    widest = LayerWidths(
        kv_heads=most("kv_heads"), q_per_kv=most("q_per_kv"), mlp=most("mlp"), channels=most("channels") or None
    )
    kv_heads, mlp = (
        tuple(sorted({round(width * part / POINTS) for part in range(POINTS + 1)}))
        for width in (widest.kv_heads, widest.mlp)
    )
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
        # of one layer, from those of whole models; never less at a larger width
        each = [max(0.0, (second - seconds[0]) / count) for second, count in zip(seconds, layers, strict=True)]
        end = len(kv_heads)
        attention, of_mlp = (tuple(np.maximum.accumulate([0.0, *of]).tolist()) for of in (each[1:end], each[end:]))
        made = Phase(seconds[0], attention, of_mlp, 1.0)
        summed = LatencyTable(workload, "", kv_heads, mlp, made, made).seconds(made, spec)
        return made._replace(scale=spread(pick(each) for each in whole).median / summed)

    device = jax.devices()[0].device_kind
    return LatencyTable(workload, device, kv_heads, mlp, phase(lambda t: t.prefill), phase(lambda t: t.step))


def layers_of(spec: LlamaSpec, shape: LayerWidths, dtype: Any) -> int:
    """Count the layers whose weights fill `ENOUGH`: at least `FEWEST`, at most as many as the model has."""
    heads = 2 * shape.kv_heads * (shape.q_per_kv + 1) * spec.head_dim
    layer = spec.embed * (heads + 3 * shape.mlp_channels) * jnp.dtype(dtype).itemsize
    return max(FEWEST, min(len(spec.layers), math.ceil(ENOUGH / max(layer, 1))))


def measured(models: Sequence[Programs], repeats: int, progress: Progress = iter) -> list[tuple[float, float]]:
    """Take the seconds of reading, and the tokens a second, of models that take turns; medians."""
    found = []
    for program, times in zip(models, time_in_turns(models, repeats, progress=progress), strict=True):
        step = spread(each.step for each in times).median
        found.append((spread(each.prefill for each in times).median, program.workload.batch / step))
    return found


# --- targets -----------------------------------------------------------------------------------------


class Target(NamedTuple):
    """One thing that a pruned model may take."""

    name: str
    asked: str
    """As it was asked for."""
    limit: float
    """In parameters, multiply-accumulates, bytes, seconds or tokens a second."""

    def holds(self, value: float) -> bool:
        """Tell whether a value is within the limit."""
        return value >= self.limit if self.name == "tokens_per_second" else value <= self.limit


class Costs(NamedTuple):
    """What is needed to tell the costs of models of other widths than the one that was measured."""

    config: TargetsConfig
    dtype: Any
    table: LatencyTable | None
    """None where no target is about time."""
    temporaries: int
    """Bytes that the unpruned model's programs hold beside weights and cache; 0 where no target is about memory."""

    def of(self, spec: LlamaSpec) -> dict[str, float]:
        """What a model of these widths takes, for each target.

        Memory is that of its weights and cache beside the temporaries of the unpruned model: at most too high, since
        those of a smaller model are no larger.
        """
        model, table = abstract_llama(spec, self.dtype), self.table
        takes: dict[str, Callable[[], float]] = {
            "parameters": lambda: count_parameters(model),
            "macs": lambda: prefill_macs(model, self.config.batch, self.config.length),
            "weight_bytes": lambda: weight_bytes(model),
            "peak_memory": lambda: held_bytes(model, self.config) + self.temporaries,
        }
        if table is not None:
            takes |= {
                "latency": lambda: table.latency(spec),
                "tokens_per_second": lambda: table.tokens_per_second(spec),
            }
        return {name: float(takes[name]()) for name in self.config.asked}


def workload_of(config: TargetsConfig) -> Workload:
    """Describe what is timed: `NEW` tokens are generated behind each prompt."""
    return Workload(config.batch, config.length, NEW)


def held_bytes(model: Llama, config: TargetsConfig) -> int:
    """Count the bytes of weights and cache."""
    return weight_bytes(model) + cache_bytes(model, config.batch, rounded(rounded(config.length) + NEW))


def temporaries_of(programs: Programs, config: TargetsConfig) -> int:
    """Count the bytes that a model's programs hold beside weights and cache; ValueError where no compiler tells."""
    if programs.memory_bytes is None:
        raise ValueError("targets.peak_memory: expected the compiler's account of memory, got none on this device")
    return max(0, programs.memory_bytes - held_bytes(programs.model, config))


def targets_of(config: TargetsConfig, dense: Mapping[str, float]) -> list[Target]:
    """List the targets with their limits as amounts; percentages are those of the unpruned model's costs."""
    targets = []
    for name, asked in config.asked.items():
        bound = read_bound(f"targets.{name}", asked, *TARGETS[name])
        limit = bound.value * dense[name] / 100 if bound.unit == "percent" else bound.value
        targets.append(Target(name, asked, limit))
    return targets
