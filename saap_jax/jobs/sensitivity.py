"""What does each layer's attention and MLP cost, and what follows? What `saap sensitivity` runs.

From one layer and structure at a time the units of the lowest scores go, some shares of them; all these keep-sets are
evaluated by masks, in batches that share the layers in front. What follows for the search is tried at one ratio, and
suggested where it was better.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.config.jobs import SensitivityConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.search import SearchConfig
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.sensitivity import Cost, Place, Plan, changes_of, costs_of, nearest_share, plan_of, predicted
from saap_jax.jobs.job import Ending, check, check_judged, finish, job, load
from saap_jax.jobs.score import tokens_to_observe
from saap_jax.jobs.sweep import Evaluator, Row, about_run, unpruned
from saap_jax.report.kinds.sensitivity import sensitivity_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.keeps import read_keeps, save_keeps
from saap_jax.runs.scores import check_scores, read_scores, save_scores
from saap_jax.runs.suggestions import suggestions_of
from saap_jax.runs.trials import trial_options
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.calibrate import Calibrated, calibrate
from saap_jax.selection.choose import choose_calibrated, choose_path, most_removable
from saap_jax.selection.search import Selection
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import Keep, Scores

ROUNDS = FEWEST
"""Times that `repeats` forward passes are timed: a difference counts where all of their medians are on one side."""


ENDING = Ending(lambda run: sensitivity_files(run.record, run.candidates()), further=("keeps.npz",))


def sensitivity(config: SensitivityConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Measure what each place costs, keep the records, and compute suggestions from them.

    Raises:
        ValueError: bad input, or a ratio that the search cannot meet (with `align`, also with aligned widths).
    """
    layout = check(config)
    with job(config, ENDING, overwrite=overwrite) as run:
        if not run.finished:
            _sensitivity(config, run, layout, track)
    return run


def _sensitivity(config: SensitivityConfig, run: RunDirectory, layout: Layout | None, track: Track) -> None:
    """Do what `sensitivity` does, as far as the run does not hold it yet."""
    material = load(config, run, layout, track)
    subject, scenarios, texts = material.subject, material.scenarios, material.texts
    _check_ratio(config, subject)
    check_judged(config.judged, texts)
    run.begin(material.inputs)
    run.update(**about_run("sensitivity", subject, list(texts), [config.calibration.seed]))
    with run.stage("score") as stage:
        tokens = tokens_to_observe(run, subject, scenarios)
        calibrated = _scores(config, run, subject, scenarios, track)
        stage.tokens = tokens
    scores = calibrated.scores(config.estimator, config.search.scenario_reduction)
    keeps, about = one_place_each(subject, scores, config.fractions)
    evaluator = Evaluator(run, subject, texts, config.evaluation, config.evaluation.candidates_at_once)
    with run.stage("evaluate") as stage:
        doing = "evaluate dense model and one place at a time"
        evaluator.measure(unpruned(subject) | keeps, about, doing=doing, track=track, stage=stage)
    with run.stage("try"):
        run.update(trials=Trials(config, evaluator, calibrated, scenarios, track).measured())
    evaluator.check_rows()
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


def _check_ratio(config: SensitivityConfig, subject: Subject) -> None:
    """Refuse a ratio that the search cannot meet, and layers to skip that the model does not have."""
    aligned = dataclasses.replace(config.search.multiple_of, mlp=config.align or config.search.multiple_of.mlp)
    for search in (config.search, dataclasses.replace(config.search, multiple_of=aligned)):
        top = most_removable(subject, search)
        if config.ratio > top:
            raise ValueError(
                f"ratio: expected at most {top:.4f}, the largest that the search can meet with MLP widths to multiples "
                f"of {search.multiple_of.mlp}, got {config.ratio}; relax min_keep, max_ratio, skip_layers, align, …"
            )


def _scores(
    config: SensitivityConfig, run: RunDirectory, subject: Subject, scenarios: dict[str, Examples], track: Track
) -> Calibrated:
    """Return the scores that the run holds, or make and keep them."""
    if not run.has("scores.npz"):
        made = calibrate(
            subject,
            scenarios,
            [config.estimator],
            fusion=config.fusion,
            stability=ALLOCATIONS[config.search.allocation].stability,
            batch_size=config.calibration.batch_size,
            remat=config.remat,
            track=track,
        )
        save_scores(run, made)
    kept = read_scores(run)
    check_scores(kept, run.path / "scores.npz", subject, scenarios, [config.estimator])
    return kept


def one_place_each(
    subject: Subject, scores: Scores, fractions: Sequence[float]
) -> tuple[dict[str, Keep], dict[str, dict[str, Any]]]:
    """Return the keep-sets that remove a share of the units of one place, and what is recorded of each, by name.

    A place is a structure of a layer; of a traced model, whose copies lose as many units
    each, a whole structure. The units of the lowest scores go, of equal ones the first; as many as make up the share,
    rounded up.
    """
    existing, limits = subject.existing, subject.limits(SearchConfig())
    layers = max(len(units) for units in existing.values())
    places = (
        [(layer, name, [layer]) for layer in range(layers) for name in existing]
        if limits is None
        else [(0, name, list(range(len(units)))) for name, units in existing.items()]
    )
    keeps: dict[str, Keep] = {}
    about: dict[str, Row] = {}
    for layer, structure, groups in places:
        units = int(existing[structure][groups[0]].sum())
        most = units if limits is None else units - limits[structure].min_keep
        values = np.asarray(scores[structure], np.float64)[:, :units]
        for fraction in sorted(fractions) if units else ():
            gone = min(units, int(np.ceil(units * fraction * (1 - 1e-12))))
            if gone > most:  # as of experts, of which some are chosen
                continue
            variant = f"layer={layer},{structure}" if limits is None else structure
            kept = existing[structure].copy()
            for group in groups:
                kept[group, np.argsort(values[group], kind="stable")[:gone]] = False
            name = f"{variant}@{fraction:g}"
            keeps[name] = existing | {structure: kept}
            about[name] = {
                "variant": variant,
                "layer": layer,
                "structure": structure,
                "asked": fraction,
                "actual": gone / units,
                "units": units,
                "removed": subject.removed(keeps[name]),
            } | ({} if limits is None else {"among": "all"})
    return keeps, about


# --- trials --------------------------------------------------------------------------------------


class Trials:
    """What to try instead of the configured search at `ratio`: chosen by prediction, then evaluated by masks."""

    def __init__(
        self,
        config: SensitivityConfig,
        evaluator: Evaluator,
        calibrated: Calibrated,
        scenarios: dict[str, Examples],
        track: Track = quiet,
    ):
        self.config, self.evaluator, self.calibrated, self.scenarios = config, evaluator, calibrated, scenarios
        self.track, self.subject, self.run = track, evaluator.subject, evaluator.run

    def measured(self) -> list[Row]:
        """Return the record of each trial; the keep-sets of all are kept as the run's `keeps.npz`."""
        chosen, name = self._chosen(), self._name("plain")
        searches = {"plain": self.config.search} | {kind: self._search(changes) for kind, changes in chosen.items()}
        keeps = read_keeps(self.run, self.subject, {self._name(kind): self.config.ratio for kind in searches})
        for kind, search in searches.items():
            if self._name(kind) not in keeps:
                keeps[self._name(kind)] = self._select(search).keep
                save_keeps(self.run, keeps)
        about = {each: {"variant": each.rpartition("@")[0], "ratio_asked": self.config.ratio} for each in keeps}
        self.evaluator.measure(keeps, about, doing="evaluate what could be suggested", track=self.track)
        return [
            {"kind": kind, "changes": changes, "candidate": self._name(kind), "instead_of": name}
            | (self._times(keeps[name], keeps[self._name(kind)]) if kind == "aligned" else {})
            for kind, changes in chosen.items()
        ]

    def _chosen(self) -> dict[str, Row]:
        """Return the changes of the search that are tried, by kind: of several the one with the lowest prediction."""
        candidates = self.run.candidates()
        costs = costs_of(self.run.record, candidates)
        changes = nearest_share(changes_of(self.run.record, candidates), self.config.ratio)
        plain = self._plan(costs, self.config.search)
        chosen: dict[str, Row] = {}
        for kind, options in trial_options(dataclasses.asdict(self.config.search), changes, plain).items():
            best = predicted(costs, plain)
            for option in options:
                try:
                    plan = self._plan(costs, self._search(option))
                except ValueError:  # a budget that this option cannot meet
                    continue
                if predicted(costs, plan) < best:
                    best, chosen[kind] = predicted(costs, plan), option
        return chosen | ({"aligned": {"search.multiple_of.mlp": self.config.align}} if self.config.align else {})

    def _plan(self, costs: dict[Place, Cost], search: SearchConfig) -> Plan:
        """Return what a search removes by the scores of the whole model, without steps on the way."""
        keep = choose_calibrated(self.subject, self.calibrated, self.config.estimator, self.config.ratio, search).keep
        return plan_of(costs, {structure: kept.sum(axis=1).tolist() for structure, kept in keep.items()})

    def _select(self, search: SearchConfig) -> Selection:
        config = self.config
        return choose_path(
            self.subject,
            self.calibrated,
            self.scenarios,
            config.estimator,
            [config.ratio],
            search,
            fusion=config.fusion,
            batch_size=config.calibration.batch_size,
            remat=config.remat,
            track=self.track,
        )[config.ratio]

    def _search(self, changes: Row) -> SearchConfig:
        """Return the configured search with some changes."""
        search = self.config.search
        for path, value in changes.items():
            *outer, name = path.split(".")[1:]
            if outer:
                name, value = outer[0], dataclasses.replace(getattr(search, outer[0]), **{name: value})
            search = dataclasses.replace(search, **{name: tuple(value) if isinstance(value, list) else value})
        return search

    def _name(self, kind: str) -> str:
        return f"{self.config.estimator},{kind}@{self.config.ratio:g}"

    def _times(self, plain: Keep, other: Keep) -> Row:
        """Return the seconds of a forward pass of both models cut, and their segments of equal layers.

        The models take turns at the clock; the medians of some rounds say how steady it was.
        """
        if known := next((t for t in self.run.record.get("trials", []) if "seconds" in t), None):
            return {name: known[name] for name in ("seconds", "tokens", "segments")}
        models = [self.subject.cut(keep) for keep in (plain, other)]
        text, rows = next(iter(self.evaluator.texts.values())), self.config.evaluation.batch_size
        rounds = self.track("time both models cut", range(ROUNDS), ROUNDS)
        seconds = [self.subject.seconds(models, text, rows, repeats=self.config.repeats) for _ in rounds]
        return {
            "seconds": [list(each) for each in zip(*seconds, strict=True)],
            "tokens": math.prod(self.subject.shape(text, rows)),
            "segments": [model.segments for model in models],
        }
