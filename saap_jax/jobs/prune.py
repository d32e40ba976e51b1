"""One pruned model: what `saap prune` runs, to a ratio or to what the model may take."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.method import CalibrationConfig, TargetsConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import MethodConfig
from saap_jax.evaluation.cost import directory_bytes
from saap_jax.evaluation.latency import measure_table, measured
from saap_jax.evaluation.targets import TIMED, Costs, Target, targets_of, temporaries_of, workload_of
from saap_jax.evaluation.timing import compile_programs
from saap_jax.jobs import origins
from saap_jax.jobs.candidates import key_of
from saap_jax.jobs.chosen import calibration_of, ratio_of, smallest
from saap_jax.jobs.job import lengths_of
from saap_jax.jobs.judged import Judged, judge, judged_rows, texts_of
from saap_jax.jobs.written import NEW_TOKENS, written_by
from saap_jax.llama import Llama
from saap_jax.llama.attention import attending
from saap_jax.llama.generate import decoder_of
from saap_jax.llama.spec import LlamaSpec
from saap_jax.recovery import check_group_size
from saap_jax.runs.cache import Cache
from saap_jax.runs.commands import ATTENTION, commands_after
from saap_jax.runs.directory import plain
from saap_jax.runs.origin import figures_of
from saap_jax.runs.records import WrittenText
from saap_jax.runtime.digests import provenance
from saap_jax.runtime.files import held
from saap_jax.runtime.mesh import Layout, layout_of_job
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.remote import staged
from saap_jax.runtime.words import signed
from saap_jax.steps.allocation.allocation import selection_of
from saap_jax.steps.allocation.search import Selection
from saap_jax.steps.chain import Chain, parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.base import Subject
from saap_jax.subjects.llama import CutLlama, LlamaSubject
from saap_jax.subjects.opened import open_subject
from saap_jax.surgery.cut import pruned_spec
from saap_jax.trace.subject.pruned import checked_losses, own_code
from saap_jax.trace.subject.subject import CutTraced, TracedSubject

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


class Pruned(NamedTuple):
    """What `prune` did."""

    selection: Selection
    parameters: tuple[int, int]
    """Before and after."""
    bytes: tuple[int, int]
    """Of the weights in memory before, of the saved file after."""
    segments: int
    """Stretches of equal layers, each compiled once."""
    told: Mapping[str, Any]
    """What the steps of the chain report: `corrections`, `scaled`, `divergences`, `price`."""
    reached: Sequence[Reached]
    """The targets that were asked for."""
    structures: tuple[tuple[str, int, int, int], ...] = ()
    """Name, copies, units before and after of each structure of a traced model."""
    losses: Mapping[str, float] = MappingProxyType({})
    """Mean held-out loss of a traced model: `dense`, `masked`, `cut`."""
    own_code: str = ""
    """What the own code of a traced model does with the smaller parameters."""
    seconds: Mapping[str, float] = MappingProxyType({})
    """What choosing and repairing took."""
    unrepaired: Mapping[str, str] = MappingProxyType({})
    """Structures that lost units and that repairs left as they are, and why."""
    judged: Judged | None = None
    """Perplexity and speed of both models, where they were asked for."""
    written: Sequence[WrittenText] = ()
    """What both models write, where they were judged."""
    further: Sequence[str] = ()
    """Commands that take the model from here, without the `saap` before them."""


def prune(config: PruneConfig, *, track: Track = quiet) -> Pruned:
    """Prune a model by a chain, to a ratio or as little as its targets allow, and save it as a directory.

    With targets, the directory holds `targets.json`: what was asked and reached, and the table of sub-block times.

    Raises:
        ValueError: bad input, a ratio that the chain cannot meet, or targets that it cannot.
    """
    chain = parse(config.method)
    with staged(config.out) as out, held(out, f"out: {out}"), attending(config.model.attention):
        if broadcast(out.exists):
            raise ValueError(f"out: expected a directory that does not exist yet, found {out}; choose another --out")
        return _prune(config, chain, out, track)


def _prune(config: PruneConfig, chain: Chain, out: Path, track: Track) -> Pruned:
    """Do what `prune` does, into a directory that nobody else writes."""
    calibration = calibration_of(config.from_run, config.model.name) if config.from_run else config.calibration
    layout = _layout(config, calibration)
    with step(track, "load the model"):
        subject = open_subject(config.model, layout=layout, lengths=lengths_of(config))
    origin = origins.origin_of(config.model.name)
    scenarios = subject.scenarios(calibration)
    texts = texts_of(config, subject, calibration.scenarios)
    if isinstance(subject, LlamaSubject):
        subject.words  # noqa: B018  a tokenizer that is not there is refused before any time is spent
    runner = Runner(
        subject, scenarios, [chain], key=key_of(subject, scenarios), cache=_cache(config),
        batch_size=calibration.batch_size, remat=config.remat, track=track, open_end=bool(config.targets.asked),
    )  # fmt: skip
    runner.check(chain, [] if config.targets.asked else [ratio_of(config)])
    costs, targets = _asked(config, subject, track)
    times, ratio = [time.perf_counter()], ratio_of(config)
    if targets and costs is not None:
        assert isinstance(subject, LlamaSubject)
        spec = subject.model.spec
        _, ratio = smallest(runner, chain, config.ratio or 0.0, lambda keep: costs.of(pruned_spec(spec, keep)), targets)
    chosen = runner.choose(chain, ratio)
    times.append(time.perf_counter())
    state = runner.run(chain, ratio)
    times.append(time.perf_counter())
    selection = selection_of(subject, chosen.keep, ratio)
    cut = state.subject.cut(state.keep)
    reached = _reached(cut, subject, costs, targets, track)
    judged = judge(subject, cut, texts, config.evaluation.batch_size, track)
    texts_written = written_by(subject, cut, NEW_TOKENS, track) if judged else []
    losses: Mapping[str, float] = {}
    with step(track, "cut, check and save"):
        if isinstance(cut, CutTraced) and isinstance(subject, TracedSubject):
            losses = checked_losses(subject, selection.keep, cut, calibration.batch_size)
            about = {"factory": config.model.name, "method": config.method, "ratio_asked": selection.asked,
                     "ratio": selection.actual, "held_out_loss": losses}  # fmt: skip
        else:
            about = _about_reached(reached, costs)
        made = origins.pruned(config, chain.written, calibration, selection, (subject.parameters, cut.parameters))
        if judged is not None:
            made["figures"] = figures_of(judged.models)
        if texts_written:
            made["written"] = texts_written
        loader = origins.loader_of_model(cut)
        cut.save(out, selection.keep, about, further=origins.files_of(origin, made, loader, out.name))
    traced = subject.structures if isinstance(subject, TracedSubject) else ()
    return Pruned(
        selection=selection,
        told=state.told,
        parameters=(subject.parameters, cut.parameters),
        bytes=(subject.whole().bytes, broadcast(lambda: directory_bytes(out, "*.safetensors"))),
        segments=cut.segments,
        reached=reached,
        structures=tuple((s.name, s.copies, s.units, int(selection.keep[s.name].sum(1)[0])) for s in traced),
        losses=losses,
        own_code=own_code(cut) if isinstance(cut, CutTraced) else "",
        seconds=dict(zip(("choose units", "make up for what went"), np.diff(times).tolist(), strict=True)),
        unrepaired=chain.unrepaired(subject, selection.keep),
        judged=judged,
        written=texts_written,
        further=further_of(config, cut.model.spec) if isinstance(cut, CutLlama) else (),
    )


def _cache(config: PruneConfig) -> Cache:
    """Return the cache of the runs whose scores are used."""
    return Cache((Path(config.from_run).parent if config.from_run else Path(config.runs)) / ".cache")


def further_of(config: PruneConfig, spec: LlamaSpec) -> tuple[str, ...]:
    """Return commands for what was pruned, with adapters that its widths suit."""
    usual = MethodConfig()
    matrices = ATTENTION if spec.constants.traits.experts else usual.matrices
    try:
        check_group_size(spec, usual.bits, usual.group_size, matrices)
    except ValueError:
        return commands_after(config, spec, groups=False)
    return commands_after(config, spec, groups=True)


def _layout(config: PruneConfig, calibration: CalibrationConfig) -> Layout | None:
    """Check devices against what is asked for; return where arrays lie."""
    layout = layout_of_job(config.mesh, **{"calibration.batch_size": calibration.batch_size})
    if layout is not None and (asked := {*TIMED, "peak_memory"} & set(config.targets.asked)):
        raise ValueError(
            f"targets: expected none that is measured on a mesh of several devices, got {', '.join(sorted(asked))}; "
            "prune to a ratio, or measure on one device"
        )
    return layout


def _about_reached(reached: Sequence[Reached], costs: Costs | None) -> dict[str, Any]:
    """Return the further files of a model of ours that was pruned to targets, by name."""
    if not reached or costs is None:
        return {}
    record = {"reached": [each._asdict() for each in reached], "table": _plain_table(costs), **provenance()}
    return {"targets.json": plain(record)}


# --- targets -------------------------------------------------------------------------------------


def _asked(config: PruneConfig, subject: Subject, track: Track) -> tuple[Costs | None, Sequence[Target]]:
    """Return what the targets need to know, and the targets; of a model of ours, where some are asked for."""
    if not config.targets.asked or not isinstance(subject, LlamaSubject):
        return None, ()
    costs = costs_of(config.targets, subject.model, track)
    return costs, targets_of(config.targets, costs.of(subject.model.spec))


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


def _reached(cut: Any, subject: Subject, costs: Costs | None, targets: Sequence[Target], track: Track) -> list[Reached]:
    """Return what became of the targets of a model of ours."""
    if costs is None or not (isinstance(cut, CutLlama) and isinstance(subject, LlamaSubject)):
        return []
    return reached_by(cut.model, subject.model, costs, targets, track)


def reached_by(
    pruned: Llama, model: Llama, costs: Costs, targets: Sequence[Target], track: Track = quiet
) -> list[Reached]:
    """Return what became of the targets; times and memory are measured anew, the unpruned model taking turns."""
    if not targets:
        return []
    config = costs.config
    predicted, dense = costs.of(pruned.spec), costs.of(model.spec)
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
    def progress(rounds: Iterable[int]) -> Iterator[int]:
        listed = list(rounds)
        return track(doing, listed, len(listed))

    return progress


def _plain_table(costs: Costs) -> dict[str, Any] | None:
    """Return the table of sub-block times as JSON values."""
    if costs.table is None:
        return None
    table = costs.table._asdict()
    return table | {name: table[name]._asdict() for name in ("workload", "reading", "step")}


# --- in words ------------------------------------------------------------------------------------


def summary_rows(pruned: Pruned) -> list[tuple[str, str]]:
    """Return what was done as rows of text."""
    selection = pruned.selection
    rows = [
        ("prunable parameters removed", f"{selection.actual:.2%} (asked {selection.asked:.2%})"),
        ("parameters", "{:,} -> {:,}".format(*pruned.parameters)),
        ("bytes of weights", "{:,} -> {:,}".format(*pruned.bytes)),
    ]
    if pruned.losses:
        rows.append(("held-out loss", f"{pruned.losses['dense']:.4g} -> {pruned.losses['cut']:.4g}"))
    else:
        rows.append(("segments of equal layers", str(pruned.segments)))
    for name, copies, before, after in pruned.structures:
        times = f" in each of {copies} copies" if copies > 1 else ""
        rows.append((f"units of {name}", f"{before} -> {after}{times}"))
    if price := pruned.told.get("price"):
        said = "KL to the unpruned model, nats a token, of free layers and of these, which are alike"
        rows.append((said, "{:.4f} -> {:.4f}".format(*price)))
    if learnt := pruned.told.get("divergences"):
        said = "KL to the unpruned model, nats a token, before and after units were chosen by it"
        rows.append((said, f"{learnt[0]:.4f} -> {min(learnt):.4f}"))
    if corrections := pruned.told.get("corrections"):
        before, after = (np.mean([getattr(each, name) for each in corrections]) for name in ("error", "corrected"))
        places = "matrices" if pruned.structures else "sub-blocks"
        rows.append((f"error of what {len(corrections)} {places} write, before and after repair",
                     f"{before:.1%} -> {after:.1%}"))  # fmt: skip
    for doing, seconds in pruned.seconds.items():
        rows.append((f"seconds to {doing}", f"{seconds:,.0f}"))
    if (scaled := pruned.told.get("scaled")) is not None:
        before, after = scaled.divergences[0], min(scaled.divergences)
        rows.append(("KL to the unpruned model, nats a token, before and after scales", f"{before:.4f} -> {after:.4f}"))
    return rows + (judged_rows(pruned.judged) if pruned.judged else [])


def target_rows(pruned: Pruned) -> list[tuple[str, ...]]:
    """Return asked and reached of each target as rows of text."""
    return [
        (
            each.name,
            f"{'≥' if each.name == 'tokens_per_second' else '≤'} {_amount(each.name, each.limit)} ({each.asked})",
            *(_amount(each.name, value) for value in (each.dense, each.predicted, each.reached)),
            f"{signed(100 * each.off, 1)}%",
        )
        for each in pruned.reached
    ]


def warnings(pruned: Pruned) -> list[str]:
    """Return a line for each target that was missed, or whose prediction was further off than `WITHIN`, and what the
    own code of a traced model does."""
    lines = [pruned.own_code] if pruned.own_code else []
    lines += [f"{name} is not repaired: {reason}" for name, reason in pruned.unrepaired.items()]
    for each in pruned.reached:
        if not each.held:
            reached = _amount(each.name, each.reached)
            lines.append(f"warning: {each.name} {each.asked} was predicted to hold, and what was reached is {reached}")
        if abs(each.off) > WITHIN:
            off = f"{abs(each.off):.0%}, more than {WITHIN:.0%}, off what was measured"
            lines.append(f"warning: the prediction of {each.name} is {off}; is something else running here?")
    return lines


def _amount(name: str, value: float) -> str:
    """Return an amount with its unit.

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
