"""A race over the evaluation texts: who is surely worse than another candidate of its ratio is evaluated no further.

Windows come in a random order that is always the same; verdicts follow from the losses alone, see `evaluation.race`. A
candidate whose weights were changed has a model of its own, and is evaluated on all windows as soon as it is made.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from saap_jax.evaluation.race import RaceState, race
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.candidates import Candidate, Evaluator, Row, figure
from saap_jax.runs.records import RaceRecord
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE


class Race:
    """The candidates of a run, and what of them has been evaluated; the run holds the unpruned model's record."""

    def __init__(
        self, evaluator: Evaluator, candidates: Sequence[Candidate], margin: float, stage: Stage | None
    ) -> None:
        """Take who runs; `margin` are nats a token that count as no difference."""
        self.evaluator, self.margin, self.stage = evaluator, margin, stage
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self.judging, self.rows = evaluator.judging, evaluator.rows[evaluator.judging]
        self.looks = looks_of(self.rows, evaluator.batch_size)
        self.orders = {name: np.random.default_rng(0).permutation(rows) for name, rows in evaluator.rows.items()}
        self.field: dict[float, dict[str, list[str]]] = {}
        for each in candidates:
            self.field.setdefault(each.ratio, {}).setdefault(each.chain.name, []).append(each.name)
        self.laps: dict[str, dict[str, list[float]]] = {}
        """By model and metric, losses of the windows in the order of the race."""
        self.seconds: dict[str, float] = {}

    def run(self) -> list[RaceRecord]:
        """Evaluate lap after lap until every race has ended, and record the candidates."""
        while True:
            verdicts = {
                ratio: race([*map(self._losses, variants.values())], self.looks, margin=self.margin)
                for ratio, variants in self.field.items()
            }
            if not any(verdict.next for verdict in verdicts.values()):
                break
            for ratio, verdict in verdicts.items():
                if verdict.next:
                    self._evaluate(ratio, verdict, verdict.next)
        for ratio, verdict in verdicts.items():  # a race may end before its last look
            self._evaluate(ratio, verdict, self.rows)
        for name, candidate in self.candidates.items():
            self.evaluator.record(name, candidate.about, self._measured(self.evaluator.models[name]))
        return [self._summary(ratio, verdict) for ratio, verdict in verdicts.items()]

    def _evaluate(self, ratio: float, verdict: RaceState, stop: int) -> None:
        """Evaluate those that are left of a ratio up to a window, together who has as many of those before."""
        variants, groups = [*self.field[ratio].values()], {}
        for name in [name for number in verdict.left for name in variants[number]]:
            masked = self.evaluator.masked(name)
            groups.setdefault((self._have(name), stop if masked else self.rows), []).append(name)
        for (start, end), names in groups.items():
            if start < end:
                doing = f"race at {100 * ratio:g} %: {len(names)} candidates to window {end} of {self.rows}"
                found = self.evaluator.losses(names, self._windows(start, end), doing, self.stage)
                self._add({self.evaluator.models[name]: lap for name, lap in found.items()})

    def _add(self, found: Mapping[str, Row]) -> None:
        for model, lap in found.items():
            before = self.laps.get(model, {})
            self.laps[model] = {name: [*before.get(name, []), *new] for name, new in lap["losses"].items()}
            self.seconds[model] = self.seconds.get(model, 0.0) + lap["seconds"]

    def _have(self, name: str) -> int:
        """Count the windows of the judging text that a candidate has been evaluated on."""
        return len(self.laps.get(self.evaluator.models[name], {}).get(self.judging, []))

    def _windows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Choose the rows of each text for a lap; the other text keeps pace with the one that judges."""
        rows = self.evaluator.rows
        ends = {name: [-(-at * rows[name] // self.rows) for at in (start, stop)] for name in rows}
        return {name: self.orders[name][first:last] for name, (first, last) in ends.items()}

    def _losses(self, names: list[str]) -> np.ndarray:
        """Stack the losses of a variant, `[seeds, windows]`, as many windows as all its seeds have."""
        count, models = min(map(self._have, names)), [self.evaluator.models[name] for name in names]
        return np.array([self.laps[model][self.judging][:count] if count else [] for model in models])

    def _measured(self, model: str) -> Row:
        """Read the losses of a candidate: of all windows in their order, or as some of them let expect."""
        dense, ppl, losses = self.evaluator.run.record[DENSE]["losses"], {}, {}
        for name, values in self.laps[model].items():
            order, whole = self.orders[name][: len(values)], np.asarray(dense[name], np.float64)
            own = np.asarray(values, np.float64)
            with np.errstate(invalid="ignore"):
                ppl[name] = scale_of(name).value(whole.mean() + (own - whole[order]).mean())
            if len(values) == len(whole):
                losses[name], ppl[name] = own[np.argsort(order)].tolist(), figure(name, own)
        whole = self.judging in losses
        rest = {"losses": losses} if whole else {"windows": len(self.laps[model][self.judging])}
        return {"ppl": ppl, **rest, "seconds": self.seconds[model]}

    def _summary(self, ratio: float, verdict: RaceState) -> RaceRecord:
        variants = [*self.field[ratio]]
        evaluated = {self.evaluator.models[n]: n for names in self.field[ratio].values() for n in names}
        return {
            "ratio": ratio,
            "metric": self.judging,
            "left": [variants[number] for number in verdict.left],
            "windows": dict(zip(variants, verdict.windows, strict=True)),
            "p_values": dict(zip(variants, verdict.p_values, strict=True)),
            "ending": verdict.ending,
            "budget": self.rows,
            "evaluated": sum(map(self._have, evaluated.values())),
            "keep_sets": len(evaluated),
        }


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
