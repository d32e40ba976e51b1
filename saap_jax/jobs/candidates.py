"""The table of candidates of commands that try many methods on one model, and what fills it.

A candidate is a chain at a ratio on the calibration text of a seed. `table_of` makes an empty table, `choose` lets
chains choose units, `measure` evaluates the candidates by name and records them; `jobs.losses` evaluates.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.jobs import SensitivityConfig, SweepConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.evaluation.perplexity import keep_digest
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.job import Material
from saap_jax.runs.cache import FileCache
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import save_scores
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.digests import computed_by, digest_of, provenance
from saap_jax.runtime.progress import Passes, Track
from saap_jax.steps.base import State, Store, TextSize
from saap_jax.steps.chain import Chain
from saap_jax.steps.run import Runner, codes_of, digest
from saap_jax.steps.score.calibrate import put_together
from saap_jax.subjects.base import Examples, Subject, articles_of, structures_record
from saap_jax.types import Keep

Row = dict[str, Any]
"""One line of `metrics.jsonl`, or the record of the unpruned model."""


class Candidate(NamedTuple):
    """A chain at a ratio, on the calibration text of a seed."""

    name: str
    chain: Chain
    seed: int
    ratio: float

    @property
    def about(self) -> Row:
        """What a run records of it before it is evaluated."""
        return {
            "variant": self.chain.name,
            "chain": self.chain.written,
            "seed": self.seed,
            "ratio_asked": self.ratio,
        }


def candidate_of(chain: Chain, ratio: float, seed: int, *, told: bool) -> Candidate:
    """Name a chain at a ratio; the name tells the seed if that is asked for, as in `wanda,seed=1@0.5`."""
    seeded = f",seed={seed}" if told else ""
    return Candidate(f"{chain.name}{seeded}@{ratio:g}", chain, seed, ratio)


def deciding(metrics: Iterable[str]) -> str:
    """Choose the metric that decides which candidate is best: of the second text where there are two.

    The first text is of the calibration domain.

    >>> deciding(["wikitext", "ptb"]), deciding(["wikitext"])
    ('ptb', 'wikitext')
    """
    first, *others = metrics
    return next(iter(others), first)


class Choice(NamedTuple):
    """The units that a candidate keeps."""

    keep: Keep
    model: str
    """Digest of the model that is evaluated: of the mask, or of a chain that changes weights."""
    candidate: Candidate | None = None
    """None where no chain made the mask."""

    @property
    def masked(self) -> bool:
        """Whether it is evaluated as the unpruned model with some units masked."""
        return self.candidate is None or not self.candidate.chain.repairs


@dataclasses.dataclass
class Candidates:
    """The candidates of a run by name, and what makes and evaluates them."""

    run: RunDirectory
    material: Material
    chains: Sequence[Chain]
    evaluation: EvaluationConfig
    passes: Passes
    cache: FileCache
    key: str
    """Digest of all that losses depend on, beside a model and its windows."""
    at_once: int
    """The most masks that one program evaluates together."""
    choices: dict[str, Choice]
    """The unpruned model among them, as `dense`."""
    runners: dict[tuple[int, int], Runner] = dataclasses.field(default_factory=dict)
    """By seed, and windows of a microbatch, which are the same for most chains."""
    cuttable: set[str] = dataclasses.field(default_factory=set)
    """Names of those of which the best will be cut."""

    @property
    def subject(self) -> Subject:
        """The unpruned model."""
        return self.material.subject

    @property
    def rows(self) -> dict[str, int]:
        """The number of windows of each evaluation text, by metric."""
        return {name: self.subject.size(text).rows for name, text in self.material.texts.items()}

    def runner(self, chain: Chain, seed: int) -> Runner:
        """Find the runner of a chain on the text of a seed, or make it.

        Chains with microbatches of the same size share a runner, and so one pass over the text.
        """
        scenarios = self.material.calibration[seed]
        passes = fitting(self.passes, self.subject, scenarios, chain)
        key = (seed, passes.batch_size)
        if key not in self.runners:
            alike = [each for each in self.chains if fitting(self.passes, self.subject, scenarios, each) == passes]
            self.runners[key] = runner_of(self.subject, scenarios, alike, passes, self.cache)
        return self.runners[key]

    def state(self, name: str) -> State:
        """Run the whole chain of a candidate."""
        candidate = self.choices[name].candidate
        if candidate is None:
            raise ValueError(f"{name}: expected a candidate that a chain made")
        return self.runner(candidate.chain, candidate.seed).run(candidate.chain, candidate.ratio)


# --- what runs the chains ------------------------------------------------------------------------


def cache_of(run: RunDirectory) -> FileCache:
    """Open the cache that the runs of a directory share."""
    return FileCache(run.path.parent / ".cache")


def key_of(subject: Subject, scenarios: Mapping[str, Examples]) -> str:
    """Digest a model, its calibration text, and what computes."""
    texts = [[name, digest_of(text)] for name, text in scenarios.items()]
    return digest(computed_by(), subject.digests(), texts)


def runner_of(
    subject: Subject,
    scenarios: Mapping[str, Examples],
    chains: Sequence[Chain],
    passes: Passes,
    cache: FileCache | None = None,
    **options: Any,
) -> Runner:
    """Make what runs chains on a calibration text, and keeps what it can."""
    store = Store()
    if cache is not None:
        store = Store(cache, key_of(subject, scenarios))
    return Runner(subject, scenarios, chains, passes, store=store, **options)


def fitting(passes: Passes, subject: Subject, scenarios: Mapping[str, Examples], chain: Chain) -> Passes:
    """Make microbatches smaller where the text is so little that a chain, which holds some of them out, would have too
    few; on one device alone. Other chains beside it change nothing.
    """
    windows = sum(subject.size(each).rows for each in scenarios.values())
    size = passes.batch_size
    while size and getattr(subject, "layout", None) is None:
        with contextlib.suppress(ValueError):
            chain.check(subject, TextSize(windows, size))
            return passes._replace(batch_size=size)
        size //= 2
    return passes


# --- filling the table ---------------------------------------------------------------------------


def table_of(
    config: SweepConfig | SensitivityConfig,
    run: RunDirectory,
    material: Material,
    chains: Sequence[Chain],
    ratios: Sequence[float],
    track: Track,
) -> Candidates:
    """Make a table with the unpruned model alone, and check that the chains can run to the ratios on each text.

    Raises:
        ValueError: a ratio that a chain cannot meet, or a text that is too short for it.
    """
    existing = material.subject.existing
    texts = {metric: digest_of(text) for metric, text in material.texts.items()}
    table = Candidates(
        run=run,
        material=material,
        chains=chains,
        evaluation=config.evaluation,
        passes=Passes(config.calibration.batch_size, config.remat, track),
        cache=cache_of(run),
        key=digest("losses", computed_by(), material.subject.digests(), texts, config.evaluation.batch_size),
        at_once=config.evaluation.candidates_at_once,
        choices={DENSE: Choice(existing, keep_digest(existing))},
    )
    for seed, chain in itertools.product(material.calibration, chains):
        table.runner(chain, seed).check(chain, ratios)
    return table


def begin(table: Candidates, kind: str, *, raced: bool, **about: Any) -> None:
    """Record what a run is of, what on, and what its metrics mean (the one of the calibration domain first); score
    what all chains ask for on the text of each seed, and keep the scores of the first."""
    run = table.run
    subject = table.subject
    material = table.material
    steps = [step for chain in table.chains for step in chain.steps]
    articles = {}
    if not raced:  # a race goes by windows
        articles = articles_of(subject, table.evaluation)
    run.begin(material.inputs | codes_of(steps, [*subject.existing]))
    run.update(
        kind=kind,
        **provenance(),
        seeds={"calibration": list(material.calibration)},
        model=subject.about(),
        **structures_record(subject),
        articles=articles,
        metrics=[{"name": n, "domain": d} for n, d in zip(material.texts, ("in", "out"), strict=False)],
        **about,
    )
    first_seed, first_scenarios = next(iter(material.calibration.items()))
    scored = []
    with run.stage("score") as stage:
        for (seed, _), runner in table.runners.items():
            stage.tokens += sum(subject.size(text).tokens for text in material.calibration[seed].values())
            scores = runner.first()
            if seed == first_seed:
                scored.append(scores)
        save_scores(run, put_together(scored, [*first_scenarios]))


def choose(table: Candidates, candidates: Sequence[Candidate]) -> None:
    """Run the chain of each candidate as far as it chooses units, and add it to the table."""
    for candidate in candidates:
        runner = table.runner(candidate.chain, candidate.seed)
        state = runner.choose(candidate.chain, candidate.ratio)
        model = keep_digest(state.keep)
        if candidate.chain.repairs:
            model = runner.key_of(candidate.chain, candidate.ratio)
        table.choices[candidate.name] = Choice(state.keep, model, candidate)
        for metric, name in (("divergences", "divergences"), ("price", "prices")):
            values = state.metrics.get(metric)
            if values:
                table.run.update(**{name: {**table.run.record.get(name, {}), candidate.name: list(values)}})


def add(table: Candidates, name: str, keep: Keep) -> None:
    """Add a mask that no chain made."""
    table.choices[name] = Choice(keep, keep_digest(keep))


def save_keeps(table: Candidates) -> None:
    """Save the masks of all candidates as arrays `CANDIDATE/STRUCTURE`."""
    arrays = {}
    for name, choice in table.choices.items():
        if name != DENSE:
            arrays |= {f"{name}/{structure}": units for structure, units in choice.keep.items()}
    table.run.save_arrays("keeps", arrays)


def record(table: Candidates, name: str, about: Row, measured: Row) -> Row:
    """Add a row to the run, unless it holds the same, and return it; `dense` to the run's record."""
    if name == DENSE:
        table.run.update(dense=measured)
        return measured
    keep, model, _ = table.choices[name]
    row = {
        "candidate": name,
        **about,
        "ratio_actual": table.subject.removed(keep) / table.subject.prunable,
        "kept": {structure: keep[structure].sum(axis=1).tolist() for structure in table.subject.existing},
        "keep": keep_digest(keep),
        "model": model,
        **measured,
    }
    if name not in {known["candidate"] for known in table.run.candidates()}:
        table.run.append(row)
    return row


def figure(metric: str, losses: np.ndarray) -> float:
    """Compute the figure of a metric from mean losses of windows of as many tokens each."""
    return scale_of(metric).value(float(losses.mean()))
