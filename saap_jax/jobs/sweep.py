"""What commands share that try many keep-sets on one model: texts, scores of each seed, and evaluation by masks.

A keep-set is evaluated once, whoever asks for it; what is finished is a line of the run's `metrics.jsonl`.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.config.jobs import SweepConfig
from saap_jax.config.method import ALL, EvaluationConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.evaluation.candidates import keep_digest
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.score import structures, tokens_to_observe
from saap_jax.recipes import recipes
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.reading import DAMAGED
from saap_jax.runs.scores import kept_scores
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.files import decoded, encoded
from saap_jax.runtime.progress import Track, quiet
from saap_jax.runtime.provenance import provenance
from saap_jax.selection.calibrate import Calibrated
from saap_jax.selection.variants import Variant, compensations_of
from saap_jax.subjects.base import Examples, Subject, run_losses
from saap_jax.types import Keep, WindowLosses

Row = dict[str, Any]
"""One line of `metrics.jsonl`, or the record of the unpruned model."""


def methods_of(config: SweepConfig) -> tuple[str, ...]:
    """Return the methods of compensation of a sweep."""
    return tuple(dict.fromkeys(options.method for options in compensations_of(config)))


def check_compensations(config: SweepConfig, subject: Subject, calibration: Mapping[int, dict[str, Examples]]) -> None:
    """Raise ValueError for a compensation that the model cannot have, or too few calibration examples for it."""
    alone = any(scenario != ALL for scenario in config.grid.scenarios)
    for options in compensations_of(config):
        for scenarios in calibration.values():
            rows = [subject.count(examples)[0] for examples in scenarios.values()]
            count = -(-(min(rows) if alone else sum(rows)) // config.calibration.batch_size)
            subject.check_compensation(options, count)


def about_run(
    kind: str, subject: Subject, metrics: Sequence[str], seeds: Sequence[int], methods: Sequence[str] = ()
) -> Row:
    """Describe a run: what was used, on what, and what the metrics mean (the one of the calibration domain first).

    Args:
        methods: of compensation; what they leave as it is, is said of each.
    """
    left = {method: reasons for method in methods if (reasons := subject.uncompensated(method))}
    return {
        "kind": kind,
        **provenance(),
        "seeds": {"calibration": list(seeds)},
        "model": subject.about(),
        **structures(subject),
        **({"uncompensated": left} if left else {}),
        "metrics": [{"name": n, "domain": d} for n, d in zip(metrics, ("in", "out"), strict=False)],
    }


def scores_of_seeds(
    config: SweepConfig,
    run: RunDirectory,
    subject: Subject,
    calibration: Mapping[int, dict[str, Examples]],
    variants: Sequence[Variant],
    track: Track,
    stage: Stage,
) -> dict[int, Calibrated]:
    """Return the scores of each seed, all variants from one pass over its text; the first seed's are `scores.npz`."""
    first, plan = next(iter(calibration)), {variant.scores: (variant.estimator, variant.fusion) for variant in variants}
    adaptive = any(ALLOCATIONS[variant.search.allocation].stability for variant in variants)
    scores = {}
    for seed, scenarios in calibration.items():
        suffix = "" if seed == first else f"-seed{seed}"
        tokens = tokens_to_observe(run, subject, scenarios, suffix)
        scores[seed] = kept_scores(
            run, subject, scenarios, config, stability=adaptive, plan=plan, suffix=suffix, track=track
        )
        stage.tokens += tokens
    return scores


Compensate = Callable[[Row, Keep], Subject]
"""Returns the model whose kept units stand in for the removed ones, for what a record says of a candidate."""


def compensator(config: SweepConfig, subject: Subject, calibration: Mapping[int, dict[str, Examples]]) -> Compensate:
    """Build the compensation function of a sweep: each candidate on the calibration text of its seed and scenario.

    With `propagate = dense` the second moments of a text serve all candidates, and are observed once, unless tokens
    count alike.
    """
    size = config.calibration.batch_size

    def text(seed: int, scenario: str) -> Examples:
        scenarios = calibration[seed]
        return subject.join([*scenarios.values()] if scenario == ALL else [scenarios[scenario]])

    @functools.lru_cache(maxsize=1)
    def moments(seed: int, scenario: str) -> Any:
        return subject.moments(text(seed, scenario), size)

    def compensate(about: Row, keep: Keep) -> Subject:
        method, recipe = about.get("compensation", "none"), about.get("recipe")
        options = recipes()[recipe].compensation if recipe else dataclasses.replace(config.compensation, method=method)
        if options.method == "none":
            return subject
        own = about["seed"], about["scenario"]
        once = options.propagate == "dense" and options.tokens == "scaled" and options.correction != "none"
        known = moments(*own) if once else None
        return subject.compensated(keep, text(*own), options, batch_size=size, moments=known)[0]

    return compensate


class Evaluator:
    """The evaluation texts under keep-sets of a run's model, by one program, in batches of `at_once`.

    A candidate that is compensated has weights of its own and is evaluated alone, by a second program.

    How keep-sets are batched depends on the calls of `measure`, and not on what the run holds already. So a run that is
    taken up again and makes the same calls gets the same numbers, to the last bit.
    """

    def __init__(
        self,
        run: RunDirectory,
        subject: Subject,
        texts: dict[str, Examples],
        config: EvaluationConfig,
        at_once: int,
        compensate: Compensate | None = None,
    ):
        self.run, self.subject, self.texts, self.at_once = run, subject, texts, at_once
        self.together, self.batch_size = subject.join([*texts.values()]), config.batch_size
        self.rows = {name: subject.count(text)[0] for name, text in texts.items()}
        self.tokens = subject.count(self.together)[1]
        self.compensate = compensate
        self._known: dict[str, tuple[str, Row]] = {}
        self.asked: set[str] = {DENSE}

    def check_rows(self) -> None:
        """Check that the run holds records of nothing but what `measure` was asked for.

        Raises:
            ValueError: a record is of another candidate, as where a name was changed by hand.
        """
        strange = [row["candidate"] for row in self.run.candidates() if row["candidate"] not in self.asked]
        if strange:
            raise ValueError(
                f"{self.run.path / 'metrics.jsonl'}: expected candidates of this configuration, got {strange[0]!r}"
                f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; {DAMAGED}"
            )

    def measure(
        self,
        keeps: Mapping[str, Keep],
        about: Mapping[str, Row],
        *,
        doing: str,
        track: Track = quiet,
        stage: Stage | None = None,
    ) -> dict[str, Row]:
        """Return the record of each candidate; those that the run does not hold yet are appended as they finish.

        So are those of which it holds less than, or something else than, what belongs to the keep-set.

        Args:
            keeps: by the name of the candidate. The unpruned model, `dense`, is one of them, so that it differs in
                nothing from a candidate that removes nothing.
            about: what a record says beside what is measured.
        """
        self.asked |= keeps.keys()
        known: dict[str, Any] = {row["candidate"]: row for row in self.run.candidates()}
        known |= {DENSE: self.run.record[DENSE]} if DENSE in self.run.record else {}
        rows: dict[str, Row] = {}
        by_digest: dict[str, list[str]] = {}
        for name, keep in keeps.items():
            digest = digest_of(keep, about.get(name, {}))
            by_digest.setdefault(digest, []).append(name)
            if name in known and self._whole(known[name], keep, about.get(name, {}), digest):
                rows[name] = known[name]
        new = {digest: names for digest, names in by_digest.items() if digest not in self._known}
        for digest, names in by_digest.items():
            if digest not in new:
                self._record(digest, names, keeps, about, rows)
        by_masks = {digest: names for digest, names in new.items() if "/" not in digest}
        by_weights = {digest: names for digest, names in new.items() if "/" in digest}
        for digest, losses, seconds in itertools.chain(
            self._evaluated(by_masks, keeps, rows, doing, track, stage),
            self._compensated(by_weights, keeps, about, rows, track, stage),
        ):
            self._known[digest] = new[digest][0], self._measured(losses) | {"seconds": seconds}
            self._record(digest, new[digest], keeps, about, rows)
        for digest, names in new.items():
            self._known.setdefault(digest, (names[0], rows[names[0]]))
        return {name: rows[name] for name in keeps}

    def _evaluated(
        self,
        new: Mapping[str, list[str]],
        keeps: Mapping[str, Keep],
        rows: Mapping[str, Row],
        doing: str,
        track: Track,
        stage: Stage | None,
    ) -> Iterator[tuple[str, WindowLosses, float]]:
        """Yield digest, losses and seconds of each new keep-set, in groups; not of groups that the run holds."""
        digests = list(new)
        if not digests:
            return
        done = {number for number, names in enumerate(new.values()) if all(name in rows for name in names)}
        sets = [keeps[names[0]] for names in new.values()]
        filled = sets + sets[-1:] * (self.at_once - len(sets))  # one shape: fewer would be another program
        start = time.perf_counter()
        for group in self.subject.losses(
            self.together,
            filled,
            batch_size=self.batch_size,
            done=done | set(range(len(sets), len(filled))),
            at_once=self.at_once,
            progress=lambda steps: track(doing, steps, len(steps)),
        ):
            members = {number: losses for number, losses in group.items() if number < len(sets)}
            seconds = (time.perf_counter() - start) / len(members)
            if stage is not None:
                stage.tokens += len(members) * self.tokens
            yield from ((digests[number], losses, seconds) for number, losses in members.items())
            start = time.perf_counter()

    def _compensated(
        self,
        new: Mapping[str, list[str]],
        keeps: Mapping[str, Keep],
        about: Mapping[str, Row],
        rows: Mapping[str, Row],
        track: Track,
        stage: Stage | None,
    ) -> Iterator[tuple[str, WindowLosses, float]]:
        """Yield the same of each new keep-set with weights of its own; not of those that the run holds."""
        missing = {digest: names[0] for digest, names in new.items() if not all(name in rows for name in names)}
        if not missing:
            return
        ordered = sorted(missing.items(), key=lambda each: (about[each[1]]["seed"], about[each[1]]["scenario"]))
        for digest, name in track("compensate and evaluate", ordered, len(ordered)):
            start = time.perf_counter()
            losses = run_losses(self.compensated(about[name], keeps[name]), self.together, keeps[name], self.batch_size)
            if stage is not None:
                stage.tokens += self.tokens
            yield digest, losses, time.perf_counter() - start

    def compensated(self, about: Row, keep: Keep) -> Subject:
        """Return the model of a candidate with weights of its own.

        Raises:
            ValueError: nothing says on which text.
        """
        if self.compensate is None:
            raise ValueError(f"evaluation: {about['variant']} is compensated, and nothing says on which text")
        return self.compensate(about, keep)

    def _record(
        self,
        digest: str,
        names: Sequence[str],
        keeps: Mapping[str, Keep],
        about: Mapping[str, Row],
        rows: dict[str, Row],
    ) -> None:
        """Add the records of the candidates with one keep-set that are missing, to the run and to `rows`."""
        first, measured = self._known[digest]
        measured = {key: measured[key] for key in ("ppl", "losses", "seconds")}
        for name in names:
            if name in rows:
                continue
            of = self.about_keep(name, keeps[name], about.get(name, {}), digest)
            if name == DENSE:
                self.run.update(dense=measured | of)
                rows[name] = {**self.run.record[DENSE]}
                continue
            rows[name] = {"candidate": name, **of, **measured, "same_as": None if name == first else first}
            self.run.append(rows[name])

    def about_keep(self, name: str, keep: Keep, about: Row, digest: str) -> Row:
        """Return what the record of a candidate says of its keep-set."""
        parameters = self.subject.remaining(keep)
        if name == DENSE:
            return {"parameters": parameters}
        return {
            **about,
            "ratio_actual": self.subject.removed(keep) / self.subject.prunable,
            "parameters": parameters,
            "kept": {name: keep[name].sum(axis=1).tolist() for name in self.subject.existing},
            "keep": digest.partition("/")[0],
        }

    def _whole(self, row: Row, keep: Keep, about: Row, digest: str) -> bool:
        """Say whether a record that the run holds is of this keep-set, and has all that is measured."""
        of = self.about_keep(row.get("candidate", DENSE), keep, about, digest)
        losses, ppl = row.get("losses") or {}, row.get("ppl", {})
        return (
            decoded(encoded({key: row.get(key) for key in of})) == decoded(encoded(of))
            and row.get("seconds") is not None
            and all(len(losses.get(name, ())) == rows and name in ppl for name, rows in self.rows.items())
        )

    def _measured(self, losses: WindowLosses) -> Row:
        """Return perplexity and mean loss of each window, by metric; `losses` holds the texts one behind the other."""
        ends = np.cumsum([*self.rows.values()])[:-1]
        parts = zip(self.texts, np.split(losses.sums, ends), np.split(losses.counts, ends), strict=True)
        each = {name: WindowLosses(sums, counts) for name, sums, counts in parts}
        return {
            "ppl": {name: scale_of(name).value(part.mean) for name, part in each.items()},
            "losses": {name: part.means.tolist() for name, part in each.items()},
        }


def digest_of(keep: Keep, about: Row) -> str:
    """Return a name that equal candidates share: those of one keep-set, compensated alike."""
    own = keep_digest(keep)
    if about.get("compensation", "none") == "none":
        return own
    return "/".join(map(str, (own, about["compensation"], about["seed"], about["scenario"], about.get("recipe", ""))))


def unpruned(subject: Subject) -> dict[str, Keep]:
    """Return the keep-set of the unpruned model under its name."""
    return {DENSE: subject.existing}
