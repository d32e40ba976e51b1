"""Stage 4: what a model may take, as targets that a search can meet: sizes counted from widths, times from a table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from saap_jax.config.checks import read_bound
from saap_jax.config.method import TARGETS, TargetsConfig
from saap_jax.evaluation.cost import prefill_macs, weight_bytes
from saap_jax.evaluation.latency import LatencyTable
from saap_jax.evaluation.timing import Programs, Workload
from saap_jax.llama import Llama, LlamaSpec, abstract_llama
from saap_jax.llama.decoder import cache_bytes
from saap_jax.llama.generate import rounded
from saap_jax.structures import count_parameters

TIMED = ("latency", "tokens_per_second")
"""Targets that are measured on the device."""


class Target(NamedTuple):
    """One thing that a pruned model may take."""

    name: str
    asked: str
    """As it was asked for."""
    limit: float
    """In parameters, multiply-accumulates, bytes, seconds or tokens a second."""

    def holds(self, value: float) -> bool:
        """Return whether a value is within the limit."""
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
        """Return what a model of these widths takes, for each target.

        Memory is that of its weights and cache beside the temporaries of the unpruned model: at most too high, since
        those of a smaller model are no larger.
        """
        model = abstract_llama(spec, self.dtype)
        batch, length = self.config.batch, self.config.length
        found: dict[str, float] = {}
        for name in self.config.asked:
            match name:
                case "parameters":
                    found[name] = count_parameters(model)
                case "macs":
                    found[name] = prefill_macs(model, batch, length)
                case "weight_bytes":
                    found[name] = weight_bytes(model)
                case "peak_memory":
                    found[name] = held_bytes(model, self.config) + self.temporaries
                case "latency" | "tokens_per_second":
                    assert self.table is not None
                    timed = self.table.latency if name == "latency" else self.table.tokens_per_second
                    found[name] = timed(spec)
        return {name: float(value) for name, value in found.items()}


def workload_of(config: TargetsConfig) -> Workload:
    """Return what is timed: `NEW` tokens are generated behind each prompt."""
    return Workload(config.batch, config.length, NEW)


NEW = 9
"""Tokens that are generated behind each prompt when a step is timed: the first is part of reading."""


def held_bytes(model: Llama, config: TargetsConfig) -> int:
    """Return the bytes of weights and cache."""
    return weight_bytes(model) + cache_bytes(model, config.batch, rounded(rounded(config.length) + NEW))


def temporaries_of(programs: Programs, config: TargetsConfig) -> int:
    """Return the bytes that a model's programs hold beside weights and cache.

    Raises:
        ValueError: the device's compiler tells no memory.
    """
    if programs.memory_bytes is None:
        raise ValueError("targets.peak_memory: expected the compiler's account of memory, got none on this device")
    return max(0, programs.memory_bytes - held_bytes(programs.model, config))


def targets_of(config: TargetsConfig, dense: Mapping[str, float]) -> list[Target]:
    """Return the targets with their limits as amounts; percentages are those of the unpruned model's costs."""
    targets = []
    for name, asked in config.asked.items():
        bound = read_bound(f"targets.{name}", asked, *TARGETS[name])
        limit = bound.value * dense[name] / 100 if bound.unit == "percent" else bound.value
        targets.append(Target(name, asked, limit))
    return targets
