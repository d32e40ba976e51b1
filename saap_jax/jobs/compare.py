"""The main job: compare methods on one model, evaluate every candidate by masks; cut and check the best if asked.

A method is a chain of steps; at a ratio, on the calibration text of a seed, it is a candidate. What was scored, chosen
and evaluated is kept as it comes; the same command again does only what is missing.
"""

import dataclasses
import gc
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

from saap_jax.config.jobs import CompareConfig
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs import origins
from saap_jax.jobs.candidates import Candidate, Candidates, begin, candidate_of, choose, save_keeps, table_of
from saap_jax.jobs.job import check, load, run_job
from saap_jax.jobs.judged import TURNS, in_turns, written_by
from saap_jax.jobs.losses import cut, drop_cuts, measure
from saap_jax.llama.files.write import write_further
from saap_jax.records import Row, RunRecord
from saap_jax.report.couplings import coupling_files
from saap_jax.report.pages.common import structure_sentences, subject_sentence, written_section
from saap_jax.runs.commands import command_of, prune_command
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.origin import OriginStep, figures_of
from saap_jax.runs.standing import DENSE, comparison_rows
from saap_jax.runtime.processes import barrier, broadcast
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.steps.chain import expand
from saap_jax.subjects.base import tokens_at_once
from saap_jax.surgery.cut import keep_to_json
from saap_jax.wings import wing


def compare(config: CompareConfig, *, overwrite: bool | None = False, track: Track = quiet) -> RunDirectory:
    """Compare methods: score from one pass a seed, evaluate each candidate by masks; cut and check the best if asked.

    >>> from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
    >>> text = {"calibration": CalibrationConfig(length=16), "evaluation": EvaluationConfig(windows=8, length=16)}
    >>> about = {"model": ModelConfig(name=str(path)), "runs": str(folder), "methods": ("wanda",), "ratios": (0.5,)}
    >>> run = compare(CompareConfig(**about, **text))
    >>> [row["candidate"] for row in run.candidates()]
    ['wanda@0.5']

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    if config.best_ratio is None:
        config = dataclasses.replace(config, best_ratio=config.cut_ratio)  # on record is what was done
    chains = expand(config.methods)
    costs = wing("costs")
    prices = costs.read_prices()  # a wrong amount is refused before any time is spent

    def work(run: RunDirectory) -> None:
        layout = check(config)  # here: a finished run is shown whatever has become of its texts
        seeds = config.seeds_drawn
        material = load(config, run, layout, track, seeds)
        table = table_of(config, run, material, chains, config.ratios, track)
        race = None
        if config.race:
            race = wing("start_race")(table, config.race_margin)

        # Score, from one pass over the calibration text of each seed.
        unrepaired = {chain.name: chain.unrepaired(material.subject) for chain in chains}
        begin(
            table,
            "compare",
            raced=config.race,
            unrepaired={name: reasons for name, reasons in unrepaired.items() if reasons},
        )

        # Choose the units that each candidate keeps.
        candidates = [
            candidate_of(chain, ratio, seed, told=len(seeds) > 1)
            for ratio, chain, seed in itertools.product(config.ratios, chains, seeds)
        ]
        with run.stage("search"):
            choose(table, candidates)
            save_keeps(table)

        # Evaluate the unpruned model and all candidates, all on every window or in a race.
        table.at_once = min(table.at_once, 1 + len(candidates))
        if config.cut:  # the best is chosen among those of the first seed
            table.cuttable = {c.name for c in candidates if (c.ratio, c.seed) == (config.cut_ratio, seeds[0])}
        about = {candidate.name: candidate.about for candidate in candidates}
        with run.stage("evaluate") as stage:
            if race is None:
                measure(table, [DENSE, *about], about, doing="evaluate dense model and candidates", stage=stage)
            else:
                measure(table, [DENSE], about, doing="evaluate dense model", stage=stage)
                wing("race_ratios")(race, config.ratios, candidates, stage)

        # Cut the best one, and check that it is what was evaluated.
        if config.cut:
            rows = comparison_rows(run.record, run.candidates())
            ratio = config.cut_ratio
            label = next(row.label for row in rows if row.asked == ratio and row.candidate != DENSE)
            best = next(each for each in candidates if (each.chain.name, each.ratio) == (label, ratio))
            with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
                _cut_best(config, table, best, track)

        # Say what it cost, and what to try next.
        run.update(cost=costs.run_cost(run.record, prices), couplings=wing("couplings_of")(material.subject))
        run.update(suggestions=wing("suggestions_of")(run.record, run.candidates()))

    return run_job(config, work, lambda run: coupling_files(run.record), overwrite=overwrite, track=track)


def _cut_best(config: CompareConfig, table: Candidates, best: Candidate, track: Track) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    run = table.run
    subject = table.subject
    keep = table.choices[best.name].keep
    row = next(each for each in run.candidates() if each["candidate"] == best.name)
    directory = run.claim("best")
    run.save_json("keep", keep_to_json(keep))
    if run.has("best"):
        loaded = subject.load(directory)
    else:
        place = cut(table, best.name)
        loaded = subject.load(place)
        made = origin_step(config, run.record, row, loaded.parameters)
        state = None
        if not best.chain.repairs:
            state = table.state(best.name)
        texts_written = written_by(subject, loaded, state, config.new_tokens, track)
        if texts_written:
            run.update(written=texts_written)
            made["written"] = texts_written
        origin = origins.origin_of(config.model.name)
        write_further(origins.files_of(origin, made, loaded, run.path.name), place)
        barrier("the cut model was read")
        broadcast(lambda: place.rename(directory).name)
        drop_cuts(table)

    # Measure the loaded model beside the unpruned one, in turns.
    gc.collect()
    whole = subject.cut(subject.existing)
    size = config.evaluation.batch_size
    (first, text), *others = table.material.texts.items()
    (_, judged), turns = in_turns(subject, whole, loaded, text, size, most=TURNS)
    dense_seconds, seconds = map(statistics.median, turns)
    losses = {first: judged} | {name: loaded.losses(text, size) for name, text in others}
    ppl = {name: scale_of(name).value(each.mean) for name, each in losses.items()}

    # A cut model that is not the masked one is a fault of ours.
    for name, value in ppl.items():
        if not abs(value - row["ppl"][name]) <= subject.tolerance * max(abs(row["ppl"][name]), 1e-6):
            raise ValueError(
                f"{directory}: expected the cut model to have the masked one's {name} of {row['ppl'][name]:.4f} "
                f"within {subject.tolerance:g}, got {value:.4f}; please report this with {run.path / 'run.json'}"
            )
    run.update(
        best={
            "candidate": best.name,
            "parameters": loaded.parameters,
            "bytes": loaded.bytes,
            "dense_bytes": whole.bytes,
            "forward_seconds": seconds,
            "dense_forward_seconds": dense_seconds,
            "turns": turns,
            "forward_tokens": tokens_at_once(subject, text, size),
            "ppl": ppl,
            "ppl_masked": row["ppl"],
            "segments": loaded.segments,
        }
    )


def origin_step(config: CompareConfig, run: RunRecord, row: Row, parameters: int) -> OriginStep:
    """Write the step of `saap compare` that cuts the candidate of a row; `parameters` are those of the cut model."""
    calibration = dataclasses.replace(config.calibration, seed=row["seed"])
    facts = {
        "candidate": row["candidate"],
        "chain": row["chain"],
        "calibration": origins.calibration_text(calibration, config.model.traced),
        "made alone by": prune_command(run, row),
    }
    return {
        "kind": "compare",
        "command": command_of(config),
        "model": config.model.name,
        "parameters": (run["model"]["parameters"], parameters),
        "ratio": (row["ratio_asked"], row["ratio_actual"]),
        "facts": facts,
        "figures": figures_of({"dense": run["dense"], "pruned": row}, run.get("articles", {})),
    }


def shown(config: CompareConfig, run: RunDirectory) -> Iterator[Any]:
    """Show a comparison."""
    yield subject_sentence(run.record)
    yield from structure_sentences(run.record)
    page = wing("comparison_page")
    yield page.comparison_table(run.record, run.candidates())
    yield from page.cut_tables(run.record)
    yield from written_section(run.record.get("written", ()))
    made = {"report": run.path / "report.html"}
    if "best" in run.record:
        made["model"] = run.path / "best"
    yield made
