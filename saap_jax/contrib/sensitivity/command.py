"""What does each layer's attention and MLP cost, and what follows? What `saap sensitivity` runs.

From one layer and structure at a time the units of the lowest scores go, some shares of them; all these keep-sets are
evaluated by masks, in batches that share the layers in front. What follows for the method is tried at one ratio, as
whole chains with a step more, and suggested where it was better.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from saap_jax.config.jobs import SensitivityConfig
from saap_jax.contrib.sensitivity.page import extreme_table
from saap_jax.contrib.sensitivity.profiles import Shares, changes_of, costs_of, nearest_share, plan_of, predicted
from saap_jax.contrib.suggestions import suggestions_of, trial_options
from saap_jax.evaluation.resample import LEVEL
from saap_jax.jobs.candidates import Candidates, Row, add, begin, candidate_of, record, save_keeps, table_of
from saap_jax.jobs.candidates import choose as choose_units
from saap_jax.jobs.job import check, load, run_job
from saap_jax.jobs.losses import measure
from saap_jax.jobs.racing import counted, measured, run_fields, start_race
from saap_jax.report.pages.common import suggestion_blocks
from saap_jax.report.write import finding_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.progress import Track, quiet
from saap_jax.steps.allocation.allocation import choose
from saap_jax.steps.chain import Chain, allocation_of, chain, parse
from saap_jax.steps.limits import Within
from saap_jax.subjects.base import Subject
from saap_jax.types import Keep, Scores


def sensitivity(config: SensitivityConfig, *, overwrite: bool | None = False, track: Track = quiet) -> RunDirectory:
    """Measure what each place costs, keep the records, and compute suggestions from them.

    Raises:
        ValueError: bad input, or a ratio that the method cannot meet.
    """
    method = parse(config.method)
    layout = check(config)
    first = method.steps[0]
    if first.inner:
        raise ValueError(
            f"method: expected a chain that scores units once, got {method.name}, which chooses between chains; name "
            f"one of them, such as '{first.inner[0].written}'"
        )

    def work(run: RunDirectory) -> None:
        material = load(config, run, layout, track)
        table = table_of(config, run, material, [method], [config.ratio], track)
        (runner,) = table.runners.values()
        race = None
        if config.race:
            race = start_race(table, config.race_margin)
        begin(table, "sensitivity", raced=config.race, method=method.written)
        scores = runner.scored(method).scores
        assert scores is not None
        keeps, about = one_place_each(material.subject, scores, config.fractions)
        table.at_once = min(table.at_once, 1 + len(keeps))
        for name, keep in keeps.items():
            add(table, name, keep)
        with run.stage("evaluate") as stage:
            doing = "evaluate dense model" + " and one place at a time" * (not race)
            measure(table, [DENSE, *([] if race else keeps)], about, doing=doing, stage=stage)
            if race:  # each place with the unpruned model
                fields = [{DENSE: [DENSE], name: [name]} for name in keeps]
                run_fields(race, fields, "race, one place at a time", stage, level=LEVEL / len(keeps))
                for name, each in about.items():
                    record(table, name, each, measured(race, name))
                run.update(raced=counted(race, keeps))
        with run.stage("try"):
            run.update(trials=tried(config, method, table, scores))
        save_keeps(table)
        run.update(suggestions=suggestions_of(run.record, run.candidates()))

    return run_job(config, work, finding_files, overwrite=overwrite, track=track)


def one_place_each(
    subject: Subject, scores: Scores, fractions: Sequence[float]
) -> tuple[dict[str, Keep], dict[str, dict[str, Any]]]:
    """Remove shares of the units of one place at a time; the keep-sets, and what is recorded of each, by name.

    A place is a structure of a layer; of a traced model, whose copies lose as many units each, a whole structure. The
    units of the lowest scores go, of equal ones the first; as many as make up the share, rounded up.
    """
    existing = subject.existing
    limits = subject.limits(Within())
    layers = max(len(units) for units in existing.values())
    if isinstance(limits, Within):
        places = [(layer, name, [layer]) for layer in range(layers) for name in existing]
    else:
        places = [(0, name, list(range(len(units)))) for name, units in existing.items()]
    keeps: dict[str, Keep] = {}
    about: dict[str, Row] = {}
    for layer, structure, groups in places:
        units = int(existing[structure][groups[0]].sum())
        if isinstance(limits, Within):
            most = units
        else:
            most = units - limits[structure].min_keep
        values = np.asarray(scores[structure], np.float64)[:, :units]
        for fraction in sorted(fractions) if units else ():
            gone = min(units, int(np.ceil(units * fraction * (1 - 1e-12))))
            if gone > most:  # as of experts, of which some are chosen
                continue
            if isinstance(limits, Within):
                variant = f"layer={layer},{structure}"
            else:
                variant = structure
            kept = existing[structure].copy()
            for group in groups:
                kept[group, np.argsort(values[group], kind="stable")[:gone]] = False
            name = f"{variant}@{fraction:g}"
            keeps[name] = existing | {structure: kept}
            about[name] = {
                "variant": variant, "layer": layer, "structure": structure, "asked": fraction, "actual": gone / units,
                "units": units, "removed": subject.removed(keeps[name]),
            } | ({} if isinstance(limits, Within) else {"among": "all"})  # fmt: skip
    return keeps, about


def tried(config: SensitivityConfig, method: Chain, table: Candidates, scores: Scores) -> list[Row]:
    """Try what may be better than the method at `ratio`, of each kind what is predicted to cost least; evaluate it as a
    comparison does, repaired where the method repairs, and record it."""
    run = table.run
    subject = table.subject
    ratio = config.ratio
    candidates = run.candidates()
    costs = costs_of(run.record, candidates)

    def plan_by(method: Chain) -> Shares:
        """Tell what a method removes by the scores of the whole model, without rounds on the way."""
        made = choose(subject, scores, ratio, *allocation_of(method))
        return plan_of(costs, {structure: kept.sum(axis=1).tolist() for structure, kept in made.keep.items()})

    def changed(option: Row) -> Chain:
        if "allocation" in option:
            other = parse(f"random > {option['allocation']}").steps[-1]
            return chain(*(other if s.kind == "allocation" and not s.runs_prefix else s for s in method.steps))
        given: Row = {name: tuple(value) if isinstance(value, list) else value for name, value in option.items()}
        at = next(number for number, step in enumerate(method.steps) if step.kind == "allocation")
        return chain(*method.steps[:at], Within(**given), *method.steps[at:])

    plain = plan_by(method)
    allocation, limits = allocation_of(method)
    now = dataclasses.asdict(limits) | {"allocation": allocation.name}
    chosen: dict[str, Row] = {}
    for kind, options in trial_options(now, nearest_share(changes_of(run.record, candidates), ratio), plain).items():
        best = predicted(costs, plain)
        for option in options:
            try:
                cost = predicted(costs, plan_by(changed(option)))
            except ValueError:  # a budget that this option cannot meet
                continue
            if cost < best:
                best = cost
                chosen[kind] = option
    chains = {"plain": method} | {kind: changed(option) for kind, option in chosen.items()}
    named = {kind: dataclasses.replace(each, name=f"{method.name},{kind}") for kind, each in chains.items()}
    made = {kind: candidate_of(each, ratio, config.calibration.seed, told=False) for kind, each in named.items()}
    choose_units(table, [*made.values()])
    about = {each.name: each.about for each in made.values()}
    measure(table, [*about], about, doing="evaluate what could be suggested")
    return [
        {"kind": kind, "changes": option, "chain": made[kind].chain.written, "candidate": made[kind].name,
         "instead_of": made["plain"].name} for kind, option in chosen.items()
    ]  # fmt: skip


def shown(config: SensitivityConfig, run: RunDirectory) -> Iterator[Any]:
    """Show what costs most and least, and what follows."""
    yield extreme_table(run.record, run.candidates())
    yield from suggestion_blocks(run.record)
    yield {"report": run.path / "report.html", "beside it": "sensitivity.svg, sensitivity.md, sensitivity.csv"}
