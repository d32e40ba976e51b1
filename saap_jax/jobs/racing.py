"""A race over the evaluation texts: who is surely worse than another candidate of its ratio is evaluated no further.

Windows come in a random order that is always the same. Every lap is a line of `race.jsonl`, so that a run that was
killed goes on where it was; verdicts follow from the losses alone, see `evaluation.race`. A candidate whose kept
weights are corrected has a model of its own, and is evaluated on all windows as soon as it is made.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.method import EvaluationConfig
from saap_jax.evaluation.race import Verdict, race
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.sweep import Evaluator, Row, digest_of
from saap_jax.runs.records import RaceRecord
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.files import append_line, decoded, encoded, lines_of
from saap_jax.runtime.processes import broadcast, is_primary
from saap_jax.runtime.progress import Track, quiet
from saap_jax.subjects.base import Examples, Subject, run_losses
from saap_jax.types import Keep, WindowLosses

RACE = "race.jsonl"


class Laps(NamedTuple):
    """What has been evaluated of a keep-set."""

    losses: dict[str, list[float]]
    """By metric, of the windows in the order of the race."""
    seconds: float


def field_of(about: Mapping[str, Row]) -> dict[float, dict[str, list[str]]]:
    """Return who runs against whom."""
    found: dict[float, dict[str, list[str]]] = {}
    for name, row in about.items():
        found.setdefault(row["ratio_asked"], {}).setdefault(row["variant"], []).append(name)
    return found


def check_race(subject: Subject, texts: Mapping[str, Examples], config: EvaluationConfig) -> None:
    """Raise ValueError for too few windows of the text that judges."""
    looks_of(subject.count(texts[judging_of(texts)])[0], config.batch_size)


def judging_of(texts: Mapping[str, Any]) -> str:
    """Return the metric that judges a race: that of another domain, where there is one."""
    return [*texts][:2][-1]


class Race:
    """The candidates of a run, and what of them has been evaluated; the run holds the unpruned model's record."""

    def __init__(
        self,
        evaluator: Evaluator,
        keeps: Mapping[str, Keep],
        about: Mapping[str, Row],
        *,
        margin: float,
        track: Track = quiet,
        stage: Stage | None = None,
    ):
        """Take up what the run holds.

        Args:
            keeps: by the name of the candidate.
            about: what a record says beside what is measured, with the variant and the ratio.
            margin: nats a token that count as no difference.
        """
        self.evaluator, self.keeps, self.about, self.margin = evaluator, keeps, about, margin
        self.track, self.stage = track, stage
        self.digests = {name: digest_of(keeps[name], about[name]) for name in about}
        self.first = {digest: name for name, digest in reversed(self.digests.items())}
        self.judging = judging_of(evaluator.texts)
        self.rows = evaluator.rows[self.judging]
        self.looks = looks_of(self.rows, evaluator.batch_size)
        self.orders = {name: np.random.default_rng(0).permutation(rows) for name, rows in evaluator.rows.items()}
        self.field = field_of(about)
        self.path = evaluator.run.claim(RACE)
        self.laps = {
            digest: laps
            for digest, laps in read_laps(self.path, [*evaluator.texts]).items()
            if self._whole(laps, digest)
        }

    def run(self) -> list[RaceRecord]:
        """Evaluate lap after lap until every race has ended, and record the candidates."""
        while any((verdicts := self._verdicts())[ratio].next for ratio in self.field):
            for ratio, verdict in verdicts.items():
                if verdict.next:
                    self._lap(ratio, verdict)
        for ratio, verdict in verdicts.items():
            self._rest(ratio, verdict)
        self._record()
        return [self._summary(ratio, verdict) for ratio, verdict in verdicts.items()]

    def _lap(self, ratio: float, verdict: Verdict) -> None:
        """Evaluate those that are left of a ratio up to the next look.

        Who is evaluated together follows from the verdict alone, and not from what a killed run has done of the lap.
        """
        before = max((look for look in self.looks if look < verdict.next), default=0)
        self._evaluate(ratio, verdict, before, verdict.next)

    def _rest(self, ratio: float, verdict: Verdict) -> None:
        """Evaluate those that are left of a race, which may end before its last look, on all windows."""
        self._evaluate(ratio, verdict, max(verdict.windows[number] for number in verdict.left), self.rows)

    def _evaluate(self, ratio: float, verdict: Verdict, before: int, stop: int) -> None:
        """Evaluate those that are left up to a window, together who has as many of those before."""
        variants = [*self.field[ratio].values()]
        digests = list(dict.fromkeys(self.digests[name] for number in verdict.left for name in variants[number]))
        groups: dict[int, list[str]] = {}
        for digest in digests:
            if "/" not in digest:
                have = self._have(digest)
                groups.setdefault(have if before < have < stop else min(have, before), []).append(digest)
        for start, members in groups.items():
            if start < stop:
                self._masked(members, start, stop)
        self._corrected([digest for digest in digests if "/" in digest and not self._have(digest)])

    def _have(self, digest: str) -> int:
        """Count the windows of the judging text that a keep-set has been evaluated on."""
        return len(self.laps[digest].losses[self.judging]) if digest in self.laps else 0

    def _verdicts(self) -> dict[float, Verdict]:
        return {ratio: race([self._losses(names) for names in variants.values()], self.looks, margin=self.margin)
                for ratio, variants in self.field.items()}  # fmt: skip

    def _losses(self, names: list[str]) -> np.ndarray:
        """Return `[seeds, windows]` of a variant, as many windows as all its seeds have."""
        digests = [self.digests[name] for name in names]
        count = min(map(self._have, digests))
        return np.array([self.laps[digest].losses[self.judging][:count] if count else [] for digest in digests])

    def _windows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return which rows of each text a lap is of; the other text keeps pace with the one that judges."""
        rows = self.evaluator.rows
        ends = {name: [-(-at * rows[name] // self.rows) for at in (start, stop)] for name in rows}
        return {name: self.orders[name][first:last] for name, (first, last) in ends.items()}

    def _whole(self, laps: Laps, digest: str) -> bool:
        """Say whether laps that were read are of as many windows of each text as a look takes, or else to do again."""
        counts = {name: len(values) for name, values in laps.losses.items()}
        stop, looks = counts[self.judging], (self.rows,) if "/" in digest else self.looks
        return stop in looks and counts == {name: len(rows) for name, rows in self._windows(0, stop).items()}

    def _text(self, windows: Mapping[str, np.ndarray]) -> Examples:
        subject, texts = self.evaluator.subject, self.evaluator.texts
        return subject.join([subject.rows(texts[name], rows) for name, rows in windows.items() if len(rows)])

    def _split(self, windows: Mapping[str, np.ndarray], losses: WindowLosses) -> dict[str, list[float]]:
        ends = np.cumsum([len(rows) for rows in windows.values()])[:-1]
        return {name: part.tolist() for name, part in zip(windows, np.split(losses.means, ends), strict=True)}

    def _masked(self, digests: list[str], start: int, stop: int) -> None:
        """Evaluate some windows of keep-sets, several at once, but of groups of which all have been evaluated."""
        at_once, windows = self.evaluator.at_once, self._windows(start, stop)
        text, doing = self._text(windows), f"race: {len(digests)} keep-sets to window {stop} of {self.rows}"
        sets = [self.keeps[self.first[digest]] for digest in digests]
        filled = sets + sets[-1:] * (at_once - len(sets))  # one shape: fewer would be another program
        done = {number for number, digest in enumerate(digests) if self._have(digest) >= stop}
        began = time.perf_counter()
        for group in self.evaluator.subject.losses(
            text,
            filled,
            batch_size=self.evaluator.batch_size,
            done=done | set(range(len(sets), len(filled))),
            at_once=at_once,
            progress=lambda steps: self.track(doing, steps, len(steps)),
        ):
            members = {number: losses for number, losses in group.items() if number < len(sets)}
            seconds = (time.perf_counter() - began) / max(len(members), 1)
            self._count(len(members), text)
            for number, losses in members.items():
                if number not in done:
                    self._keep(digests[number], Laps(self._split(windows, losses), seconds))
            began = time.perf_counter()

    def _corrected(self, digests: list[str]) -> None:
        """Evaluate keep-sets with weights of their own on all windows."""
        windows = self._windows(0, self.rows)
        text = self._text(windows)
        for digest in self.track("compensate and evaluate", digests, len(digests)) if digests else ():
            name, began = self.first[digest], time.perf_counter()
            model = self.evaluator.compensated(self.about[name], self.keeps[name])
            losses = run_losses(model, text, self.keeps[name], self.evaluator.batch_size)
            self._count(1, text)
            self._keep(digest, Laps(self._split(windows, losses), time.perf_counter() - began))

    def _count(self, members: int, text: Examples) -> None:
        if self.stage is not None:
            self.stage.tokens += members * self.evaluator.subject.count(text)[1]

    def _keep(self, digest: str, laps: Laps) -> None:
        """Add a lap to what is known, and to the run's file."""
        line = {"keep": digest, "window": self._have(digest), "seconds": laps.seconds, "losses": laps.losses}
        if is_primary():
            append_line(self.path, encoded(line))
        _add(self.laps, digest, Laps(**{key: decoded(encoded(line))[key] for key in Laps._fields}))

    # --- records

    def _record(self) -> None:
        """Append the records that the run does not hold, or holds otherwise."""
        run = self.evaluator.run
        known, firsts = {row["candidate"]: row for row in run.candidates()}, {}
        for name, digest in self.digests.items():
            same = firsts.setdefault(digest, name)
            row = {
                "candidate": name,
                **self.evaluator.about_keep(name, self.keeps[name], self.about[name], digest),
                **self._measured(self.laps[digest]),
                "same_as": None if same == name else same,
            }
            if decoded(encoded(row)) != known.get(name):
                run.append(row)
        self.evaluator.asked |= self.digests.keys()

    def _measured(self, laps: Laps) -> Row:
        """Return what was measured of a keep-set: of all windows in their order, or what some of them let expect."""
        dense, ppl, losses = self.evaluator.run.record[DENSE]["losses"], {}, {}
        for name, values in laps.losses.items():
            order, whole = self.orders[name][: len(values)], np.asarray(dense[name], np.float64)
            own = np.asarray(values, np.float64)
            with np.errstate(invalid="ignore"):
                ppl[name] = scale_of(name).value(whole.mean() + (own - whole[order]).mean())
            if len(values) == len(whole):
                inverse = np.argsort(order)
                losses[name], ppl[name] = own[inverse].tolist(), scale_of(name).value(own.mean())
        partial = {} if self.judging in losses else {"windows": len(laps.losses[self.judging])}
        return {"ppl": ppl, **(partial or {"losses": losses}), "seconds": laps.seconds}

    def _summary(self, ratio: float, verdict: Verdict) -> RaceRecord:
        variants = [*self.field[ratio]]
        evaluated = {self.digests[name]: None for names in self.field[ratio].values() for name in names}
        return {
            "ratio": ratio,
            "metric": self.judging,
            "left": [variants[number] for number in verdict.left],
            "windows": dict(zip(variants, verdict.windows, strict=True)),
            "p_values": dict(zip(variants, verdict.p_values, strict=True)),
            "ending": verdict.ending,
            "budget": self.rows,
            "evaluated": sum(map(self._have, evaluated)),
            "keep_sets": len(evaluated),
        }


def looks_of(rows: int, batch_size: int) -> tuple[int, ...]:
    """Return after how many windows a race is looked at: after each batch, from `FEWEST` windows on.

    >>> looks_of(24, 8), looks_of(30, 8), looks_of(20, 3)
    ((8, 16, 24), (8, 16, 24, 30), (9, 12, 15, 18, 20))

    Raises:
        ValueError: too few windows for a race.
    """
    if rows < FEWEST:
        raise ValueError(f"evaluation.windows: expected at least {FEWEST} for a race, got {rows}; or --no-race")
    first = math.ceil(FEWEST / batch_size) * batch_size
    return (*range(first, rows, batch_size), rows)


def read_laps(path: Path, metrics: list[str]) -> dict[str, Laps]:
    """Read what was evaluated of each keep-set; a line that is damaged, and what follows it of its keep-set, is not."""
    found: dict[str, Laps] = {}
    lines = broadcast(lambda: [lap for lap in lines_of(path) if isinstance(lap, dict)] if path.exists() else [])
    for lap in lines:
        try:
            laps = Laps({name: [float(x) for x in lap["losses"][name]] for name in metrics}, float(lap["seconds"]))
            digest, start = str(lap["keep"]), lap["window"]
        except (ValueError, TypeError, KeyError):
            continue
        known = found[digest].losses[judging_of(dict.fromkeys(metrics))] if digest in found else []
        if start == len(known):
            _add(found, digest, laps)
    return found


def _add(found: dict[str, Laps], digest: str, laps: Laps) -> None:
    before = found.get(digest, Laps({}, 0.0))
    joined: dict[str, Any] = {name: before.losses.get(name, []) + new for name, new in laps.losses.items()}
    found[digest] = Laps(joined, before.seconds + laps.seconds)
