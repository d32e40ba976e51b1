"""Targets of `saap prune`: what a model may take, the smallest ratio that meets it, and what came of it.

Sizes are counted from widths, times come from a table of the times of sub-blocks at a few widths. A layer's attention
and its MLP are timed inside whole models of equal layers in which the other one is empty:
t(width) = (time of that model - time of the model without any) / layers. There are as many layers as it takes for their
weights to come from memory and not from the cache, as in a real model. A model's time is then

    T = scale · (T_empty + Σ_l t_attention(kv_heads_l) + Σ_l t_mlp(channels_l)),

times between measured widths interpolated linearly, and `scale` such that the unpruned model gets the time that was
measured for it in the same rounds. All models take turns, and medians count.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.checks import read_bound
from saap_jax.config.method import MEASURED, TARGETS, TIMED, TargetsConfig
from saap_jax.evaluation.cost import prefill_macs
from saap_jax.evaluation.timing import Times, Workload, compile_programs, spread, time_in_turns
from saap_jax.llama.decoder import cache_bytes
from saap_jax.llama.generate import decoder_of, rounded
from saap_jax.llama.model import Llama, abstract_llama, random_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec, check_length
from saap_jax.runtime.digests import provenance
from saap_jax.runtime.files import plain
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.words import signed
from saap_jax.steps.allocation.allocation import TOLERANCE
from saap_jax.steps.base import State
from saap_jax.steps.chain import Chain
from saap_jax.steps.run import Runner
from saap_jax.structures.discovery import count_parameters, weight_bytes
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.corrections import Repair
from saap_jax.surgery.cut import pruned_spec

ENOUGH = 256 * 2**20
"""Bytes of weights that the equal layers of a timed model take, unless the given model has not as many layers."""

FEWEST = 2
"""Layers of a timed model, at least."""

POINTS = 4
"""Widths of a structure that are timed, beside none."""

NEW = 9
"""Tokens that are generated behind each prompt when a step is timed: the first is part of reading."""

WITHIN = 0.1
"""How far what is measured of a pruned model may be from what the table of sub-block times said of it."""


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


class Target(NamedTuple):
    """One thing that a pruned model may take, and what came of it."""

    name: str
    asked: str
    """As it was asked for."""
    limit: float
    """In parameters, multiply-accumulates, bytes, seconds or tokens a second."""
    dense: float
    """Of the unpruned model: counted, or measured beside the pruned one."""
    predicted: float = math.nan
    """Of the pruned model, when its units were chosen."""
    reached: float = math.nan
    """Of the pruned model: counted, or measured."""

    def holds(self, value: float) -> bool:
        """Tell whether a value is within the limit."""
        if self.name == "tokens_per_second":
            return value >= self.limit
        return value <= self.limit

    @property
    def off(self) -> float:
        """How far the prediction was from what was reached, as a share of that."""
        if self.reached:
            return self.predicted / self.reached - 1
        return math.inf


class Costs(NamedTuple):
    """What is needed to tell the costs of models of other widths than the one that was measured."""

    config: TargetsConfig
    dtype: Any
    table: LatencyTable | None = None
    """None where no target is about time."""
    temporaries: int = 0
    """Bytes that the unpruned model's programs hold beside weights and cache; 0 where no target is about memory."""

    def of(self, spec: LlamaSpec) -> dict[str, float]:
        """What a model of these widths takes, for each target.

        Memory is that of its weights and cache beside the temporaries of the unpruned model: at most too high, since
        those of a smaller model are no larger.
        """
        model = abstract_llama(spec, self.dtype)
        table = self.table
        takes: dict[str, Callable[[], float]] = {
            "parameters": lambda: count_parameters(model),
            "macs": lambda: prefill_macs(model, self.config.batch, self.config.length),
            "weight_bytes": lambda: weight_bytes(model),
            "memory": lambda: weight_bytes(model) + cache_bytes(model, self.config.batch, self.config.length),
            "peak_memory": lambda: held_bytes(model, self.config) + self.temporaries,
        }
        if table is not None:
            takes |= {
                "latency": lambda: table.latency(spec),
                "tokens_per_second": lambda: table.tokens_per_second(spec),
            }
        return {name: float(takes[name]()) for name in self.config.asked}


def check(config: TargetsConfig, chain: Chain) -> None:
    """Raise ValueError for a refinement beside targets, whose outcome has other widths than those that met them."""
    other = next((each for each in chain.every if each.kind == "refinement"), None)
    if config.asked and other:
        raise ValueError(
            f"targets: expected no {other.name} beside them: what comes of it has other widths than those that met "
            "them; leave one of the two out"
        )


# --- what models take ----------------------------------------------------------------------------


def costs_of(config: TargetsConfig, model: Llama, track: Track = quiet) -> Costs:
    """Measure what the targets need to know: sub-block times, and the memory of the unpruned model's programs.

    Raises:
        ValueError: a target of peak memory where no compiler tells it, or a workload that does not fit the positions.
    """
    check_length(model.spec.constants, config.length, "targets.at")
    table = None
    temporaries = 0
    if TIMED & {*config.asked}:
        table = measure_table(model, workload_of(config), repeats=config.repeats, track=track)
    if "peak_memory" in config.asked:
        with step(track, "compile the unpruned model"):
            programs = compile_programs(decoder_of(model), workload_of(config))
        if programs.memory_bytes is None:
            raise ValueError("targets.peak_memory: expected the compiler's account of memory, got none on this device")
        temporaries = max(0, programs.memory_bytes - held_bytes(programs.model, config))
    return Costs(config, model.embedding.dtype, table, temporaries)


def workload_of(config: TargetsConfig) -> Workload:
    """Describe what is timed: `NEW` tokens are generated behind each prompt."""
    return Workload(config.batch, config.length, NEW)


def held_bytes(model: Llama, config: TargetsConfig) -> int:
    """Count the bytes of weights and cache."""
    return weight_bytes(model) + cache_bytes(model, config.batch, rounded(rounded(config.length) + NEW))


def measure_table(model: Llama, workload: Workload, *, repeats: int = 5, track: Track = quiet) -> LatencyTable:
    """Time the sub-blocks of models shaped like this one; one more model is the given one itself.

    Raises:
        ValueError: the workload does not fit the model's positions.
    """
    spec = model.spec
    dtype = model.embedding.dtype

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
    whole, *parts = time_in_turns(programs, repeats, progress=lambda turns: track("time sub-blocks", turns, len(turns)))

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


# --- what is asked for, and what comes of it -----------------------------------------------------


def targets_of(config: TargetsConfig, dense: Mapping[str, float]) -> list[Target]:
    """List the targets with their limits as amounts; percentages are those of the unpruned model's costs."""
    targets = []
    for name, asked in config.asked.items():
        bound = read_bound(f"targets.{name}", asked, *TARGETS[name])
        if bound.unit == "percent":
            limit = bound.value * dense[name] / 100
        else:
            limit = bound.value
        targets.append(Target(name, asked, limit, dense[name]))
    return targets


def smallest(
    runner: Runner, chain: Chain, least: float, costs: Costs, targets: Sequence[Target]
) -> tuple[State, float]:
    """Choose the units to keep at the smallest ratio, to `TOLERANCE`, at which all targets hold; and that ratio.

    Found by bisection, since each target is met the better the more goes. Rounds on the way are run once.

    Raises:
        ValueError: targets that do not hold at the largest ratio that the chain can meet.
    """
    assert isinstance(runner.subject, LlamaSubject)
    top = runner.most_removable(chain)
    spec = runner.subject.model.spec
    if any(isinstance(each, Repair) and each.biases for each in chain.every):
        spec = dataclasses.replace(spec, output_biases=True)

    def missed(state: State) -> list[str]:
        found = costs.of(pruned_spec(spec, state.keep))
        return [f"{t.name} {t.asked} ({found[t.name]:.4g})" for t in targets if not t.holds(found[t.name])]

    if not missed(state := runner.choose(chain, least)):
        return state, least
    if still := missed(state := runner.choose(chain, top)):
        raise ValueError(
            f"targets: cannot be met by removing {top:.2%} of the prunable parameters, the most that the chain can: "
            f"{', '.join(still)}; ask for less, or relax min_keep, max_ratio, protect, … of `within`"
        )
    low = least
    high = top
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        tried = runner.choose(chain, middle)
        if missed(tried):
            low = middle
        else:
            high = middle
            state = tried
    return state, high


def reached_by(
    pruned: Llama, model: Llama, costs: Costs, targets: Sequence[Target], track: Track = quiet
) -> list[Target]:
    """Tell what became of the targets; times and memory are measured anew, the unpruned model taking turns."""
    config = costs.config
    predicted = costs.of(pruned.spec)
    now = dict(predicted)
    before = costs.of(model.spec)
    if MEASURED & {*config.asked}:
        programs = [compile_programs(decoder_of(each), workload_of(config)) for each in (model, pruned)]
        found: list[dict[str, float]] = [{"peak_memory": float(each.memory_bytes or math.nan)} for each in programs]
        if TIMED & {*config.asked}:
            timed = time_in_turns(
                programs, config.repeats, progress=lambda turns: track("time the pruned model", turns, len(turns))
            )
            for each, times in zip(found, timed, strict=True):
                each["latency"] = spread(time.prefill for time in times).median
                each["tokens_per_second"] = config.batch / spread(time.step for time in times).median
        for each, measured in zip((before, now), found, strict=True):
            each |= {name: measured[name] for name in MEASURED & {*config.asked}}
    return [t._replace(dense=before[t.name], predicted=predicted[t.name], reached=now[t.name]) for t in targets]


def targets_record(reached: Sequence[Target], costs: Costs) -> dict[str, Any]:
    """Make `targets.json`: what was asked and reached, and the table of sub-block times."""
    table = None
    if costs.table is not None:
        table = costs.table._asdict()
        table |= {name: table[name]._asdict() for name in ("workload", "reading", "step")}
    said = [each._asdict() | {"held": each.holds(each.reached)} for each in reached]
    return plain({"reached": said, "table": table, **provenance()})


def target_rows(reached: Sequence[Target]) -> list[tuple[str, ...]]:
    """Write asked and reached of each target."""
    return [
        (
            each.name,
            f"{'≥' if each.name == 'tokens_per_second' else '≤'} {_amount(each.name, each.limit)} ({each.asked})",
            *(_amount(each.name, value) for value in (each.dense, each.predicted, each.reached)),
            f"{signed(100 * each.off, 1)}%",
        )
        for each in reached
    ]


def target_warnings(reached: Sequence[Target]) -> list[str]:
    """Write a line for each target that was missed, or whose prediction was further off than `WITHIN`."""
    lines = []
    for each in reached:
        if not each.holds(each.reached):
            found = _amount(each.name, each.reached)
            lines.append(f"warning: {each.name} {each.asked} was predicted to hold, and what was reached is {found}")
        if abs(each.off) > WITHIN:
            off = f"{abs(each.off):.0%}, more than {WITHIN:.0%}, off what was measured"
            lines.append(f"warning: the prediction of {each.name} is {off}; is something else running here?")
    return lines


def _amount(name: str, value: float) -> str:
    """Write an amount with its unit.

    >>> _amount("latency", 0.0123), _amount("weight_bytes", 3.0 * 2**20), _amount("parameters", 134_515_008.0)
    ('12.3 ms', '3 MiB', '134.5M')
    """
    match name:
        case "latency":
            return f"{1e3 * value:.3g} ms"
        case "tokens_per_second":
            return f"{value:.3g}/s"
        case "weight_bytes" | "memory" | "peak_memory":
            return f"{value / 2**20:.4g} MiB"
        case "macs":
            return f"{value / 1e9:.3g}G"
        case _:
            return f"{value / 1e6:.4g}M"
