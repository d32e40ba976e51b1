"""`--dry-run`: how much a job does, how long it takes about, and how much disk; by a pass over one microbatch."""

import time

from saap_jax.config.jobs import CompareConfig, FrontierConfig, PruneConfig
from saap_jax.jobs.candidates import fitting, runner_of
from saap_jax.jobs.job import check, lengths_of
from saap_jax.jobs.judged import texts_of
from saap_jax.jobs.score import calibration_of
from saap_jax.runtime.mesh import layout_of_job
from saap_jax.runtime.progress import Passes, Track, quiet, step
from saap_jax.runtime.remote import exists
from saap_jax.runtime.words import plural
from saap_jax.steps.chain import expand
from saap_jax.subjects.base import rows_of
from saap_jax.subjects.llama import open_subject
from saap_jax.wings import wing

SCORING = 3
"""Forward passes that a pass with derivatives counts for."""

ROUNDS = 7
"""Points of a frontier's line beyond its `ratios`, about."""


def dry_run(config: CompareConfig | FrontierConfig | PruneConfig, *, track: Track = quiet) -> list[str]:
    """Say what a job does, after the checks that it begins with.

    Times are those of forward passes over as many tokens, so without compiling; what several methods have in common,
    or the cache holds, is counted all the same.

    Raises:
        ValueError: what the job would refuse.
    """
    alone = isinstance(config, PruneConfig)
    if alone:
        where = config.out
    else:
        where = f"{config.runs}/{config.name}"
    if alone and exists(where):
        raise ValueError(f"out: expected a directory that does not exist yet, found {where}; choose another --out")
    if alone:
        calibration = calibration_of(config)
    else:
        calibration = config.calibration
    size = calibration.batch_size
    chains = expand([config.chain] if alone else config.methods)
    if alone:
        wing("targets").check(config.targets, chains[0])
    ratios, seeds = ([config.ratio or 0.2], [0]) if alone else (config.ratios, config.seeds_drawn)
    with step(track, "load the model, and time a microbatch"):
        if alone:
            layout = layout_of_job(config.mesh, **{"calibration.batch_size": size})
        else:
            layout = check(config)
        subject = open_subject(config.model, layout=layout, lengths=lengths_of(config))
        scenarios = subject.scenarios(calibration)
        if alone:
            texts = texts_of(config, subject, calibration.scenarios)
        else:
            texts = subject.texts(config.evaluation)
        sizes = []
        for chain in chains:
            passes = fitting(Passes(size, config.remat), subject, scenarios, chain)
            runner = runner_of(subject, scenarios, [chain], passes)
            runner.check(chain, [config.ratio or 0.0] if alone else ratios)
            sizes.append(runner.text_size)
        whole = subject.cut(subject.existing)
        part = rows_of(next(iter(scenarios.values())), slice(0, size))
        whole.losses(part, size)  # compiles
        began = time.perf_counter()
        whole.losses(part, size)
        each = (time.perf_counter() - began) / subject.size(part).tokens
    text = sum(subject.size(examples).tokens for examples in scenarios.values())
    judged = sum(subject.size(examples).tokens for examples in texts.values())
    candidates = len(chains) * len(seeds) * (len(ratios) + ROUNDS * isinstance(config, FrontierConfig))
    pairs = [*zip(chains, sizes, strict=True)]
    passes = sum(chain.passes(text, each, subject) for chain, text in pairs for each in ratios) * candidates
    passes /= len(chains) * len(ratios)
    cuts = 0
    if alone or (isinstance(config, CompareConfig) and config.cut):
        cuts = 1
    tokens = text * (SCORING * len(seeds) + passes) + judged * (1 + candidates + 2 * cuts * (not alone))
    if isinstance(config, CompareConfig):
        ratio = config.cut_ratio
    else:
        ratio = ratios[0]
    disk = cuts * whole.bytes * (1 - ratio * subject.prunable / subject.parameters)
    kinds = ((len(chains), "method"), (len(ratios), "ratio"), (len(seeds), "seed"), (candidates, "candidate"))
    passes += SCORING * len(seeds)
    return [
        f"{subject.name}, {subject.parameters:,} parameters: {', '.join(plural(*each) for each in kinds)}",
        f"text: {passes:,.0f} passes over {text:,} tokens of calibration; {judged:,} tokens of evaluation a candidate",
        f"time: about {_time(each * tokens)}, and compiling; a forward pass has {1 / each:,.0f} tokens a second",
        f"disk: about {disk / 2**20 + 2:,.0f} MiB in {where}" + ", with the cut model" * cuts,
    ]


def _time(seconds: float) -> str:
    """Write a time.

    >>> _time(42.0), _time(200.0), _time(10_000.0)
    ('42 s', '3.3 min', '2.8 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
