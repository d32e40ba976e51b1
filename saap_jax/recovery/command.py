"""A pruned model, fine-tuned: what `saap recover` runs, from text to a model directory and a table of before and after.

A run that is killed at any moment goes on from its newest checkpoint, to the same model bit for bit.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from saap_jax.checks import is_remote
from saap_jax.config.recover import MethodConfig, RecoverConfig
from saap_jax.data.sources import check_disjoint
from saap_jax.data.windows import Windows, pairs, window_articles
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.evaluation.timing import Workload, compile_programs, spread, time_in_turns
from saap_jax.jobs import origins
from saap_jax.jobs.job import lengths_of, run_job
from saap_jax.jobs.judged import NEW_TOKENS, written
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.sources import resolve
from saap_jax.llama.files.tokenizer import Tokenizer, load_tokenizer
from saap_jax.llama.files.write import check_widths, save_model, write_further
from saap_jax.llama.generate import decoder_of
from saap_jax.llama.model import Llama
from saap_jax.records import RECOVERY, Measured, RunRecord
from saap_jax.recovery.adapters import METHODS, Method
from saap_jax.recovery.checkpoints import Checkpoints
from saap_jax.recovery.loop import Outcome, Told, Training, held_out_loss, train
from saap_jax.recovery.objective import Objective, cast
from saap_jax.recovery.packing import Pieces, Rows, count_batches, pack, read_pieces, split_pieces
from saap_jax.recovery.page import recovery_table, summary
from saap_jax.recovery.train import Schedule, join, split
from saap_jax.report.write import finding_files
from saap_jax.runs.commands import command_of, options
from saap_jax.runs.directory import RunDirectory, flatten, write_scalars
from saap_jax.runs.origin import OriginStep, figures_of
from saap_jax.runtime.digests import digest_of, inputs_of, model_digest, provenance
from saap_jax.runtime.files import held, plain
from saap_jax.runtime.mesh import Layout, laid_out, layout_of_job
from saap_jax.runtime.processes import broadcast, is_primary
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.remote import exists, send
from saap_jax.runtime.words import plural
from saap_jax.structures.discovery import count_parameters, weight_bytes
from saap_jax.subjects.llama import texts_of


class TrainingText(NamedTuple):
    """What is learned from, packed."""

    pieces: Pieces
    rows: Rows
    held_out: Rows | None


WARMUP = 100
"""The most steps of a warm-up that is not asked for."""


def recover(config: RecoverConfig, *, overwrite: bool | None = False, track: Track = quiet) -> RunDirectory:
    """Fine-tune a model, save it merged, and keep the record of it all in a run directory.

    Args:
        track: shows progress; where it has a `note`, that is told how the training goes.

    Raises:
        ValueError: bad input, found before anything is written where that can be; a loss that is not finite.
    """
    check_disjoint(config.data.sources, [config.evaluation.in_domain, config.evaluation.out_of_domain])
    sizes = {"training.microbatch": config.training.microbatch, "evaluation.batch_size": config.evaluation.batch_size}
    layout = layout_of_job(config.mesh, **sizes)

    def work(run: RunDirectory) -> None:
        if config.out and "training" not in run.record and broadcast(lambda: exists(config.out)):
            raise ValueError(
                f"out: expected a directory that does not exist yet, found {config.out}; choose another --out"
            )
        away = is_remote(config.out)  # it is sent there from the run
        if config.out and not away:
            out = Path(config.out).expanduser()
        else:
            out = run.path / "model"
        with held(out, f"out: {out}"):
            _recover(config, run, out, layout, track)

    return run_job(config, work, finding_files, overwrite=overwrite)


def _recover(config: RecoverConfig, run: RunDirectory, out: Path, layout: Layout | None, track: Track) -> None:
    """Do what `recover` does, as far as the run does not hold it yet."""
    method = method_of(config.method)
    with run.stage("load"), step(track, "load the models"):
        lengths = lengths_of(config)
        if config.new_tokens:
            lengths["evaluation.length + new_tokens"] = config.evaluation.length + config.new_tokens
        model = load_model(config.model, config.dtype, layout=layout, lengths=lengths)
        tokenizer = load_tokenizer(config.model)
        if config.dense:
            dense = load_model(config.dense, config.dtype, layout=layout, lengths=lengths)
        else:
            dense = None
        _check_dense(config, model, dense)
        origin = origins.origin_of(config.model)
        place = resolve(config.model)
        if place.is_dir() and (place / "keep.json").exists():
            keep = load_keep(place)
        else:
            keep = None
        if keep is not None:  # before anything is trained; it goes with the result
            check_widths(keep, model)
    with run.stage("text"), step(track, "tokenise the texts"):
        texts = texts_of(config.evaluation, tokenizer)
        text = read_text(config, tokenizer)
    with run.stage("prepare"), step(track, "prepare the model"):
        training = training_of(config, method, model, dense, text, layout)
    run.begin(
        inputs_of({"model": model_digest(model)}, texts=texts)
        | ({} if dense is None else {"dense model": model_digest(dense)})
        | {"training text": training.about["digest of the text"]}
    )
    articles = texts_of(config.evaluation, tokenizer, window_articles)
    run.update(**_about(config, text, texts, training, model), articles=articles)
    if out == run.path / "model":
        run.claim("model")  # so that --overwrite removes it
    measure = functools.partial(measured, texts=texts, batch_size=config.evaluation.batch_size)
    models = {name: each for name, each in (("dense", dense), ("before", model)) if each is not None}
    with run.stage("evaluate"):
        for name in (name for name in models if name not in run.record):
            with step(track, f"evaluate the {RECOVERY[name]} model"):
                run.update(**{name: measure(models[name])})
    del model, dense, models  # of which the training has what it needs
    outcome = _train(config, run, training, track)
    with run.stage("merge"), step(track, "merge and save"):
        recovered = cast(method.merge(join(outcome.trained, training.frozen)), config.dtype)
        del outcome, training
        own = None
        if broadcast(out.exists):
            own = model_digest(recovered)
        if own is None:
            save_model(recovered, out, tokenizer=tokenizer, keep=keep)
        recovered = load_model(out, config.dtype, layout=layout)
        if own not in (None, model_digest(recovered)):  # another run may have written it since a kill
            raise ValueError(f"out: expected the model of this run at {out}, found another; move that away")
    with run.stage("evaluate"), step(track, "evaluate the recovered model"):
        run.update(after=measure(recovered))
    if config.new_tokens:
        _decode(config, run, recovered, tokenizer, track)
    made = origin_step(config, run.record)
    write_further(origins.files_of(origin, made, recovered, config.name), out)
    if is_remote(config.out) and is_primary():
        with step(track, f"send the model to {config.out}"):
            send(out, config.out)
    run.update(out=config.out if is_remote(config.out) else str(out))


# --- before the training -------------------------------------------------------------------------


def method_of(config: MethodConfig) -> Method:
    """Make the method that a configuration names."""
    options: dict[str, Any] = {}
    if config.name != "full":
        options |= {"rank": config.rank, "scale": config.scale, "matrices": config.matrices}
    if config.name == "groupwise":
        options |= {"bits": config.bits, "group_size": config.group_size, "rounding": config.rounding}
    return METHODS[config.name](**options)


def read_text(config: RecoverConfig, tokenizer: Tokenizer) -> TrainingText:
    """Read, tokenise and pack the text, the held-out part apart."""
    data = config.data
    pieces = read_pieces(data.sources, tokenizer, length=data.length, template=data.template, seed=data.seed)
    kept, held = split_pieces(pieces.pieces, float(data.held_out))
    packed = functools.partial(pack, length=data.length)
    if not held:
        return TrainingText(pieces, packed(kept), None)
    rows = packed(held)
    return TrainingText(pieces, packed(kept), rows.first(data.held_out_rows))


def training_of(
    config: RecoverConfig, method: Method, model: Llama, dense: Llama | None, text: TrainingText, layout: Layout | None
) -> Training:
    """Put together everything that the training is made of, on the devices of `layout`.

    Raises:
        ValueError: the rows make no more steps than the warm-up has.
    """
    options = config.training
    rows = text.rows
    steps = count_batches(rows, batch_size=options.batch_size, epochs=options.epochs)
    steps = min(steps, options.max_steps or steps)
    if options.warmup is None:
        warmup = min(WARMUP, steps // 10)
    else:
        warmup = options.warmup
    if steps <= warmup:
        raise ValueError(
            f"training.warmup: expected fewer than the {steps} steps that {len(rows.tokens):,} rows make in "
            f"{options.epochs} epochs of batch_size {options.batch_size}, got {warmup}; pass fewer, such as "
            f"--training.warmup {steps // 10}, or give more text"
        )
    schedule = Schedule(options.learning_rate, warmup, steps, options.clip)
    prepared = method.prepare(model, jax.random.fold_in(jax.random.key(options.seed), 0))
    if layout is not None:
        prepared = laid_out(prepared, layout.lenient())
    weights = (float(each) for each in (options.distillation, options.temperature, options.hidden))
    objective = Objective(options.compute, options.remat, *weights)
    teacher = dense if objective.taught else None
    trained, frozen = split(prepared, method.trainable, teacher)
    about = flatten(plain(dataclasses.asdict(config)))
    about["digest of the model"] = digest_of((prepared, teacher))
    about["digest of the text"] = digest_of([each.arrays() for each in (rows, text.held_out) if each is not None])
    return Training(trained, frozen, rows, text.held_out, objective, schedule, options, about)


def _check_dense(config: RecoverConfig, model: Llama, dense: Llama | None) -> None:
    if dense is not None and dense.spec.vocab != model.spec.vocab:
        raise ValueError(
            f"dense: expected a model of the {model.spec.vocab} tokens of {config.model}, got {config.dense} with "
            f"{dense.spec.vocab}; name the model that it was pruned from, or none: --dense ''"
        )
    sizes = [(len(each.spec.layers), each.spec.embed) for each in (model, dense) if each is not None]
    if config.training.hidden and len(set(sizes)) > 1:
        raise ValueError(
            f"training.hidden: expected as many layers of the same width in {config.model} and {config.dense}, got "
            f"{sizes[0][0]} of {sizes[0][1]} and {sizes[1][0]} of {sizes[1][1]}; leave it out"
        )


def _about(
    config: RecoverConfig, text: TrainingText, texts: dict[str, Windows], training: Training, model: Llama
) -> dict[str, Any]:
    """Describe a run: what is learned from what, and what the metrics mean."""
    rows = text.rows
    held = text.held_out
    return {
        "kind": "recover",
        **provenance(),
        "seeds": {"data": config.data.seed, "training": config.training.seed},
        "model": {"name": config.model, "parameters": count_parameters(model), "layers": len(model.spec.layers)},
        "metrics": [{"name": name, "domain": domain} for name, domain in zip(texts, ("in", "out"), strict=True)],
        "data": {
            "documents": text.pieces.documents,
            "pieces": len(text.pieces.pieces),
            "cut": text.pieces.cut,
            "left_out": text.pieces.left_out,
            "rows": len(rows.tokens),
            "filled": float((rows.segments > 0).mean()),
            "predicted": rows.predicted,
            "held_out_rows": 0 if held is None else len(held.tokens),
        },
    }


# --- the training, and after it ------------------------------------------------------------------


def _note(track: Track, text: str, milestone: bool) -> None:
    """Tell how it goes: a line, and whether it is worth one where no bar is shown."""
    getattr(track, "note", lambda text, milestone: None)(text, milestone)


def _train(config: RecoverConfig, run: RunDirectory, training: Training, track: Track) -> Outcome:
    """Train with checkpoints, a line of `metrics.jsonl` a step."""
    steps = training.schedule.steps
    rates = collections.deque[float](maxlen=10)
    with run.stage("train") as stage, Checkpoints(run.claim("checkpoints"), keep=2) as checkpoints:
        if "first_loss" not in run.record:
            run.update(first_loss=held_out_loss(training.initial, training))
        first = checkpoints.latest or 0
        bar = track("train", range(first, steps), steps - first)
        next(bar, None)

        def keep(told: Told) -> None:
            rates.append(told.tokens / told.seconds)
            stage.tokens += told.tokens
            record = {name: value for name, value in told._asdict().items() if value is not None}
            run.append({"candidate": f"step {told.step}", **record, "tokens_per_second": rates[-1]})
            if told.held_out is None:
                held = ""
            else:
                held = f", held out {told.held_out:.4f}"
            milestone = told.held_out is not None or told.step == steps
            where = ""
            if milestone:
                where = f"step {told.step} of {steps}: "
            _note(track, f"{where}loss {told.loss:.4f}{held}, {np.median(rates):,.0f} tokens/s", milestone)
            if milestone:
                write_scalars(run)
            next(bar, None)

        outcome = train(training, checkpoints, done=keep)
        for _ in bar:  # also where training stopped early
            pass
    run.update(
        training={
            "steps": outcome.steps,
            "rows": config.training.batch_size,
            "best_step": outcome.best_step,
            "best_loss": outcome.best_loss,
            "first_loss": run.record["first_loss"],
            "stopped": outcome.stopped,
            "trained": sum(leaf.size for leaf in jax.tree.leaves(training.initial)),
        }
    )
    return outcome


def measured(model: Llama, texts: dict[str, Windows], batch_size: int) -> dict[str, Any]:
    """Measure size and perplexities of a model, with the losses of each window."""
    vocab = model.embedding.shape[0]
    losses = {name: window_losses(model, pairs(windows, batch_size, vocab)) for name, windows in texts.items()}
    return {
        "parameters": count_parameters(model),
        "bytes": weight_bytes(model),
        "ppl": {name: each.perplexity for name, each in losses.items()},
        "losses": {name: (each.sums / each.counts).tolist() for name, each in losses.items()},
    }


def _decode(config: RecoverConfig, run: RunDirectory, recovered: Llama, tokenizer: Tokenizer, track: Track) -> None:
    """Keep what the models write, and how fast they decode, in turns: median, least and most."""
    places = {"dense": config.dense, "before": config.model}
    models = {name: load_model(place, config.dtype) for name, place in places.items() if place} | {"after": recovered}
    with run.stage("write"):
        named = {RECOVERY[name]: model for name, model in models.items()}
        run.update(written=written(named, tokenizer, NEW_TOKENS, track))
    workload = Workload(1, config.evaluation.length, config.new_tokens)
    with run.stage("time"):
        programs = [
            compile_programs(decoder_of(model), workload)
            for model in track("compile the models", models.values(), len(models))
        ]
        times = time_in_turns(
            programs, config.repeats, progress=lambda turns: track("time the models", turns, len(turns))
        )
        for name, each in zip(models, times, strict=True):
            rates = spread(workload.batch / one.step for one in each)
            run.update(
                **{name: run.record[name] | {"tokens_per_second": rates.median, "slowest_and_fastest": rates[1:]}}
            )


def origin_step(config: RecoverConfig, run: RunRecord) -> OriginStep:
    """Write the step of `saap recover`, whose record has what was measured of all models."""
    training = run["training"]
    data = run["data"]
    method = {name: value for name, value in dataclasses.asdict(config.method).items() if name != "name"}
    models: Mapping[str, Measured] = {label: run[key] for key, label in RECOVERY.items() if key in run}
    best = None
    if training["best_step"] != training["steps"]:
        best = training["best_step"]
    facts = {
        "method": " ".join([config.method.name, *options(method, MethodConfig())]),
        "text": f"{', '.join(config.data.sources)}: {plural(data['rows'], 'row')} of {config.data.length} tokens, "
        f"seed {config.data.seed}",
        "training": f"{plural(training['steps'], 'step')} of {plural(training['rows'], 'row')}, "
        f"seed {config.training.seed}" + (f"; the model is that of step {best}" if best else ""),
        "learned from": config.dense if config.training.distillation or config.training.hidden else "",
    }
    return {
        "kind": "recover",
        "command": command_of(config),
        "model": config.model,
        "parameters": (run["before"]["parameters"], run["after"]["parameters"]),
        "facts": facts,
        "figures": figures_of(models, run.get("articles", {})),
        "written": run.get("written", []),
    }


def shown(config: RecoverConfig, run: RunDirectory) -> Iterator[Any]:
    """Show the models before and after."""
    yield recovery_table(run.record)
    yield from summary(run.record)
    yield {"report": run.path / "report.html", "model": run.record["out"]}
