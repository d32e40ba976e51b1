"""What does each layer's attention and MLP cost, and what follows? What `saap sensitivity` runs.

From one layer and structure at a time the units of the lowest scores go, some shares of them; all these keep-sets are
evaluated by masks, in batches that share the layers in front. What follows for the search is tried at one ratio, and
suggested where it was better.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.api import select_calibrated, select_path
from saap_jax.config.jobs import SensitivityConfig
from saap_jax.config.method import SearchConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.data import Windows
from saap_jax.discovery import discover, unit_costs
from saap_jax.evaluation.cost import forward_seconds
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.sensitivity import Cost, Place, Plan, changes_of, costs_of, nearest_share, plan_of, predicted
from saap_jax.jobs.job import Ending, check, finish, job, load
from saap_jax.jobs.score import tokens_to_observe
from saap_jax.jobs.sweep import Evaluator, Row, about_run, unpruned
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_units
from saap_jax.report.kinds.sensitivity import sensitivity_files
from saap_jax.report.suggestions import suggestions_of
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.keeps import read_keeps, save_keeps
from saap_jax.runs.scores import check_scores, read_scores, save_scores
from saap_jax.runs.suggestions import trial_options
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.calibrate import Calibrated, calibrate
from saap_jax.selection.search import Selection, largest_ratio
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES, Keep, Scores

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
    model, scenarios, texts = material.model, material.scenarios, material.texts
    _check_ratio(config, model)
    run.begin(material.inputs)
    run.update(**about_run("sensitivity", config.model.name, model, list(texts), [config.calibration.seed]))
    with run.stage("score") as stage:
        tokens = tokens_to_observe(run, scenarios)
        calibrated = _scores(config, run, model, scenarios, track)
        stage.tokens = tokens
    scores = calibrated.scores(config.estimator, config.search.scenario_reduction)
    keeps, about = one_place_each(model, scores, config.fractions)
    evaluator = Evaluator(run, model, texts, config.evaluation, config.evaluation.candidates_at_once)
    with run.stage("evaluate") as stage:
        doing = "evaluate dense model and one place at a time"
        evaluator.measure(unpruned(model) | keeps, about, doing=doing, track=track, stage=stage)
    with run.stage("try"):
        run.update(trials=Trials(config, evaluator, calibrated, scenarios, track).measured())
    evaluator.check_rows()
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


def _check_ratio(config: SensitivityConfig, model: Llama) -> None:
    """Refuse a ratio that the search cannot meet, and layers to skip that the model does not have."""
    costs, existing = unit_costs(discover(model)), existing_units(model.runs)
    aligned = dataclasses.replace(config.search.multiple_of, mlp=config.align or config.search.multiple_of.mlp)
    for search in (config.search, dataclasses.replace(config.search, multiple_of=aligned)):
        top = largest_ratio(costs, existing, search)
        if config.ratio > top:
            raise ValueError(
                f"ratio: expected at most {top:.4f}, the largest that the search can meet with MLP widths to multiples "
                f"of {search.multiple_of.mlp}, got {config.ratio}; relax min_keep, max_ratio, skip_layers, align, …"
            )


def _scores(
    config: SensitivityConfig, run: RunDirectory, model: Llama, scenarios: dict[str, Windows], track: Track
) -> Calibrated:
    """Return the scores that the run holds, or make and keep them."""
    if not run.has("scores.npz"):
        made = calibrate(
            model,
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
    check_scores(kept, run.path / "scores.npz", model, scenarios, [config.estimator])
    return kept


def one_place_each(
    model: Llama, scores: Scores, fractions: Sequence[float]
) -> tuple[dict[str, Keep], dict[str, dict[str, Any]]]:
    """Return the keep-sets that remove a share of one layer's attention or MLP, and what is recorded of each, by name.

    The units of the lowest scores go, of equal ones the first; as many as make up the share, rounded up.
    """
    existing, costs = existing_units(model.runs), unit_costs(discover(model))
    keeps: dict[str, Keep] = {}
    about: dict[str, Row] = {}
    for layer in range(len(model.spec.layers)):
        for structure in STRUCTURES:
            units = int(existing[structure][layer].sum())
            order = np.argsort(np.asarray(scores[structure], np.float64)[layer, :units], kind="stable")
            for fraction in sorted(fractions) if units else ():
                gone = min(units, int(np.ceil(units * fraction * (1 - 1e-12))))
                variant = f"layer={layer},{structure}"
                kept = existing[structure].copy()
                kept[layer, order[:gone]] = False
                name = f"{variant}@{fraction:g}"
                keeps[name] = existing | {structure: kept}
                about[name] = {
                    "variant": variant,
                    "layer": layer,
                    "structure": structure,
                    "asked": fraction,
                    "actual": gone / units,
                    "units": units,
                    "removed": gone * int(costs[structure][layer]),
                }
    return keeps, about


# --- trials --------------------------------------------------------------------------------------


class Trials:
    """What to try instead of the configured search at `ratio`: chosen by prediction, then evaluated by masks."""

    def __init__(
        self,
        config: SensitivityConfig,
        evaluator: Evaluator,
        calibrated: Calibrated,
        scenarios: dict[str, Windows],
        track: Track = quiet,
    ):
        self.config, self.evaluator, self.calibrated, self.scenarios = config, evaluator, calibrated, scenarios
        self.track, self.model, self.run = track, evaluator.model, evaluator.run

    def measured(self) -> list[Row]:
        """Return the record of each trial; the keep-sets of all are kept as the run's `keeps.npz`."""
        chosen, name = self._chosen(), self._name("plain")
        searches = {"plain": self.config.search} | {kind: self._search(changes) for kind, changes in chosen.items()}
        keeps = read_keeps(self.run, self.model, {self._name(kind): self.config.ratio for kind in searches})
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
        keep = select_calibrated(self.model, self.calibrated, self.config.estimator, self.config.ratio, search).keep
        return plan_of(costs, {structure: kept.sum(axis=1).tolist() for structure, kept in keep.items()})

    def _select(self, search: SearchConfig) -> Selection:
        config = self.config
        return select_path(
            self.model,
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
        """Return the seconds of a forward pass of both models cut, and their runs of equal layers.

        The models take turns at the clock; the medians of some rounds say how steady it was.
        """
        if known := next((t for t in self.run.record.get("trials", []) if "seconds" in t), None):
            return {name: known[name] for name in ("seconds", "tokens", "runs")}
        models = [cut(self.model, keep) for keep in (plain, other)]
        tokens = next(iter(self.evaluator.texts.values())).tokens[: self.config.evaluation.batch_size]
        rounds = self.track("time both models cut", range(ROUNDS), ROUNDS)
        seconds = [forward_seconds(models, tokens, repeats=self.config.repeats) for _ in rounds]
        return {
            "seconds": [list(each) for each in zip(*seconds, strict=True)],
            "tokens": int(tokens.size),
            "runs": [len(each.runs) for each in models],
        }
