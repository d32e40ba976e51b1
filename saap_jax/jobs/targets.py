"""Targets of `saap prune`: what they need to know, the smallest ratio that meets them, and what came of it."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from saap_jax.config.method import TargetsConfig
from saap_jax.evaluation.targets import TIMED, Costs, Target, measure_table, measured, temporaries_of, workload_of
from saap_jax.evaluation.timing import compile_programs
from saap_jax.llama import Llama
from saap_jax.llama.generate import decoder_of
from saap_jax.runtime.digests import provenance
from saap_jax.runtime.files import plain
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.words import signed
from saap_jax.steps.allocation.allocation import TOLERANCE
from saap_jax.steps.base import State
from saap_jax.steps.chain import Chain
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import pruned_spec

WITHIN = 0.1
"""How far what is measured of a pruned model may be from what the table of sub-block times said of it."""


class Reached(NamedTuple):
    """A target, and what came of it."""

    name: str
    asked: str
    limit: float
    dense: float
    """Of the unpruned model: counted, or measured beside the pruned one."""
    predicted: float
    """Of the pruned model, when its units were chosen."""
    reached: float
    """Of the pruned model: counted, or measured."""
    held: bool
    """True where `reached` is within the limit."""

    @property
    def off(self) -> float:
        """How far the prediction was from what was reached, as a share of that."""
        return self.predicted / self.reached - 1 if self.reached else math.inf


def costs_of(config: TargetsConfig, model: Llama, track: Track = quiet) -> Costs:
    """Measure what the targets need to know: sub-block times, and the memory of the unpruned model's programs."""
    table, temporaries = None, 0
    if set(TIMED) & set(config.asked):
        rounds = _rounds("time sub-blocks", track)
        table = measure_table(model, workload_of(config), repeats=config.repeats, progress=rounds)
    if "peak_memory" in config.asked:
        with step(track, "compile the unpruned model"):
            temporaries = temporaries_of(compile_programs(decoder_of(model), workload_of(config)), config)
    return Costs(config, model.embedding.dtype, table, temporaries)


def smallest(
    runner: Runner, chain: Chain, least: float, costs: Costs, targets: Sequence[Target]
) -> tuple[State, float]:
    """Choose the units to keep at the smallest ratio, to `TOLERANCE`, at which all targets hold; and that ratio.

    Found by bisection, since each target is met the better the more goes. Rounds on the way are run once.

    Raises:
        ValueError: targets that do not hold at the largest ratio that the chain can meet, or a refinement, whose
            outcome has other widths than those that met them.
    """
    if other := next((each for each in chain.steps if each.kind == "refinement"), None):
        raise ValueError(
            f"targets: expected no {other.name} beside them: what comes of it has other widths than those that met "
            "them; leave one of the two out"
        )
    top = runner.most_removable(chain)
    if least > top:
        raise ValueError(f"ratio: expected at most {top:.4f}, the largest that the chain can meet, got {least}")

    assert isinstance(runner.subject, LlamaSubject)
    spec = runner.subject.model.spec

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
    low, high = least, top
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        tried = runner.choose(chain, middle)
        if missed(tried):
            low = middle
        else:
            high, state = middle, tried
    return state, high


def reached_by(
    pruned: Llama, model: Llama, costs: Costs, targets: Sequence[Target], track: Track = quiet
) -> list[Reached]:
    """Tell what became of the targets; times and memory are measured anew, the unpruned model taking turns."""
    config, predicted, dense = costs.config, costs.of(pruned.spec), costs.of(model.spec)
    now, before = dict(predicted), dict(dense)
    if {*TIMED, "peak_memory"} & set(config.asked):
        programs = [compile_programs(decoder_of(each), workload_of(config)) for each in (model, pruned)]
        if "peak_memory" in config.asked:
            for each, program in ((before, programs[0]), (now, programs[1])):
                each["peak_memory"] = float(program.memory_bytes or math.nan)
        if set(TIMED) & set(config.asked):
            times = measured(programs, config.repeats, _rounds("time the pruned model", track))
            for each, (latency, speed) in zip((before, now), times, strict=True):
                each |= {name: {"latency": latency, "tokens_per_second": speed}[name] for name in TIMED if name in each}
    return [
        Reached(t.name, t.asked, t.limit, before[t.name], predicted[t.name], now[t.name], t.holds(now[t.name]))
        for t in targets
    ]


def _rounds(doing: str, track: Track) -> Callable[[Iterable[int]], Iterator[int]]:
    return lambda rounds: track(doing, listed := list(rounds), len(listed))


def targets_record(reached: Sequence[Reached], costs: Costs) -> dict[str, Any]:
    """Make `targets.json`: what was asked and reached, and the table of sub-block times."""
    table = None
    if costs.table is not None:
        table = costs.table._asdict()
        table |= {name: table[name]._asdict() for name in ("workload", "reading", "step")}
    return plain({"reached": [each._asdict() for each in reached], "table": table, **provenance()})


# --- in words ------------------------------------------------------------------------------------


def target_rows(reached: Sequence[Reached]) -> list[tuple[str, ...]]:
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


def target_warnings(reached: Sequence[Reached]) -> list[str]:
    """Write a line for each target that was missed, or whose prediction was further off than `WITHIN`."""
    lines = []
    for each in reached:
        if not each.held:
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
        case "weight_bytes" | "peak_memory":
            return f"{value / 2**20:.4g} MiB"
        case "macs":
            return f"{value / 1e9:.3g}G"
        case _:
            return f"{value / 1e6:.4g}M"
