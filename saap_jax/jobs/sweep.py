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
from saap_jax.data import Windows
from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.estimation import GRAM, observe
from saap_jax.estimation.gram import Gram
from saap_jax.evaluation.candidates import candidate_losses, keep_digest
from saap_jax.evaluation.perplexity import WindowLosses
from saap_jax.jobs.score import tokens_to_observe
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_units
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.reading import DAMAGED
from saap_jax.runs.scores import kept_scores
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.files import decoded, encoded
from saap_jax.runtime.mesh import mesh_of
from saap_jax.runtime.progress import Track, quiet
from saap_jax.runtime.provenance import provenance
from saap_jax.selection.calibrate import Calibrated, pairs, scenario_pairs
from saap_jax.selection.variants import Variant
from saap_jax.surgery.compensation import Batch, compensate
from saap_jax.surgery.counting import kept_parameters
from saap_jax.types import STRUCTURES, Keep

Row = dict[str, Any]
"""One line of `metrics.jsonl`, or the record of the unpruned model."""


def about_run(kind: str, name: str, model: Llama, metrics: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Describe a run: what was used, on what, and what the metrics mean (the one of the calibration domain first)."""
    structures = discover(model)
    return {
        "kind": kind,
        **provenance(),
        "seeds": {"calibration": list(seeds)},
        "model": {
            "name": name,
            "parameters": count_parameters(model),
            "prunable_parameters": prunable_parameters(structures),
            "layers": len(model.spec.layers),
            "units": {name: max(structure.units) for name, structure in structures.items()},
        },
        "metrics": [{"name": n, "domain": d} for n, d in zip(metrics, ("in", "out"), strict=True)],
    }


def scores_of_seeds(
    config: SweepConfig,
    run: RunDirectory,
    model: Llama,
    calibration: Mapping[int, dict[str, Windows]],
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
        tokens = tokens_to_observe(run, scenarios, suffix)
        scores[seed] = kept_scores(
            run, model, scenarios, config, stability=adaptive, plan=plan, suffix=suffix, track=track
        )
        stage.tokens += tokens
    return scores


Compensate = Callable[[Row, Keep], Llama]
"""Returns the model whose kept units stand in for the removed ones, for what a record says of a candidate."""


def compensator(config: SweepConfig, model: Llama, calibration: Mapping[int, dict[str, Windows]]) -> Compensate:
    """Return what compensates a candidate on the calibration text of its seed and scenario.

    With `propagate = dense` the second moments of a text serve all candidates, and are observed once; not on a mesh,
    where every device would hold all of them.
    """

    def text(seed: int, scenario: str) -> list[Batch]:
        scenarios = calibration[seed]
        return scenario_pairs(scenarios.values() if scenario == ALL else [scenarios[scenario]], config.calibration)

    @functools.lru_cache(maxsize=1)
    def gram(seed: int, scenario: str) -> Gram:
        return observe(model, text(seed, scenario), frozenset({GRAM})).of(GRAM)

    once = config.compensation.propagate == "dense" and mesh_of(model) is None

    def made(about: Row, keep: Keep) -> Llama:
        options = dataclasses.replace(config.compensation, method=about.get("compensation", "none"))
        if options.method == "none":
            return model
        own = about["seed"], about["scenario"]
        return compensate(model, keep, text(*own), options, gram=gram(*own) if once else None).model

    return made


class Evaluator:
    """The evaluation texts under keep-sets of a run's model, by one program, in batches of `at_once`.

    A candidate that is compensated has weights of its own and is evaluated alone, by a second program.

    How keep-sets are batched depends on the calls of `measure`, and not on what the run holds already. So a run that is
    taken up again and makes the same calls gets the same numbers, to the last bit.
    """

    def __init__(
        self,
        run: RunDirectory,
        model: Llama,
        texts: dict[str, Windows],
        config: EvaluationConfig,
        at_once: int,
        compensate: Compensate | None = None,
    ):
        self.run, self.model, self.texts, self.at_once = run, model, texts, at_once
        windows = Windows(*(np.concatenate(parts) for parts in zip(*texts.values(), strict=True)))
        self.batches, self.tokens = pairs(windows, config.batch_size), int(windows.mask.sum())
        self.prunable, self.parameters = prunable_parameters(discover(model)), count_parameters(model)
        self.compensate = compensate
        self._known: dict[str, tuple[str, Row]] = {}
        self._asked: set[str] = {DENSE}

    def check_rows(self) -> None:
        """Check that the run holds records of nothing but what `measure` was asked for.

        Raises:
            ValueError: a record is of another candidate, as where a name was changed by hand.
        """
        strange = [row["candidate"] for row in self.run.candidates() if row["candidate"] not in self._asked]
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
        self._asked |= keeps.keys()
        known = {row["candidate"]: row for row in self.run.candidates()}
        known |= {DENSE: self.run.record[DENSE]} if DENSE in self.run.record else {}
        rows: dict[str, Row] = {}
        by_digest: dict[str, list[str]] = {}
        for name, keep in keeps.items():
            digest = _digest(keep, about.get(name, {}))
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
        for group in candidate_losses(
            self.model,
            self.batches,
            filled,
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
        if self.compensate is None:
            raise ValueError(
                f"evaluation: {next(iter(missing.values()))} is compensated, and nothing says on which text"
            )
        ordered = sorted(missing.items(), key=lambda each: (about[each[1]]["seed"], about[each[1]]["scenario"]))
        for digest, name in track("compensate and evaluate", ordered, len(ordered)):
            start = time.perf_counter()
            model = self.compensate(about[name], keeps[name])
            (group,) = candidate_losses(model, self.batches, [keeps[name]], at_once=1)
            if stage is not None:
                stage.tokens += self.tokens
            yield digest, group[0], time.perf_counter() - start

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
            of = self._of(name, keeps[name], about.get(name, {}), digest)
            if name == DENSE:
                self.run.update(dense=measured | of)
                rows[name] = self.run.record[DENSE]
                continue
            rows[name] = {"candidate": name, **of, **measured, "same_as": None if name == first else first}
            self.run.append(rows[name])

    def _of(self, name: str, keep: Keep, about: Row, digest: str) -> Row:
        """Return what the record of a candidate says of its keep-set."""
        parameters = kept_parameters(self.model, keep)
        if name == DENSE:
            return {"parameters": parameters}
        return {
            **about,
            "ratio_actual": (self.parameters - parameters) / self.prunable,
            "parameters": parameters,
            "kept": {structure: keep[structure].sum(axis=1).tolist() for structure in STRUCTURES},
            "keep": digest.partition("/")[0],
        }

    def _whole(self, row: Row, keep: Keep, about: Row, digest: str) -> bool:
        """Say whether a record that the run holds is of this keep-set, and has all that is measured."""
        of = self._of(row.get("candidate", DENSE), keep, about, digest)
        losses, ppl = row.get("losses") or {}, row.get("ppl", {})
        return (
            decoded(encoded({key: row.get(key) for key in of})) == decoded(encoded(of))
            and row.get("seconds") is not None
            and all(len(losses.get(name, ())) == len(each.tokens) and name in ppl for name, each in self.texts.items())
        )

    def _measured(self, losses: WindowLosses) -> Row:
        """Return perplexity and mean loss of each window, by metric; `losses` holds the texts one behind the other."""
        ends = np.cumsum([len(windows.tokens) for windows in self.texts.values()])[:-1]
        parts = zip(self.texts, np.split(losses.sums, ends), np.split(losses.counts, ends), strict=True)
        each = {name: WindowLosses(sums, counts) for name, sums, counts in parts}
        return {
            "ppl": {name: part.perplexity for name, part in each.items()},
            "losses": {name: (part.sums / part.counts).tolist() for name, part in each.items()},
        }


def _digest(keep: Keep, about: Row) -> str:
    """Return a name that equal candidates share: those of one keep-set, compensated alike."""
    own = keep_digest(keep)
    if about.get("compensation", "none") == "none":
        return own
    return f"{own}/{about['compensation']}/{about['seed']}/{about['scenario']}"


def unpruned(model: Llama) -> dict[str, Keep]:
    """Return the keep-set of the unpruned model under its name."""
    return {DENSE: existing_units(model.runs)}
