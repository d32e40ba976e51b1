"""One pruned model: what `saap prune` runs, to a ratio or to what the model may take."""

import contextlib
import shlex
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.jobs import PruneConfig
from saap_jax.config.method import CalibrationConfig
from saap_jax.config.recover import MethodConfig
from saap_jax.export.hf import Form, check_form
from saap_jax.export.widths import uniform_widths, width_note
from saap_jax.jobs import origins, targets
from saap_jax.jobs.candidates import fitting, runner_of
from saap_jax.jobs.job import lengths_of
from saap_jax.jobs.judged import NEW_TOKENS, Judged, judge, judged_rows, texts_of, written_by
from saap_jax.jobs.score import calibration_of, read_text
from saap_jax.llama.attention import attending
from saap_jax.llama.spec import LlamaSpec
from saap_jax.recovery import check_group_size
from saap_jax.report.blocks import Code, text_table
from saap_jax.runs.cache import FileCache
from saap_jax.runs.origin import figures_of
from saap_jax.runs.records import WrittenText
from saap_jax.runtime.files import held
from saap_jax.runtime.mesh import Layout, layout_of_job
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Passes, Track, quiet, step
from saap_jax.runtime.remote import staged
from saap_jax.steps.allocation.allocation import Selection, selection_of
from saap_jax.steps.chain import Chain, parse
from saap_jax.subjects.base import Subject
from saap_jax.subjects.llama import CutLlama, LlamaSubject, open_subject
from saap_jax.trace.subject.pruned import checked_losses, own_code
from saap_jax.trace.subject.subject import CutTraced, TracedSubject


class PruneResult(NamedTuple):
    """What `prune` did."""

    selection: Selection
    told: Mapping[str, Any]
    """What the steps of the chain report: `corrections`, `scaled`, `divergences`, `price`."""
    reached: Sequence[targets.Target]
    """What became of the targets that were asked for."""
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
    layout = layout_of_job(config.mesh, **{"calibration.batch_size": calibration.batch_size})
    targets.check(config.targets, chain)
    with staged(config.out) as out, held(out, f"out: {out}"), attending(config.model.attention):
        if broadcast(out.exists):
            raise ValueError(f"out: expected a directory that does not exist yet, found {out}; choose another --out")
        return _prune(config, chain, calibration, layout, out, track)


def _prune(
    config: PruneConfig, chain: Chain, calibration: CalibrationConfig, layout: Layout | None, out: Path, track: Track
) -> PruneResult:
    """Do what `prune` does, into a directory that nobody else writes."""
    with step(track, "load the model"):
        subject = open_subject(config.model, layout=layout, lengths=lengths_of(config))
    origin = origins.origin_of(config.model.name)
    scenarios = read_text(config, subject, calibration)
    texts = texts_of(config, subject, calibration.scenarios)
    if isinstance(subject, LlamaSubject):
        subject.words  # noqa: B018  a tokenizer that is not there is refused before any time is spent
    runs = Path(config.from_run).resolve().parent if config.from_run else Path(config.runs)
    passes = fitting(Passes(calibration.batch_size, config.remat, track), subject, scenarios, chain)
    cache, open_end = FileCache(runs / ".cache"), bool(config.targets.asked)
    runner = runner_of(subject, scenarios, [chain], passes, cache, open_end=open_end)
    ratio = config.ratio or 0.0
    runner.check(chain, [ratio])
    costs, asked = None, ()
    if config.targets.asked and isinstance(subject, LlamaSubject):
        costs = targets.costs_of(config.targets, subject.model, track)
        asked = targets.targets_of(config.targets, costs.of(subject.model.spec))
    clock = [time.perf_counter()]
    runner.begin(chain, ratio or 0.2)
    if costs is not None:
        _, ratio = targets.smallest(runner, chain, ratio, costs, asked)
    chosen = runner.choose(chain, ratio)
    clock.append(time.perf_counter())
    state = runner.run(chain, ratio)
    clock.append(time.perf_counter())
    selection = selection_of(subject, chosen.keep, ratio)
    cut = state.subject.cut(state.keep)
    about: dict[str, Any] = {}
    reached: list[targets.Target] = []
    if costs is not None and isinstance(cut, CutLlama) and isinstance(subject, LlamaSubject):
        reached = targets.reached_by(cut.model, subject.model, costs, asked, track)
        about = {"targets.json": targets.targets_record(reached, costs)}
    judged = judge(config.evaluation, subject, cut, texts, track)
    texts_written = written_by(subject, cut, state, NEW_TOKENS, track) if judged else []
    losses: Mapping[str, float] = {}
    with step(track, "cut, check and save"):
        if isinstance(cut, CutTraced) and isinstance(subject, TracedSubject):
            losses = checked_losses(subject, selection.keep, cut, texts, calibration.batch_size)
            about = {"factory": config.model.name, "method": config.chain, "ratio_asked": selection.asked,
                     "ratio": selection.actual, "held_out_loss": losses}  # fmt: skip
        made = origins.pruned(config, chain.written, calibration, selection, (subject.parameters, cut.parameters))
        if judged is not None:
            made["figures"] = figures_of(judged.models, judged.articles)
        if texts_written:
            made["written"] = texts_written
        cut.save(out, selection.keep, about, further=origins.files_of(origin, made, cut, out.name))
    facts = size_rows(subject, cut, selection, losses)
    facts += told_rows(state.told, "matrices" if isinstance(subject, TracedSubject) else "sub-blocks")
    for doing, taken in zip(("choose units", "make up for what went"), np.diff(clock), strict=True):
        facts.append((f"seconds to {doing}", f"{taken:,.0f}"))
    facts += judged_rows(judged) if judged else []
    note = width_note(cut.model.spec) if isinstance(cut, CutLlama) else own_code(typing.cast(CutTraced, cut))
    notes = [note] if note else []
    notes += [f"{name} is not repaired: {why}" for name, why in chain.unrepaired(subject, selection.keep).items()]
    further = further_of(config, cut.model.spec) if isinstance(cut, CutLlama) else ()
    return PruneResult(selection, state.told, reached, judged, texts_written, facts, notes, further)


def further_of(config: PruneConfig, spec: LlamaSpec) -> list[str]:
    """List commands that compare, recover and export what was pruned, with adapters that its widths suit."""
    out, dense, usual = shlex.quote(config.out.rstrip("/")), shlex.quote(config.model.name), MethodConfig()
    mixture = spec.constants.traits.experts
    matrices = ("query", "key", "value", "output") if mixture else usual.matrices
    recover = f"recover {out} --dense {dense}" + f" --method.matrices {' '.join(matrices)}" * mixture
    try:
        check_group_size(spec, usual.bits, usual.group_size, matrices)
    except ValueError:
        recover += " --method.name lora"
    fits: list[str] = []
    for form in typing.get_args(Form):
        with contextlib.suppress(ValueError):
            check_form(spec, form)
            fits += [form] if form != "padded" or uniform_widths(spec) else []
    return [f"ab {out} {dense}", recover, *(f"export {out} {out}-hf --format {form}" for form in fits[:1])]


def size_rows(subject: Subject, cut: Any, selection: Selection, losses: Mapping[str, float]) -> list[tuple[str, str]]:
    """Write how much went; `losses` are those of a traced model."""
    rows = [
        ("prunable parameters removed", f"{selection.actual:.2%} (asked {selection.asked:.2%})"),
        ("parameters", f"{subject.parameters:,} -> {cut.parameters:,}"),
        ("bytes of weights in memory", f"{subject.whole().bytes:,} -> {cut.bytes:,}"),
    ]
    if not isinstance(subject, TracedSubject):
        return [*rows, ("segments of equal layers", str(cut.segments))]
    rows.append(("held-out loss", f"{losses['dense']:.4g} -> {losses['cut']:.4g}"))
    for each in subject.structures:
        times = f" in each of {each.copies} copies" if each.copies > 1 else ""
        rows.append((f"units of {each.name}", f"{each.units} -> {int(selection.keep[each.name].sum(1)[0])}{times}"))
    return rows


def told_rows(told: Mapping[str, Any], places: str) -> list[tuple[str, str]]:
    """Write what the steps of a chain report; `places` are those that repairs write to."""
    rows, kl = [], "KL to the unpruned model, nats a token,"
    if chosen := told.get("chosen"):
        rows.append((f"{kl} on held-out text, of {chosen}", f"{min(told['judged']):.4f}"))
    if price := told.get("price"):
        rows.append((f"{kl} of free layers and of these, which are alike", "{:.4f} -> {:.4f}".format(*price)))
    if learnt := told.get("divergences"):
        rows.append((f"{kl} before and after units were chosen by it", f"{learnt[0]:.4f} -> {min(learnt):.4f}"))
    if corrections := told.get("corrections"):
        before, after = (np.mean([getattr(each, name) for each in corrections]) for name in ("error", "corrected"))
        what = f"error of what {len(corrections)} {places} write, before and after repair"
        rows.append((what, f"{before:.1%} -> {after:.1%}"))
    if scaled := told.get("scaled"):
        rows.append((f"{kl} before and after scales", f"{scaled[0]:.4f} -> {min(scaled):.4f}"))
    return rows


def shown(config: PruneConfig, pruned: PruneResult) -> Iterator[Any]:
    """Show what was done, what became of targets, and what comes next."""
    yield text_table(f"{config.chain} at {pruned.selection.asked:.1%}", (), pruned.rows, words=2)
    if pruned.reached:
        header = ("target", "asked", "unpruned", "predicted", "reached", "prediction off")
        yield text_table("", header, targets.target_rows(pruned.reached), words=len(header))
    yield from (Code("", line) for line in pruned.notes + targets.target_warnings(pruned.reached))
    yield {"model": config.out}
    if pruned.further:
        yield Code("", "\n".join(["next:", *(f"  saap {command}" for command in pruned.further)]))
