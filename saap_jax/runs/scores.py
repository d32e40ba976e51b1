"""Scores that a run keeps: made once, read by whoever takes the run up again or prunes by it; and a run in a session.

| file of a run                     | content                                                                     |
|-----------------------------------|-----------------------------------------------------------------------------|
| `scores.npz`                      | `SCENARIO/ESTIMATOR/STRUCTURE`, `[layers, units]`                           |
| `statistics/SCENARIO.safetensors` | what was observed, so that a new formula or fusion needs no new pass        |
| `ablation.jsonl`                  | the exact changes of the loss that `saap fidelity` holds scores against     |
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.jobs import ScoreConfig
from saap_jax.errors import reading
from saap_jax.estimation.ablation import changes_from_lines, changes_to_scores
from saap_jax.estimation.base import Statistic
from saap_jax.estimation.observe import union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, code_of, code_of_statistic, make_estimators
from saap_jax.records import Row, RunRecord
from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from saap_jax.runtime.files import read_json
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Passes, Track, quiet
from saap_jax.steps.score.calibrate import (
    Calibrated,
    Scored,
    joined,
    score_examples,
    score_plan,
)
from saap_jax.steps.score.oracles import is_oracle
from saap_jax.steps.score.score import Plan, make_members
from saap_jax.steps.score.stability import reduce_scenarios
from saap_jax.subjects.base import Examples, Subject, explained
from saap_jax.types import Scores
from saap_jax.wings import wing

ByScenario = dict[str, dict[str, Scores]]
"""`{scenario: {estimator: {structure: [layers, units]}}}`."""


def kept_scores(
    run: RunDirectory,
    subject: Subject,
    scenarios: Mapping[str, Examples],
    config: ScoreConfig,
    plan: Plan,
    track: Track = quiet,
) -> Calibrated:
    """Make the scores of a run, and keep the statistics that the configuration wants kept.

    A scenario whose statistics the run holds is not observed again. Statistics are in memory for one scenario at a
    time.
    """
    files = wing("statistics_files")
    made = {}
    needs = union_of_needs(make_members(plan, tuple(subject.existing)).values())
    for name, examples in scenarios.items():
        path = statistics_path(run.path, name)
        known = run.has(str(path.relative_to(run.path)))
        known = known and {need.name for need in needs} <= files.kept_statistics(path)  # more than the small ones
        passes = Passes(config.calibration.batch_size, config.remat, track, name if len(scenarios) > 1 else "")
        kept = None
        if known:
            kept = files.load_statistics(path, subject.weights, needs)
        with explained("calibration", subject, {name: examples}, passes.batch_size):
            statistics, made[name] = score_examples(subject, examples, plan, passes, statistics=kept)
        if config.keep_statistics != "none" and not known and statistics is not None:
            run.claim(path.parent.name)
            every = config.keep_statistics == "all"
            wanted = frozenset(each for each in statistics.values if every or not each.large)
            files.save_statistics(path, statistics, only=wanted)
    return joined(made)


def rescored(source: str, subject: Subject, plan: Plan) -> Calibrated:
    """Score by what another run keeps, without a pass over any text.

    Its statistics are scored anew; an estimator whose statistics the run did not keep, but whose scores it did, has
    these scores, also as a member of a fusion.

    Raises:
        FileNotFoundError: no run there, or one that kept no statistics.
        ValueError: statistics of another model, or neither scores nor statistics of an estimator.
    """
    made: dict[str, Scored] = {}
    members = make_members(plan, tuple(subject.existing))
    if oracles := [member for member in members if is_oracle(member)]:
        raise ValueError(f"from_run: {oracles[0]!r} takes passes over the examples, not statistics; leave it out")
    kept = kept_by(source)
    needs = union_of_needs(members.values())
    for name in members:
        if not kept.serves(name):
            able = ", ".join(each for each in ESTIMATORS if kept.serves(each))
            missing = ", ".join(need.name for need in sorted(members[name].needs))
            raise ValueError(
                f"from_run: {source} kept neither scores of {name} nor the statistics that it needs "
                f"({missing}), by the code that there is now; it serves {able}. For others, run `saap score` with them "
                "among --estimators and --keep-statistics all"
            )
    for name in kept.statistics:
        own = {
            each: kept.scores[name][each] for each, estimator in members.items() if kept.missing(estimator.needs, name)
        }
        path = statistics_path(Path(source), name)
        weights = subject.weights
        try:
            observed = wing("statistics_files").load_statistics(path, weights, needs)
            made[name] = score_plan(weights, observed, plan, known=own)
        except ValueError as error:
            raise ValueError(f"from_run {source}: {error}") from None
    return joined(made)


class KeptStatistics(NamedTuple):
    """What a run keeps for later scoring."""

    statistics: dict[str, frozenset[str]]
    """Their names, of each scenario."""
    scores: ByScenario
    codes: Mapping[str, str]
    """What the run was of, with `code of NAME`: the digest of an estimator's file, or of a statistic's."""

    def serves(self, member: str) -> bool:
        """Say whether an estimator, no fusion, can be scored in every scenario, or has been by the same code."""
        needs = make_estimators([member])[member].needs
        same = self.codes.get(f"code of {member}", "") == code_of(member)
        return all(
            not self.missing(needs, name) or (same and member in self.scores.get(name, {})) for name in self.statistics
        )

    def missing(self, needs: Iterable[Statistic], scenario: str) -> list[str]:
        """Name the statistics that were not kept of a scenario, or were observed by other code than there is now."""
        held = self.statistics[scenario]
        return sorted(
            need.name
            for need in needs
            if need.name not in held
            or self.codes.get(f"code of the statistic {need.name}", "") != code_of_statistic(need)
        )


def kept_by(source: str) -> KeptStatistics:
    """Read what a run keeps for later scoring.

    Raises:
        FileNotFoundError: no run there, or one that kept no statistics.
        ValueError: no run of `saap score`.
    """
    run = RunDirectory(Path(source), read_run(source))
    statistics = {}
    with reading(f"{source}/run.json", "scenarios by name"):
        names = list(run.record.get("scenarios", {}))
    if not names:
        raise ValueError(f"from_run: expected a run of `saap score`, got {source} without scenarios")
    for name in names:
        path = statistics_path(run.path, name)
        if not broadcast(path.exists):
            raise FileNotFoundError(
                f"from_run: expected statistics at {path}, found none; run `saap score` with --keep-statistics all"
            )
        statistics[name] = wing("statistics_files").kept_statistics(path)
    if run.has("scores.npz"):
        scores = read_scores(run).scenarios
    else:
        scores = {}
    return KeptStatistics(statistics, scores, run.record.get("inputs", {}))


def served(source: str, plan: Plan) -> list[str]:
    """List those entries of a plan that can be scored by what a run keeps."""
    kept = kept_by(source)
    return [label for label, wanted in plan.items() if all(map(kept.serves, wanted.members()))]


def statistics_path(run: Path, scenario: str) -> Path:
    """Name the file where a run keeps the statistics of a scenario."""
    return run / "statistics" / f"{scenario}.safetensors"


def save_scores(run: RunDirectory, calibrated: Calibrated) -> None:
    """Keep scores, and how fusions came about (in `run.json`)."""
    fusions = {
        scenario: {name: fused._asdict() | {"scores": None} for name, fused in each.items()}
        for scenario, each in calibrated.fusions.items()
        if each
    }
    run.update(fusions=fusions)
    flat = {
        f"{scenario}/{name}/{structure}": value
        for scenario, scored in calibrated.scenarios.items()
        for name, scores in scored.items()
        for structure, value in scores.items()
    }
    run.save_arrays("scores", flat)


def read_scores(run: RunDirectory) -> Calibrated:
    """Read the scores that a run keeps.

    Raises:
        FileNotFoundError: it keeps none.
        ValueError: a damaged file, an array of another name, or one that is no matrix of numbers.
    """
    scenarios: ByScenario = {}
    for key, value in run.load_arrays("scores").items():
        structure = max((name for name in run.structures if key.endswith(f"/{name}")), key=len, default="")
        scenario, _, estimator = key.removesuffix(f"/{structure}").partition("/")  # both of the latter may hold slashes
        if not (scenario and structure and estimator) or value.ndim != 2 or value.dtype.kind not in "iuf":
            raise ValueError(
                f"expected numbers [layers, units] named scenario/estimator/structure, got {key!r} of shape "
                f"{value.shape} in {run.path / 'scores.npz'}; score again with --overwrite"
            )
        scenarios.setdefault(scenario, {}).setdefault(estimator, {})[structure] = value
    return Calibrated(scenarios, {}, {})


def read_changes(run: RunDirectory) -> tuple[dict[str, Scores], Scores]:
    """Read the scores that a run keeps, scenarios reduced, and the exact changes, NaN where none was measured.

    Empty where it has not come that far.
    """
    file = run.path / "ablation.jsonl"
    if not (run.has("scores.npz") and file.exists()):
        return {}, {}
    scenarios = read_scores(run).scenarios
    scores = {
        name: reduce_scenarios({scenario: each[name] for scenario, each in scenarios.items()}, "mean")
        for name in next(iter(scenarios.values()))
    }
    like = {name: np.ones(np.shape(values), bool) for name, values in next(iter(scores.values())).items()}
    return scores, changes_to_scores(changes_from_lines(file.read_text()), like)


# --- a run in a Python session ---------------------------------------------------------------------


class Run(NamedTuple):
    """A run directory of any kind, read."""

    path: Path
    record: RunRecord
    """The content of `run.json`."""
    candidates: list[Row]
    """What was measured of each candidate, in order; empty of a run that measures none."""

    @property
    def finished(self) -> bool:
        """Say whether the run has ended."""
        return self.record.get("status") == "finished"

    def scores(self) -> Calibrated:
        """Read the scores that the run keeps.

        Raises:
            FileNotFoundError: it keeps none.
        """
        return read_scores(RunDirectory(self.path, self.record))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield what was measured of each candidate, the unpruned model first; nested fields under `NAME/KEY`.

        Of `fidelity`, which has no candidates, the correlations; of `score` mean and range of each layer. Values of
        single windows are left out.
        """
        if "dense" in self.record:
            dense = [{"candidate": "dense", **self.record["dense"]}]
        else:
            dense = []
        measured: Sequence[Mapping[str, Any]] = [*dense, *self.candidates]
        if (file := self.path / "fidelity.json").exists():
            measured = read_json(file)
        elif not measured and (self.path / "scores.npz").exists():
            measured = [
                {
                    "scenario": scenario,
                    "estimator": estimator,
                    "structure": structure,
                    "layer": layer,
                    "units": len(there),
                }
                | {name: float(of(there)) for name, of in (("mean", np.mean), ("lowest", np.min), ("highest", np.max))}
                for scenario, scored in self.scores().scenarios.items()
                for estimator, scores in scored.items()
                for structure, values in scores.items()
                for layer, row in enumerate(values)
                if len(there := row[~np.isnan(row)])
            ]
        flat = [*map(_flat, measured)]
        names = dict.fromkeys(name for row in flat for name in row)
        for row in flat:
            yield {name: row.get(name) for name in names}

    def __repr__(self) -> str:
        kind = self.record.get("kind", "run")
        status = self.record.get("status")
        return f"Run({str(self.path)!r}, {kind}, {status}, {len(self.candidates)} candidates)"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put nested fields under `NAME/KEY`, and leave lists out."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": one for key, one in value.items()}
        else:
            found |= {name: value}
    return {name: value for name, value in found.items() if not isinstance(value, list | Mapping)}


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    >>> from saap_jax.runs.directory import RunDirectory
    >>> _ = RunDirectory.open(folder / "begun", {"kind": "compare"}).begin()
    >>> load_run(folder / "begun").finished
    False

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its record is damaged, or of another version.
    """
    return Run(Path(path), read_run(path), read_candidates(path))
