"""A race over the evaluation texts: who is surely worse than another of those it races with is evaluated no further.

Windows come in a random order that is always the same; verdicts follow from the losses alone, see `evaluation.race`.
The unpruned model may race too: its losses are known, and with a handicap it is a limit. A candidate whose weights were
changed has a model of its own, and is evaluated on all windows as soon as it is made.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from saap_jax.evaluation.race import RaceState, race_state
from saap_jax.evaluation.resample import FEWEST, LEVEL
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.candidates import Candidate, Candidates, Row, deciding, figure, record
from saap_jax.jobs.losses import losses_of
from saap_jax.records import RaceRecord
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE

Field = Mapping[str, Sequence[str]]
"""Who race with each other: names of candidates, one a seed, by variant; the unpruned model is `{DENSE: [DENSE]}`."""


@dataclasses.dataclass
class Lap:
    """The windows that a model has been evaluated on so far."""

    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By metric, in nats a token, in the order of the race."""
    seconds: float = 0.0
    parameters: int = 0


@dataclasses.dataclass
class Race:
    """The candidates of a run, and how far each has been evaluated; the run holds the unpruned model's record."""

    candidates: Candidates
    margin: float
    """Nats a token that count as no difference."""
    metric: str
    """That decides."""
    rows: int
    """The number of windows of its text."""
    looks: tuple[int, ...]
    """The number of windows before each look at the race."""
    orders: dict[str, Int[np.ndarray, "windows"]]
    """The order of the windows, by metric."""
    laps: dict[str, Lap] = dataclasses.field(default_factory=dict)
    """By digest of a model."""

    def lap(self, name: str) -> Lap:
        """Find how far a candidate has been evaluated; candidates of the same model share it."""
        return self.laps.setdefault(self.candidates.choices[name].model, Lap())

    def count(self, name: str) -> int:
        """Count the windows of the deciding text that a candidate has been evaluated on."""
        return len(self.lap(name).losses.get(self.metric, []))

    def dense(self, metric: str) -> Float[np.ndarray, "windows"]:
        """Read the losses of the unpruned model, in the order of the text."""
        return np.asarray(self.candidates.run.record[DENSE]["losses"][metric], np.float64)


def start_race(candidates: Candidates, margin: float) -> Race:
    """Prepare a race; `margin` are nats a token that count as no difference.

    Raises:
        ValueError: too few windows for a race.
    """
    metric = deciding(candidates.rows)
    rows = candidates.rows[metric]
    looks = looks_of(rows, candidates.evaluation.batch_size)
    orders = {name: np.random.default_rng(0).permutation(count) for name, count in candidates.rows.items()}
    return Race(candidates, margin, metric, rows, looks, orders)


def race_ratios(race: Race, ratios: Sequence[float], candidates: Sequence[Candidate], stage: Stage) -> None:
    """Let the candidates of each ratio race, and record the races and all candidates."""
    run = race.candidates.run
    run.update(race=[_race_ratio(race, ratio, candidates, stage) for ratio in ratios])
    for candidate in candidates:
        record(race.candidates, candidate.name, candidate.about, measured(race, candidate.name))


def _race_ratio(race: Race, ratio: float, candidates: Sequence[Candidate], stage: Stage) -> RaceRecord:
    """Let the candidates of a ratio race, and evaluate those that are left on all windows."""
    field: dict[str, list[str]] = {}
    for each in candidates:
        if each.ratio == ratio:
            field.setdefault(each.chain.name, []).append(each.name)
    doing = f"race at {100 * ratio:g} %"
    (verdict,) = run_fields(race, [field], doing, stage)
    evaluate_to(race, dict.fromkeys(left_of(field, verdict), race.rows), doing, stage)
    variants = [*field]
    names = [name for seeds in field.values() for name in seeds]
    return {
        "ratio": ratio,
        "left": [variants[number] for number in verdict.left],
        "windows": dict(zip(variants, verdict.windows, strict=True)),
        "ending": verdict.ending,
        **counted(race, names),
    }


def run_fields(
    race: Race,
    fields: Sequence[Field],
    doing: str,
    stage: Stage | None,
    *,
    level: float = LEVEL,
    handicap: float = 0.0,
) -> list[RaceState]:
    """Evaluate lap after lap, those of all fields together, until every race has ended.

    Args:
        level: of each field, see `evaluation.race`.
        handicap: nats a token that are added to each loss of the unpruned model.
    """
    verdicts: dict[int, RaceState] = {}
    while True:
        stops: dict[str, int] = {}
        for number, field in enumerate(fields):
            verdict = verdicts.get(number)
            if verdict is None or verdict.next:
                losses = [_stacked(race, names, handicap) for names in field.values()]
                verdict = race_state(losses, race.looks, level=level, margin=race.margin)
                verdicts[number] = verdict
            if verdict.next:
                stops |= dict.fromkeys(left_of(field, verdict), verdict.next)
        if not stops:
            return [verdicts[number] for number in range(len(fields))]
        evaluate_to(race, stops, doing, stage)


def evaluate_to(race: Race, stops: Mapping[str, int], doing: str, stage: Stage | None) -> None:
    """Evaluate each candidate up to a window, together those that have as many of those before. To the last one
    those that are left, also where a race ends early.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for name, stop in stops.items():
        if name == DENSE:
            continue
        end = race.rows
        if race.candidates.choices[name].masked:
            end = stop
        groups.setdefault((race.count(name), end), []).append(name)
    for (start, end), names in groups.items():
        if start >= end:
            continue
        said = f"{doing}: {len(names)} candidates to window {end} of {race.rows}"
        found = losses_of(race.candidates, names, _windows(race, start, end), said, stage)
        # Candidates of the same model have one lap: it grows once.
        models = {race.candidates.choices[name].model: name for name in names}
        for name in models.values():
            lap = race.lap(name)
            for metric, losses in found[name]["losses"].items():
                lap.losses[metric] = [*lap.losses.get(metric, []), *losses]
            lap.seconds += found[name]["seconds"]
            lap.parameters = found[name]["parameters"]


def _windows(race: Race, start: int, stop: int) -> dict[str, Int[np.ndarray, "windows"]]:
    """Choose the rows of each text for a lap; the other text keeps pace with the one that decides."""
    chosen = {}
    for metric, count in race.candidates.rows.items():
        first = math.ceil(start * count / race.rows)
        last = math.ceil(stop * count / race.rows)
        chosen[metric] = race.orders[metric][first:last]
    return chosen


def _stacked(race: Race, names: Sequence[str], handicap: float) -> Float[np.ndarray, "seeds windows"]:
    """Stack the losses of a variant, as many windows as all its seeds have."""
    if DENSE in names:
        return race.dense(race.metric)[None, race.orders[race.metric]] + handicap
    count = min(map(race.count, names))
    return np.array([race.lap(name).losses.get(race.metric, [])[:count] for name in names])


def measured(race: Race, name: str) -> Row:
    """Read the losses of a candidate: of all windows in their order, or figures as some of them let expect, and these
    losses as `seen`, None for the other windows."""
    lap = race.lap(name)
    ppl = {}
    lists = {}
    for metric, values in lap.losses.items():
        dense = race.dense(metric)
        order = race.orders[metric][: len(values)]
        own = np.asarray(values, np.float64)
        if len(values) == len(dense):
            ppl[metric] = figure(metric, own)
        else:
            # The differences from the unpruned model vary less between windows than the losses do.
            with np.errstate(invalid="ignore"):
                ppl[metric] = scale_of(metric).value(dense.mean() + (own - dense[order]).mean())
        losses = np.full(len(dense), None)
        losses[order] = own.tolist()
        lists[metric] = losses.tolist()
    count = race.count(name)
    row = {"ppl": ppl, "parameters": lap.parameters}
    if count == race.rows:
        row |= {"losses": lists}
    else:
        row |= {"windows": count, "seen": lists}
    return row | {"seconds": lap.seconds}


def counted(race: Race, names: Iterable[str]) -> Row:
    """Count what was evaluated of candidates: windows of the deciding text, of how many, of how many masks."""
    models = {race.candidates.choices[name].model: name for name in names}
    evaluated = sum(map(race.count, models.values()))
    return {"metric": race.metric, "budget": race.rows, "evaluated": evaluated, "keep_sets": len(models)}


def left_of(field: Field, verdict: RaceState) -> list[str]:
    """List the candidates of those variants that are left."""
    variants = [*field.values()]
    left: list[str] = []
    for number in verdict.left:
        left += variants[number]
    return left


def looks_of(rows: int, batch_size: int) -> tuple[int, ...]:
    """Count the windows before each look at a race: after each batch, from `FEWEST` windows on.

    >>> looks_of(24, 8), looks_of(30, 8), looks_of(20, 3)
    ((8, 16, 24), (8, 16, 24, 30), (9, 12, 15, 18, 20))

    Raises:
        ValueError: too few windows for a race.
    """
    if rows < FEWEST:
        raise ValueError(f"evaluation.windows: expected at least {FEWEST} for a race, got {rows}; or --no-race")
    first = math.ceil(FEWEST / batch_size) * batch_size
    return (*range(first, rows, batch_size), rows)
