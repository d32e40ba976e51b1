"""One pruned model: what `saap prune` runs, to a ratio or to what the model may take."""

import dataclasses
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.jobs import PruneConfig
from saap_jax.config.method import CalibrationConfig
from saap_jax.config.recover import MethodConfig
from saap_jax.data.windows import parse_scenario
from saap_jax.jobs import origins
from saap_jax.jobs.candidates import fitting, runner_of
from saap_jax.jobs.job import lengths_of
from saap_jax.jobs.judged import NEW_TOKENS, Judged, judge, judged_rows, texts_of, written_by
from saap_jax.jobs.score import calibration_of, read_text
from saap_jax.llama.attention import attending
from saap_jax.llama.spec import LlamaSpec
from saap_jax.records import WrittenText
from saap_jax.report.blocks import Code, text_table
from saap_jax.runs.cache import FileCache
from saap_jax.runs.commands import options
from saap_jax.runs.origin import OriginStep, figures_of
from saap_jax.runtime.files import held
from saap_jax.runtime.mesh import Layout, layout_of_job
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Passes, Track, quiet, step
from saap_jax.runtime.remote import staged
from saap_jax.steps.allocation.allocation import Selection, selection_of
from saap_jax.steps.chain import Chain, parse
from saap_jax.subjects.base import Subject
from saap_jax.subjects.llama import LlamaSubject, open_subject
from saap_jax.surgery.cut import width_note
from saap_jax.wings import wing


class PruneResult(NamedTuple):
    """What `prune` did."""

    selection: Selection
    metrics: Mapping[str, Any]
    """What the steps of the chain report: `corrections`, `scaled`, `divergences`, `price`."""
    reached: Sequence[Any]
    """What became of the targets that were asked for, `contrib.targets.Target`."""
    judged: Judged | None
    """Perplexity and speed of both models, where they were asked for."""
    written: Sequence[WrittenText]
    """What both models write, where they were judged."""
    rows: list[tuple[str, str]]
    """All that in words."""
    notes: list[str]
    """That widths suit no accelerator; what the own code of a traced model does with the smaller parameters; what
    repairs left as it is, and why."""
    further: Sequence[str]
    """Commands that take the model from here, without the `saap` before them."""


def prune(config: PruneConfig, *, track: Track = quiet) -> PruneResult:
    """Prune a model by a chain, to a ratio or as little as its targets allow, and save it as a directory.

    With targets, the directory holds `targets.json`: what was asked and reached, and the table of sub-block times.

    Raises:
        ValueError: bad input, a ratio that the chain cannot meet, or targets that it cannot.
    """
    config.check_asked()
    chain = parse(config.chain)
    calibration = calibration_of(config)
    if not config.model.traced:
        for text in calibration.scenarios:  # a source that is unknown is refused before a model is loaded
            parse_scenario(text)
    layout = layout_of_job(config.mesh, **{"calibration.batch_size": calibration.batch_size})
    if config.targets.asked:
        wing("targets").check(config.targets, chain)
    with staged(config.out) as out, held(out, f"out: {out}"), attending(config.model.attention):
        if broadcast(out.exists):
            raise ValueError(f"out: expected a directory that does not exist yet, found {out}; choose another --out")
        return _prune(config, chain, calibration, layout, out, track)


def _prune(
    config: PruneConfig, chain: Chain, calibration: CalibrationConfig, layout: Layout | None, out: Path, track: Track
) -> PruneResult:
    """Do what `prune` does, into a directory that nobody else writes."""
    # Open the model and the text; what is missing is refused before any time is spent.
    with step(track, "load the model"):
        subject = open_subject(config.model, layout=layout, lengths=lengths_of(config))
    llama = subject if isinstance(subject, LlamaSubject) else None
    if llama is not None:
        llama.check_tokenizer()
    origin = origins.origin_of(config.model.name)
    scenarios = read_text(config, subject, calibration)
    texts = texts_of(config, subject, calibration.scenarios)
    runs = Path(config.from_run).resolve().parent if config.from_run else Path(config.runs)
    passes = fitting(Passes(calibration.batch_size, config.remat, track), subject, scenarios, chain)
    has_targets = bool(config.targets.asked)
    runner = runner_of(subject, scenarios, [chain], passes, FileCache(runs / ".cache"), open_end=has_targets)
    ratio = config.ratio or 0.0
    runner.check(chain, [ratio])
    costs = None
    asked: Sequence[Any] = ()
    targets = wing("targets") if has_targets else None
    if targets is not None and llama is not None:
        costs = targets.costs_of(config.targets, llama.model, track)
        asked = targets.targets_of(config.targets, costs.of(llama.model.spec))

    # Score, and choose the units that are kept: at the ratio, or at the smallest one at which all targets hold.
    began = time.perf_counter()
    runner.begin(chain, ratio or 0.2)
    if targets is not None and costs is not None:
        _, ratio = targets.smallest(runner, chain, ratio, costs, asked)
    chosen = runner.choose(chain, ratio)
    selection = selection_of(subject, chosen.keep, ratio)
    seconds = {"choose units": time.perf_counter() - began}

    # Repair what is left, and cut.
    began = time.perf_counter()
    state = runner.run(chain, ratio)
    seconds["make up for what went"] = time.perf_counter() - began
    cut: Any = state.subject.cut(state.keep)

    # Judge the smaller model beside the unpruned one.
    about: dict[str, Any] = {}
    reached: list[Any] = []
    if targets is not None and costs is not None and llama is not None:
        reached = targets.reached_by(cut.model, llama.model, costs, asked, track)
        about = {"targets.json": targets.targets_record(reached, costs)}
    judged = judge(config.evaluation, subject, cut, texts, track)
    texts_written = written_by(subject, cut, state, NEW_TOKENS, track) if judged else []

    # Save it, with all that its card says.
    losses: Mapping[str, float] = {}
    with step(track, "cut, check and save"):
        if llama is None:
            losses = wing("checked_losses")(subject, selection.keep, cut, texts, calibration.batch_size)
            about = {
                "factory": config.model.name,
                "method": config.chain,
                "ratio_asked": selection.asked,
                "ratio": selection.actual,
                "held_out_loss": losses,
            }
        made = origin_step(config, chain.written, calibration, selection, (subject.parameters, cut.parameters))
        if judged is not None:
            made["figures"] = figures_of(judged.models, judged.articles)
        if texts_written:
            made["written"] = texts_written
        cut.save(out, selection.keep, about, further=origins.files_of(origin, made, cut, out.name))

    # Say what was done, and what comes next.
    facts = size_rows(subject, cut, selection, losses)
    facts += metric_rows(state.metrics, "matrices" if llama is None else "sub-blocks")
    facts += [(f"seconds to {doing}", f"{taken:,.0f}") for doing, taken in seconds.items()]
    facts += judged_rows(judged) if judged else []
    note = wing("own_code")(cut) if llama is None else width_note(cut.model.spec)
    notes = [note] if note else []
    notes += [f"{name} is not repaired: {why}" for name, why in chain.unrepaired(subject, selection.keep).items()]
    further = () if llama is None else further_of(config, cut.model.spec)
    return PruneResult(selection, state.metrics, reached, judged, texts_written, facts, notes, further)


def further_of(config: PruneConfig, spec: LlamaSpec) -> list[str]:
    """List commands that compare, recover and export what was pruned, with adapters that its widths suit."""
    out = shlex.quote(config.out.rstrip("/"))
    dense = shlex.quote(config.model.name)
    default = MethodConfig()
    matrices = default.matrices
    recover = f"recover {out} --dense {dense}"
    if spec.constants.traits.experts:
        matrices = ("query", "key", "value", "output")
        recover += f" --method.matrices {' '.join(matrices)}"
    try:
        wing("check_group_size")(spec, default.bits, default.group_size, matrices)
    except ValueError:
        recover += " --method.name lora"
    exports = [f"export {out} {out}-hf --format {form}" for form in wing("forms_of")(spec)]
    return [f"ab {out} {dense}", recover, *exports[:1]]


def size_rows(subject: Subject, cut: Any, selection: Selection, losses: Mapping[str, float]) -> list[tuple[str, str]]:
    """Write how much was removed; `losses` are those of a traced model."""
    rows = [
        ("prunable parameters removed", f"{selection.actual:.2%} (asked {selection.asked:.2%})"),
        ("parameters", f"{subject.parameters:,} -> {cut.parameters:,}"),
        ("bytes of weights in memory", f"{subject.cut(subject.existing).bytes:,} -> {cut.bytes:,}"),
    ]
    if not losses:
        return [*rows, ("segments of equal layers", str(cut.segments))]
    rows.append(("held-out loss", f"{losses['dense']:.4g} -> {losses['cut']:.4g}"))
    for name, existing in subject.existing.items():
        copies, units = existing.shape
        kept = int(selection.keep[name].sum(axis=1)[0])
        times = f" in each of {copies} copies" if copies > 1 else ""
        rows.append((f"units of {name}", f"{units} -> {kept}{times}"))
    return rows


def metric_rows(metrics: Mapping[str, Any], places: str) -> list[tuple[str, str]]:
    """Write what the steps of a chain report; `places` are those that repairs write to."""
    rows = []
    kl = "KL to the unpruned model, nats a token,"
    if chosen := metrics.get("chosen"):
        rows.append((f"{kl} on held-out text, of {chosen}", f"{min(metrics['judged']):.4f}"))
    if price := metrics.get("price"):
        rows.append((f"{kl} of free layers and of these, which are alike", "{:.4f} -> {:.4f}".format(*price)))
    if learnt := metrics.get("divergences"):
        rows.append((f"{kl} before and after units were chosen by it", f"{learnt[0]:.4f} -> {min(learnt):.4f}"))
    if corrections := metrics.get("corrections"):
        before, after = (np.mean([getattr(each, name) for each in corrections]) for name in ("error", "corrected"))
        what = f"error of what {len(corrections)} {places} write, before and after repair"
        rows.append((what, f"{before:.1%} -> {after:.1%}"))
    if scaled := metrics.get("scaled"):
        rows.append((f"{kl} before and after scales", f"{scaled[0]:.4f} -> {min(scaled):.4f}"))
    return rows


def origin_step(
    config: PruneConfig, chain: str, calibration: CalibrationConfig, selection: Selection, parameters: tuple[int, int]
) -> OriginStep:
    """Write the step of `saap prune`; `chain` is the method in full, `parameters` are those before and after."""
    facts = {
        "method": config.chain,
        "chain": chain if chain != config.chain else "",
        "scores": f"of the run {config.from_run}" if config.from_run else "",
        "calibration": origins.calibration_text(calibration, config.model.traced),
        "targets": ", ".join(f"{name} {limit}" for name, limit in config.targets.asked.items()),
    }
    command = " ".join(["saap prune", *options(dataclasses.asdict(config), PruneConfig())])
    ratio = (selection.asked, selection.actual)
    return OriginStep(
        kind="prune", command=command, model=config.model.name, parameters=parameters, ratio=ratio, facts=facts
    )


def shown(config: PruneConfig, pruned: PruneResult) -> Iterator[Any]:
    """Show what was done, what became of targets, and what comes next."""
    yield text_table(f"{config.chain} at {pruned.selection.asked:.1%}", (), pruned.rows, words=2)
    warnings = []
    if pruned.reached:
        header = ("target", "asked", "unpruned", "predicted", "reached", "prediction off")
        yield text_table("", header, wing("targets").target_rows(pruned.reached), words=len(header))
        warnings = wing("targets").target_warnings(pruned.reached)
    yield from (Code("", line) for line in pruned.notes + warnings)
    yield {"model": config.out}
    if pruned.further:
        yield Code("", "\n".join(["next:", *(f"  saap {command}" for command in pruned.further)]))
