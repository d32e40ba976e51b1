"""What commands share that try many methods on one model: chains of each seed, and their evaluation by masks.

A candidate is a chain at a ratio on the calibration text of a seed. A keep-set is evaluated once, whoever asks for it:
losses are kept in the cache by what was evaluated (a keep-set, or a chain that changes weights) and on which windows.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.jobs import SensitivityConfig, SweepConfig
from saap_jax.evaluation.perplexity import keep_digest
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.job import Material
from saap_jax.runs.cache import FileCache
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import save_scores
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.digests import computed_by, digest_of, provenance
from saap_jax.runtime.processes import broadcast, is_primary
from saap_jax.runtime.progress import Passes, Track
from saap_jax.steps.base import State, Store, TextSize
from saap_jax.steps.chain import Chain
from saap_jax.steps.run import Runner, codes_of, digest
from saap_jax.steps.score.calibrate import put_together
from saap_jax.subjects.base import Examples, Subject, articles_of, joined, rows_of, run_losses, structures_record
from saap_jax.types import Keep, WindowLosses

Row = dict[str, Any]
"""One line of `metrics.jsonl`, or the record of the unpruned model."""


class Candidate(NamedTuple):
    """One pruned model."""

    name: str
    chain: Chain
    seed: int
    ratio: float

    @property
    def about(self) -> Row:
        """What a run records of it before it is evaluated."""
        return {"variant": self.chain.name, "chain": self.chain.written, "seed": self.seed, "ratio_asked": self.ratio}


def candidate_of(chain: Chain, ratio: float, seed: int, *, told: bool) -> Candidate:
    """Name a chain at a ratio; the name tells the seed if that is asked for, as in `wanda,seed=1@0.5`."""
    return Candidate(f"{chain.name}{f',seed={seed}' if told else ''}@{ratio:g}", chain, seed, ratio)


def cache_of(run: RunDirectory) -> FileCache:
    """Open the cache that the runs of a directory share."""
    return FileCache(run.path.parent / ".cache")


def key_of(subject: Subject, scenarios: Mapping[str, Examples]) -> str:
    """Digest a model, its calibration text, and what computes."""
    return digest(computed_by(), subject.digests(), [[name, digest_of(text)] for name, text in scenarios.items()])


def runner_of(
    subject: Subject, scenarios: Mapping[str, Examples], chains: Sequence[Chain], passes: Passes,
    cache: FileCache | None = None, **options: Any,
) -> Runner:  # fmt: skip
    """Make what runs chains on a calibration text, and keeps what it can."""
    store = Store() if cache is None else Store(cache, key_of(subject, scenarios))
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


class Evaluator:
    """The chains of a run on the text of each seed, and the evaluation texts under its candidates, by one program, in
    groups of `at_once`: as many as are asked for, or as there can be at once.

    A candidate whose weights were changed has a model of its own and is evaluated alone, by a second program. How
    keep-sets are batched depends on what is asked for and not on what is known already, so that a run that is taken up
    again gets the same numbers.
    """

    def __init__(
        self, config: SweepConfig | SensitivityConfig, run: RunDirectory, material: Material, chains: Sequence[Chain],
        ratios: Sequence[float], track: Track,
    ) -> None:  # fmt: skip
        """Make what runs the chains on the text of each seed, check that it can, and take what is evaluated on."""
        self.passes = Passes(config.calibration.batch_size, config.remat, track)
        subject = material.subject
        texts = material.texts
        self.run = run
        self.texts = texts
        self.subject = subject
        self.track = track
        self.material = material
        self.chains = chains
        self.cache = cache_of(run)
        self.evaluation = config.evaluation
        self.raced = config.race
        self.runners: dict[tuple[int, int], Runner] = {}
        """By seed, and windows of a microbatch, which are the same for most chains."""
        for seed, chain in itertools.product(material.calibration, chains):
            self.runner(chain, seed).check(chain, ratios)
        self.batch_size = config.evaluation.batch_size
        self.at_once = config.evaluation.candidates_at_once
        self.rows = {name: self.subject.size(text).rows for name, text in texts.items()}
        self.judging = [*texts][:2][-1]
        """The metric that judges: that out of the calibration domain, where there is one."""
        about = {name: digest_of(text) for name, text in texts.items()}
        self.key = digest("losses", computed_by(), self.subject.digests(), about, self.batch_size)
        self.keeps: dict[str, Keep] = {DENSE: self.subject.existing}
        self.models: dict[str, str] = {DENSE: keep_digest(self.subject.existing)}
        self.asked: dict[str, Candidate] = {}
        self.cuttable: set[str] = set()
        """Those of which the best will be cut: the lowest repaired one is kept, so that no repair is done twice."""

    def begin(self, kind: str, **about: Any) -> None:
        """Record what a run is of, what on, and what its metrics mean (the one of the calibration domain first); score
        what all chains ask for on the text of each seed, and keep the scores of the first."""
        run = self.run
        subject = self.subject
        material = self.material
        steps = [step for chain in self.chains for step in chain.steps]
        run.begin(material.inputs | codes_of(steps, [*subject.existing]))
        run.update(
            kind=kind,
            **provenance(),
            seeds={"calibration": list(material.calibration)},
            model=subject.about(),
            **structures_record(subject),
            articles={} if self.raced else articles_of(subject, self.evaluation),  # windows are what a race goes by
            metrics=[{"name": n, "domain": d} for n, d in zip(self.texts, ("in", "out"), strict=False)],
            **about,
        )
        with run.stage("score") as stage:
            for (seed, _), runner in self.runners.items():
                stage.tokens += sum(subject.size(text).tokens for text in material.calibration[seed].values())
                runner.first()
            first, scenarios = next(iter(material.calibration.items()))
            scored = [runner.first() for (seed, _), runner in self.runners.items() if seed == first]
            save_scores(run, put_together(scored, [*scenarios]))

    def runner(self, chain: Chain, seed: int) -> Runner:
        """Find what runs a chain on the text of a seed, or make it."""
        scenarios = self.material.calibration[seed]
        passes = fitting(self.passes, self.subject, scenarios, chain)
        if (key := (seed, passes.batch_size)) not in self.runners:
            alike = [each for each in self.chains if fitting(self.passes, self.subject, scenarios, each) == passes]
            self.runners[key] = runner_of(self.subject, scenarios, alike, passes, self.cache)
        return self.runners[key]

    # --- candidates

    def choose(self, candidates: Sequence[Candidate]) -> None:
        """Find which units each candidate keeps."""
        for candidate in candidates:
            runner = self.runner(candidate.chain, candidate.seed)
            state = runner.choose(candidate.chain, candidate.ratio)
            self.add(candidate.name, state.keep)
            self.asked[candidate.name] = candidate
            if candidate.chain.repairs:
                self.models[candidate.name] = runner.key_of(candidate.chain, candidate.ratio)
            for kind, name in (("divergences", "divergences"), ("price", "prices")):
                if told := state.metrics.get(kind):
                    self.run.update(**{name: {**self.run.record.get(name, {}), candidate.name: list(told)}})

    def add(self, name: str, keep: Keep) -> None:
        """Add a keep-set that no chain made."""
        self.keeps[name] = keep
        self.models[name] = keep_digest(keep)

    def state(self, candidate: Candidate) -> State:
        """Run the whole chain of a candidate."""
        return self.runner(candidate.chain, candidate.seed).run(candidate.chain, candidate.ratio)

    def cut(self, name: str) -> Path:
        """Find the cut model of a candidate in the cache, and make it where it is not there."""
        place = self._place(name)
        if not broadcast(place.exists):
            state = self.state(self.asked[name])
            state.subject.cut(state.keep).save(place, state.keep)
        return place

    def drop(self) -> None:
        """Remove cut models from the cache."""
        for name in self.cuttable if is_primary() else ():
            shutil.rmtree(self._place(name), ignore_errors=True)

    def _place(self, name: str) -> Path:
        return self.cache.path / digest(self.key, "cut", self.run.path.name, self.models[name])  # of one run alone

    def masked(self, name: str) -> bool:
        """Say whether a candidate is the unpruned model with some units masked."""
        return name not in self.asked or not self.asked[name].chain.repairs

    # --- losses

    def losses(
        self, names: Sequence[str], windows: Mapping[str, np.ndarray], doing: str, stage: Stage | None
    ) -> dict[str, Row]:
        """Count `parameters`, and measure `losses` by metric and `seconds`, of each candidate on some windows of each
        text."""
        firsts = {self.models[name]: name for name in reversed(names)}
        order = list(dict.fromkeys(self.models[name] for name in names))
        rows = {name: chosen.tolist() for name, chosen in windows.items()}
        keys = {model: digest(self.key, model, rows) for model in order}
        found = {model: value for model, key in keys.items() if (value := self.cache.value(key)) is not None}
        text = joined([rows_of(self.texts[n], c) for n, c in windows.items() if len(c)])
        tokens = self.subject.size(text).tokens

        def keep(model: str, losses: WindowLosses, seconds: float, subject: Subject, units: Keep) -> None:
            ends = np.cumsum([len(chosen) for chosen in windows.values()])[:-1]
            parts = {n: part.tolist() for n, part in zip(windows, np.split(losses.means, ends), strict=True)}
            parameters = subject.parameters - subject.removed(units)  # with biases that a repair has added
            self.cache.keep(keys[model], {"parameters": parameters, "losses": parts, "seconds": seconds})
            found[model] = self.cache.value(keys[model])
            if stage is not None:
                stage.tokens += tokens

        masked = [model for model in order if self.masked(firsts[model])]
        if any(model not in found for model in masked):
            self._masked(masked, [self.keeps[firsts[model]] for model in masked], text, found, keep, doing)
        changed = [model for model in order if not self.masked(firsts[model]) and model not in found]

        def mean(model: str) -> float:
            return float(np.mean(found[model]["losses"][self.judging]))

        lowest = min((mean(model) for model in found if firsts[model] in self.cuttable), default=np.inf)
        for model in self.track("repair and evaluate", changed, len(changed)) if changed else ():
            began = time.perf_counter()
            candidate = self.asked[firsts[model]]
            state = self.state(candidate)
            losses = run_losses(state.subject, text, state.keep, self.batch_size)
            keep(model, losses, time.perf_counter() - began, state.subject, state.keep)
            if firsts[model] in self.cuttable and mean(model) < lowest:
                self.drop()
                self.cut(firsts[model])
                lowest = mean(model)
        return {name: found[self.models[name]] for name in names}

    def _masked(
        self, models: list[str], sets: list[Keep], text: Examples, found: Mapping[str, Any], keep: Any, doing: str
    ) -> None:
        done = {number for number, model in enumerate(models) if model in found}
        began = time.perf_counter()
        for group in self.subject.losses(
            text, sets, batch_size=self.batch_size, at_once=self.at_once, done=done,
            progress=lambda steps: self.track(doing, steps, len(steps)),
        ):  # fmt: skip
            seconds = (time.perf_counter() - began) / len(group)
            for number, losses in group.items():
                if number not in done:
                    keep(models[number], losses, seconds, self.subject, sets[number])
            began = time.perf_counter()

    # --- rows

    def measure(
        self, names: Sequence[str], about: Mapping[str, Row], *, doing: str, stage: Stage | None = None
    ) -> dict[str, Row]:
        """Evaluate candidates on all windows, and record them; `dense`, the unpruned model, in the run's record."""
        windows = {name: np.arange(rows) for name, rows in self.rows.items()}
        found = self.losses(names, windows, doing, stage)
        rows = {}
        for name in names:
            ppl = {metric: figure(metric, np.asarray(each)) for metric, each in found[name]["losses"].items()}
            rows[name] = self.record(name, about.get(name, {}), {"ppl": ppl, **found[name]})
        return rows

    def record(self, name: str, about: Row, measured: Row) -> Row:
        """Add a record to the run, unless it holds the same, and return it."""
        if name == DENSE:
            self.run.update(dense=measured)
            return measured
        keep = self.keeps[name]
        row = {
            "candidate": name, **about, "ratio_actual": self.subject.removed(keep) / self.subject.prunable,
            "kept": {structure: keep[structure].sum(axis=1).tolist() for structure in self.subject.existing},
            "keep": keep_digest(keep), "model": self.models[name], **measured,
        }  # fmt: skip
        if name not in {known["candidate"] for known in self.run.candidates()}:
            self.run.append(row)
        return row

    def save_keeps(self) -> None:
        """Keep the keep-sets of all candidates as arrays `CANDIDATE/STRUCTURE`."""
        keeps = {name: keep for name, keep in self.keeps.items() if name != DENSE}
        self.run.save_arrays("keeps", {f"{name}/{part}": each for name, k in keeps.items() for part, each in k.items()})


def figure(metric: str, losses: np.ndarray) -> float:
    """Compute the figure of a metric from mean losses of windows of as many tokens each."""
    return scale_of(metric).value(float(losses.mean()))
