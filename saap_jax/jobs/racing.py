"""A race over the evaluation texts: who is surely worse than another of those it races with is evaluated no further.

Windows come in a random order that is always the same; verdicts follow from the losses alone, see `evaluation.race`.
The unpruned model may race too: its losses are known, and with a handicap it is a limit. A candidate whose weights were
changed has a model of its own, and is evaluated on all windows as soon as it is made.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from saap_jax.evaluation.race import RaceState, race
from saap_jax.evaluation.resample import FEWEST, LEVEL
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.candidates import Candidate, Evaluator, Row, figure
from saap_jax.records import RaceRecord
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE

Field = Mapping[str, Sequence[str]]
"""Who race with each other: names of candidates, one a seed, by variant; the unpruned model is `{DENSE: [DENSE]}`."""


class Race:
    """What of the candidates of a run has been evaluated; the run holds the unpruned model's record."""

    def __init__(self, evaluator: Evaluator, margin: float) -> None:
        """Take who evaluates; `margin` are nats a token that count as no difference.

        Raises:
            ValueError: too few windows for a race.
        """
        self.evaluator = evaluator
        self.margin = margin
        self.judging, self.rows = evaluator.judging, evaluator.rows[evaluator.judging]
        self.looks = looks_of(self.rows, evaluator.batch_size)
        self.orders = {name: np.random.default_rng(0).permutation(rows) for name, rows in evaluator.rows.items()}
        self.laps: dict[str, dict[str, list[float]]] = {}
        """By model and metric, losses of the windows in the order of the race."""
        self.seconds: dict[str, float] = {}
        self.parameters: dict[str, int] = {}

    def of_ratio(self, ratio: float, candidates: Sequence[Candidate], stage: Stage) -> RaceRecord:
        """Let the candidates of a ratio race, and evaluate those that are left on all windows."""
        field: dict[str, list[str]] = {}
        for each in candidates:
            if each.ratio == ratio:
                field.setdefault(each.chain.name, []).append(each.name)
        doing = f"race at {100 * ratio:g} %"
        (verdict,) = self.run([field], doing, stage)
        self.evaluate(dict.fromkeys(left_of(field, verdict), self.rows), doing, stage)
        names = [*field]
        return {
            "ratio": ratio,
            "left": [names[number] for number in verdict.left],
            "windows": dict(zip(names, verdict.windows, strict=True)),
            "ending": verdict.ending,
            **self.counted(name for each in field.values() for name in each),
        }

    def run(
        self, fields: Sequence[Field], doing: str, stage: Stage | None, *, level: float = LEVEL, handicap: float = 0.0
    ) -> list[RaceState]:
        """Evaluate lap after lap, those of all fields together, until every race has ended.

        Args:
            level: of each field, see `evaluation.race`.
            handicap: nats a token that are added to each loss of the unpruned model.
        """
        verdicts: list[RaceState | None] = [None] * len(fields)
        while True:
            stops: dict[str, int] = {}
            for number, field in enumerate(fields):
                if (verdict := verdicts[number]) is None or verdict.next:
                    losses = [self._losses(names, handicap) for names in field.values()]
                    verdicts[number] = verdict = race(losses, self.looks, level=level, margin=self.margin)
                if verdict.next:
                    stops |= dict.fromkeys(left_of(field, verdict), verdict.next)
            if not stops:
                return [verdict for verdict in verdicts if verdict is not None]
            self.evaluate(stops, doing, stage)

    def evaluate(self, stops: Mapping[str, int], doing: str, stage: Stage | None) -> None:
        """Evaluate each candidate up to a window, together those that have as many of those before. To the last one
        those that are left, also where a race ends early.
        """
        groups: dict[tuple[int, int], list[str]] = {}
        for name, stop in stops.items():
            if name != DENSE:
                end = stop if self.evaluator.masked(name) else self.rows
                groups.setdefault((self._have(name), end), []).append(name)
        for (start, end), names in groups.items():
            if start < end:
                said = f"{doing}: {len(names)} candidates to window {end} of {self.rows}"
                found = self.evaluator.losses(names, self._windows(start, end), said, stage)
                for model, lap in {self.evaluator.models[name]: lap for name, lap in found.items()}.items():
                    before = self.laps.get(model, {})
                    self.laps[model] = {name: [*before.get(name, []), *new] for name, new in lap["losses"].items()}
                    self.seconds[model] = self.seconds.get(model, 0.0) + lap["seconds"]
                    self.parameters[model] = lap["parameters"]

    def _have(self, name: str) -> int:
        """Count the windows of the judging text that a candidate has been evaluated on."""
        return len(self.laps.get(self.evaluator.models[name], {}).get(self.judging, []))

    def _windows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Choose the rows of each text for a lap; the other text keeps pace with the one that judges."""
        rows = self.evaluator.rows
        ends = {name: [-(-at * rows[name] // self.rows) for at in (start, stop)] for name in rows}
        return {name: self.orders[name][first:last] for name, (first, last) in ends.items()}

    def _losses(self, names: Sequence[str], handicap: float) -> np.ndarray:
        """Stack the losses of a variant, `[seeds, windows]`, as many windows as all its seeds have."""
        if DENSE in names:
            return self._dense(self.judging)[None, self.orders[self.judging]] + handicap
        count = min(map(self._have, names))
        models = [self.evaluator.models[name] for name in names]
        return np.array([self.laps[model][self.judging][:count] if count else [] for model in models])

    def _dense(self, metric: str) -> np.ndarray:
        return np.asarray(self.evaluator.run.record[DENSE]["losses"][metric], np.float64)

    def measured(self, name: str) -> Row:
        """Read the losses of a candidate: of all windows in their order, or figures as some of them let expect, and
        these losses as `seen`, None for the other windows."""
        model = self.evaluator.models[name]
        ppl = {}
        losses = {}
        for metric, values in self.laps[model].items():
            whole = self._dense(metric)
            order = self.orders[metric][: len(values)]
            own = np.asarray(values, np.float64)
            with np.errstate(invalid="ignore"):
                expected = scale_of(metric).value(whole.mean() + (own - whole[order]).mean())
            losses[metric] = np.full(len(whole), None)
            losses[metric][order] = own.tolist()
            ppl[metric] = figure(metric, own) if len(values) == len(whole) else expected
        count = self._have(name)
        lists = {metric: values.tolist() for metric, values in losses.items()}
        rest = {"losses": lists} if count == self.rows else {"windows": count, "seen": lists}
        return {"ppl": ppl, "parameters": self.parameters[model], **rest, "seconds": self.seconds[model]}

    def counted(self, names: Iterable[str]) -> Row:
        """Count what was evaluated of candidates: windows of the judging text, of how many, of how many keep-sets."""
        models = {self.evaluator.models[name]: name for name in names}
        evaluated = sum(map(self._have, models.values()))
        return {"metric": self.judging, "budget": self.rows, "evaluated": evaluated, "keep_sets": len(models)}


def left_of(field: Field, verdict: RaceState) -> list[str]:
    """List the candidates of those variants that are left."""
    variants = [*field.values()]
    return [name for number in verdict.left for name in variants[number]]


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
