"""`--dry-run`: how much a job does, how long it takes about, and how much disk; by a pass over one microbatch."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from saap_jax.config.jobs import (
    CompareConfig,
    FidelityConfig,
    FrontierConfig,
    JobConfig,
    PruneConfig,
    ScoreConfig,
    SensitivityConfig,
)
from saap_jax.config.method import ModelConfig
from saap_jax.config.recover import RecoverConfig
from saap_jax.config.use import AbConfig, EvaluateConfig, ExportConfig
from saap_jax.data import evaluation_windows
from saap_jax.estimation import union_of_needs
from saap_jax.estimation.ablation import sample_units
from saap_jax.jobs.candidates import runner_of
from saap_jax.jobs.job import lengths_of
from saap_jax.jobs.recover import read_text
from saap_jax.jobs.score import check_scores, scores_of
from saap_jax.jobs.sensitivity import one_place_each
from saap_jax.recovery.loop import steps_of
from saap_jax.runs.ab import find
from saap_jax.runtime.mesh import layout_of_job
from saap_jax.runtime.progress import Passes, Track, quiet, step
from saap_jax.runtime.words import plural
from saap_jax.steps.chain import expand, parse
from saap_jax.steps.score.score import make_members
from saap_jax.subjects.base import Examples, Subject
from saap_jax.subjects.llama import open_subject

SCORING = 3
"""Forward passes that a pass with derivatives counts for."""

ROUNDS = 7
"""Points of a frontier's line beyond its `ratios`, about."""

TRIALS = 3
"""Chains that `sensitivity` tries at the end, about."""


class Material(NamedTuple):
    """What a job works on: a model, and its examples by scenario and by metric."""

    config: Any
    subject: Subject
    scenarios: dict[str, Examples]
    texts: dict[str, Examples]

    def tokens(self, examples: dict[str, Examples]) -> int:
        """Count tokens (of a traced model, examples)."""
        return sum(self.subject.count(each)[1] for each in examples.values())


class Work(NamedTuple):
    """What a job does with one model."""

    said: str
    tokens: float
    """Those that it passes over, a pass with derivatives counted as `SCORING` forward passes."""
    disk: float = 0.0
    where: str = ""
    unknown: str = ""
    """What the time does not count."""


def dry_run(config: Any, *, track: Track = quiet) -> list[str]:
    """Say what a job does, after the checks that it begins with.

    Times are those of forward passes over as many tokens, so without compiling; what several methods have in common,
    or the cache holds, is counted all the same.

    Raises:
        ValueError: what the job would refuse.
    """
    lines: list[str] = []
    for model in models_of(config):
        with step(track, "load the model, and time a microbatch"):
            material = opened(config, model)
            subject, work = material.subject, WORK[type(config)](material)
            each = pace(material) if work.tokens else 0.0
        lines += [f"{subject.name}, {subject.parameters:,} parameters: {work.said}"]
        if each:
            speed = f"a forward pass has {1 / each:,.0f} tokens a second"
            lines += [f"time: about {_time(each * work.tokens)}, and compiling; {speed}"]
        if work.unknown:
            lines += [f"time of {work.unknown}: not estimated"]
        if work.where:
            lines += [f"disk: about {work.disk / 2**20 + 2:,.0f} MiB in {work.where}"]
    return lines or ["no model is loaded: both are on record"]


def models_of(config: Any) -> list[ModelConfig]:
    """List the models that a job loads."""
    if isinstance(config, JobConfig):
        return [config.model]
    if isinstance(config, AbConfig):
        names = [each.text for each in map(find, (config.a, config.b)) if each.run is None]
    else:
        names = list(config.models) if isinstance(config, EvaluateConfig) else [config.model]
    more: Any = {} if isinstance(config, ExportConfig) else {"dtype": config.dtype, "attention": config.attention}
    return [ModelConfig(name=name, **more) for name in names]


def opened(config: Any, model: ModelConfig) -> Material:
    """Load a model of a job, and the text that it reads."""
    parts: dict[str, Any] = {name: getattr(config, name, None) for name in ("calibration", "evaluation")}
    sizes = {f"{name}.batch_size": part.batch_size for name, part in parts.items() if part is not None}
    layout = layout_of_job(config.mesh, **sizes) if hasattr(config, "mesh") else None
    subject = open_subject(model, layout=layout, lengths=lengths_of(config))
    read = isinstance(config, ScoreConfig) and config.from_run  # statistics of another run, and no text
    scenarios = subject.scenarios(config.calibration) if isinstance(config, JobConfig) and not read else {}
    texts = {} if parts["evaluation"] is None else subject.texts(parts["evaluation"])
    if isinstance(config, AbConfig | EvaluateConfig):
        how: Any = {"limit": config.windows or None, "bos": config.bos, "drawn": config.drawn}
        words: Any = subject
        texts = {each: evaluation_windows(each, words.words, config.length, **how) for each in config.sources}
    return Material(config, subject, scenarios, texts)


def pace(material: Material) -> float:
    """Time a forward pass over a microbatch, in seconds a token."""
    config, subject = material.config, material.subject
    size = (config.calibration if material.scenarios else getattr(config, "evaluation", config)).batch_size
    part = subject.rows(next(iter((material.scenarios or material.texts).values())), slice(0, size))
    whole = subject.whole()
    whole.losses(part, size)  # compiles
    began = time.perf_counter()
    whole.losses(part, size)
    return (time.perf_counter() - began) / subject.count(part)[1]


# --- what each job does --------------------------------------------------------------------------


def _chains(material: Material) -> Work:
    """Count the passes of methods at ratios: what scores, repairs and refines, then each candidate's evaluation."""
    config, subject = material.config, material.subject
    alone = isinstance(config, PruneConfig)
    chains = expand([config.chain] if alone else config.methods)
    ratios, seeds = ([config.ratio or 0.2], [0]) if alone else (config.ratios, config.seeds_drawn)
    runner = runner_of(subject, material.scenarios, chains, Passes(config.calibration.batch_size, config.remat))
    for chain in chains:
        runner.check(chain, [] if alone and config.targets.asked else ratios)
    text, judged = material.tokens(material.scenarios), material.tokens(material.texts)
    candidates = len(chains) * len(seeds) * (len(ratios) + ROUNDS * isinstance(config, FrontierConfig))
    passes = sum(chain.passes(runner.extent, ratio) for chain in chains for ratio in ratios) * candidates
    passes = passes / (len(chains) * len(ratios)) + SCORING * len(seeds)
    cuts = 1 if alone or (isinstance(config, CompareConfig) and config.cut) else 0
    ratio = config.cut_ratio if isinstance(config, CompareConfig) else ratios[0]
    kinds = ((len(chains), "method"), (len(ratios), "ratio"), (len(seeds), "seed"), (candidates, "candidate"))
    said = (
        f"{', '.join(plural(*each) for each in kinds)}; {passes:,.0f} passes over {text:,} tokens of calibration; "
        f"{judged:,} tokens of evaluation a candidate" + ", with the cut model" * cuts
    )
    disk = cuts * subject.whole().bytes * (1 - ratio * subject.prunable / subject.parameters)
    unknown = "searching the ratio that meets the targets" if alone and config.targets.asked else ""
    tokens = text * passes + judged * (1 + candidates + 2 * cuts)
    return Work(said, tokens, disk, config.out if alone else place_of(config), unknown)


def _score(material: Material) -> Work:
    """Count one pass with derivatives over each scenario, and the statistics that are as large as the model."""
    config, subject = material.config, material.subject
    scores = scores_of(config.estimators)
    check_scores(scores, subject)
    text = material.tokens(material.scenarios)
    needs = union_of_needs(make_members(scores, tuple(subject.existing)).values())
    large = sum(each.large for each in needs) * (config.keep_statistics == "all") * len(material.scenarios)
    said = f"{plural(len(scores), 'estimator')}, one pass over {text:,} tokens" if text else "kept statistics, no text"
    return Work(said, SCORING * text, large * 4 * subject.parameters, place_of(config))


def _fidelity(material: Material) -> Work:
    """Count the pass that scores, and one for each unit that goes, from its layer on: half of a pass."""
    config, subject = material.config, material.subject
    scores, text = scores_of(config.estimators), material.tokens(material.scenarios)
    check_scores(scores, subject)
    units = len(sample_units(subject.existing, config.channels_per_layer, config.seed))
    said = f"{plural(len(scores), 'estimator')}; {units:,} units go one by one, on {text:,} tokens"
    return Work(said, text * (SCORING + units / 2), 0, place_of(config))


def _sensitivity(material: Material) -> Work:
    """Count the pass that scores, and one evaluation a place and share, by masks; a race takes fewer."""
    config, subject = material.config, material.subject
    method, text, judged = parse(config.method), material.tokens(material.scenarios), material.tokens(material.texts)
    runner_of(subject, material.scenarios, [method], Passes(config.calibration.batch_size)).check(
        method, [config.ratio]
    )
    scores: Any = {name: units.astype(float) for name, units in subject.existing.items()}
    places = len(one_place_each(subject, scores, config.fractions)[0])
    said = f"{places:,} evaluations of one place at a time, of {judged:,} tokens{' at most' * config.race}"
    return Work(said, SCORING * text + judged * (1 + places + TRIALS), 0, place_of(config))


def _recover(material: Material) -> Work:
    """Count the steps of training, with a pass of the dense model where that teaches, and the evaluations."""
    config, subject, options = material.config, material.subject, material.config.training
    words: Any = subject
    text, judged = read_text(config, words.words), material.tokens(material.texts)
    steps = steps_of(text.rows, batch_size=options.batch_size, epochs=options.epochs, most=options.max_steps)
    taught = bool(config.dense) and bool(options.distillation or options.hidden)
    held = 0 if text.held_out is None else text.held_out.tokens.size * (1 + steps // options.check_every)
    tokens = steps * options.batch_size * config.data.length * (SCORING + taught) + held + judged * (2 + taught)
    said = f"{steps:,} steps of {options.batch_size} rows of {config.data.length} tokens"
    kept = subject.whole().bytes + 4 * options.top_k_logits * 2 * text.rows.tokens.size
    beside = f"{config.out or place_of(config)}, and checkpoints of what is trained"
    return Work(said, tokens, kept, beside, "preparing the adapters and timing the decoding")


def _evaluated(material: Material) -> Work:
    """Count one pass over the texts."""
    text, tasks = material.tokens(material.texts), material.config.tasks
    return Work(f"one pass over {text:,} tokens", text, unknown=", ".join(tasks))


def _exported(material: Material) -> Work:
    """Say the size of the file."""
    config, subject = material.config, material.subject
    each = {"float32": 4.0, "q8_0": 34 / 32}.get(config.dtype, 2.0)
    said = f"its weights as {config.dtype}" + ", and the zeros that widen it" * (config.format == "padded")
    return Work(said, 0, each * subject.parameters, config.out, "writing and comparing, which the disk decides")


WORK: dict[type, Callable[[Material], Work]] = {
    CompareConfig: _chains,
    FrontierConfig: _chains,
    PruneConfig: _chains,
    ScoreConfig: _score,
    FidelityConfig: _fidelity,
    SensitivityConfig: _sensitivity,
    RecoverConfig: _recover,
    EvaluateConfig: _evaluated,
    AbConfig: _evaluated,
    ExportConfig: _exported,
}
"""Configuration -> what its job does."""


def place_of(config: Any) -> str:
    """Name the directory of a run."""
    return f"{config.runs}/{config.name}"


def _time(seconds: float) -> str:
    """Write a time.

    >>> _time(42.0), _time(200.0), _time(10_000.0)
    ('42 s', '3.3 min', '2.8 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
