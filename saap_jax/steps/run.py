"""Running chains: what they begin with in common is done once, and what is costly is kept.

A state is known by a digest of all that it was made from: the model, the text, the steps up to it with their options
and their code, the share that is to be gone. States are kept in memory, scores and keep-sets of costly steps in a cache
where there is one; to go on after a kill is to look up.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from saap_jax.estimation.base import Estimator
from saap_jax.estimation.registry import code_of
from saap_jax.runtime.digests import code_digest
from saap_jax.runtime.progress import Track, quiet
from saap_jax.steps.allocation.allocation import Allocation, choose, most_removable
from saap_jax.steps.base import Context, Forgetful, State, Step, Store
from saap_jax.steps.chain import Chain, limits_of
from saap_jax.steps.limits import Within
from saap_jax.steps.score.calibrate import Calibrated, Wanted, calibrate
from saap_jax.steps.score.fusion import Fused
from saap_jax.steps.score.score import Score, Stable
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import Remat, Scores


@runtime_checkable
class Cache(Protocol):
    """Keeps arrays by a digest of what they were made from: `runs.cache.Cache`."""

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the arrays of a key; None where there are none."""
        ...

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a key."""
        ...


def digest(*parts: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Runner:
    """The chains of a job on one model and one calibration text."""

    def __init__(
        self,
        subject: Subject,
        scenarios: Mapping[str, Examples],
        chains: Sequence[Chain] = (),
        *,
        key: str = "",
        cache: Cache | None = None,
        batch_size: int = 8,
        remat: Remat = "dots",
        track: Track = quiet,
        open_end: bool = False,
    ) -> None:
        """Take what chains run on.

        Args:
            chains: all that will be run, so that one pass observes what all of them ask of the unpruned model.
            key: digest of the model and the text, where there is a cache.
            open_end: the ratio at the end is not known on the way, as where targets say how much goes; steps that
                look ahead then go by the ratio of the round.
        """
        self.open_end = open_end
        self.subject, self.scenarios, self.cache = subject, scenarios, cache
        self.batch_size, self.track = batch_size, track
        self.remat: Remat = remat
        self.steps: dict[str, Score] = {}
        self.stable = False
        self.key = digest(key, batch_size)
        self.given: Mapping[str, Estimator] = MappingProxyType({})
        self._first: Calibrated | None = None
        self._states: dict[str, State] = {}
        for chain in chains:
            self._expect(chain)

    def run(self, chain: Chain, ratio: float) -> State:
        """Run a chain to a share of the prunable parameters.

        Raises:
            ValueError: a ratio that cannot be met, or a step that cannot follow what stands before it.
        """
        return self._to(chain, len(chain.steps), ratio)

    def choose(self, chain: Chain, ratio: float) -> State:
        """Run a chain as far as it chooses which units stay, without the repairs at its end."""
        return self._to(chain, chain.choosing, ratio)

    def scored(self, chain: Chain) -> State:
        """Run a chain as far as it scores the unpruned model."""
        early = [at for at, step in enumerate(chain.steps, 1) if step.kind == "allocation"]
        return self._to(chain, early[0] - 1, 0.0)

    def key_of(self, chain: Chain, ratio: float) -> str:
        """Return a digest of all that a chain's outcome is made from."""
        return self._key(chain.steps, self._start(), ratio, ratio, ())

    def _start(self) -> State:
        return State(self.subject, self.subject.existing, Within(), key=self.key)

    def _expect(self, chain: Chain) -> None:
        """Add what a chain asks of the unpruned model to what the one pass observes."""
        steps = self.steps | {step.text: step for step in chain.scores}
        stable = self.stable or any(isinstance(step, Stable) for step in chain.steps)
        if (len(steps), stable) != (len(self.steps), self.stable):
            self.steps, self.stable, self._first = steps, stable, None

    def _to(self, chain: Chain, end: int, ratio: float) -> State:
        self._expect(chain)
        return self._after(chain.steps[:end], self._start(), ratio, ratio, chain.steps[end:])

    def check(self, chain: Chain, ratios: Sequence[float]) -> None:
        """Raise ValueError for what can be known to fail before any time is spent."""
        rows = sum(self.subject.count(examples)[0] for examples in self.scenarios.values())
        chain.check(self.subject, -(-rows // self.batch_size))
        allocation = next(each for each in chain.steps if isinstance(each, Allocation))
        equal: Scores = {name: np.ones(units.shape) for name, units in self.subject.existing.items()}
        for ratio in ratios:
            choose(self.subject, equal, ratio, allocation, limits_of(chain))

    def most_removable(self, chain: Chain) -> float:
        """Return the largest ratio that a chain can meet whatever the scores, rounded down to four decimals."""
        allocation = next(each for each in chain.steps if isinstance(each, Allocation))
        return most_removable(self.subject, allocation, limits_of(chain))

    # --- steps

    def _key(self, steps: Sequence[Step], start: State, ratio: float, final: float, behind: Sequence[Step]) -> str:
        """Digest what the state behind some steps is made from."""
        made = []
        for at, each in enumerate(steps, 1):
            ahead = each.ahead((*steps[at:], *behind))
            codes = self._code(each.wanted) if isinstance(each, Score) else []
            made.append([each.text, code_digest(type(each), each.source), ahead and ahead.text, codes])
        end = [final, self.open_end] if any(each.looks_ahead for each in steps) else None
        return digest(start.key, made, ratio, end)

    def _after(
        self, steps: Sequence[Step], start: State, ratio: float, final: float, behind: tuple[Step, ...]
    ) -> State:
        """Return the state behind some steps."""
        if not steps:
            return start
        *first, step = steps
        key = self._key(steps, start, ratio, final, behind)
        if key in self._states:
            return self._states[key]

        def before(state: State, ratio: float) -> State:
            return self._after(first, state, ratio, ratio if self.open_end else final, (step, *behind))

        state = start if step.drives else before(start, ratio)
        on = Context(
            dense=self.subject, scenarios=self.scenarios, ratio=ratio, final=final, behind=behind, remat=self.remat,
            batch_size=self.batch_size, track=self.track, observe=self._observe, store=self._store(key),
        )  # fmt: skip
        new = self._kept(step, state, key) or self._done(step, state, on, before, key)
        new = new._replace(key=key)
        if new.subject is not self.subject:  # weights of its own: one such model is held at a time
            self._states = {k: each for k, each in self._states.items() if each.subject is self.subject}
        self._states[key] = new
        return new

    def _done(self, step: Step, state: State, on: Context, before: Any, key: str) -> State:
        new = step(state, on, before)
        if step.costly and self.cache is not None and new.subject is self.subject:
            told = np.frombuffer(json.dumps(dict(new.told)).encode(), np.uint8)
            self.cache.save(key, {f"keep/{name}": kept for name, kept in new.keep.items()} | {"told": told})
        return new

    def _kept(self, step: Step, state: State, key: str) -> State | None:
        """Return what a costly step has come to, if the cache has it."""
        if not (step.costly and self.cache is not None) or (found := self.cache.load(key)) is None:
            return None
        keep = {name: found[f"keep/{name}"] for name in state.keep}
        return state._replace(keep=keep, told=json.loads(found["told"].tobytes()))

    def _store(self, key: str) -> Store:
        return Forgetful() if self.cache is None else _Training(self.cache, digest(key, "training"))

    # --- scores

    def _observe(self, step: Score, state: State, stability: bool) -> Calibrated:
        """Return the scores of a state by a step; of the unpruned model from the one pass for all."""
        if state.subject is self.subject and state.gone is None:
            return self.first()
        key = digest(state.key, "scores", step.text, stability, self._code(step.wanted))
        return self._scores(key, {step.text: step.wanted}, state, stability)

    def first(self) -> Calibrated:
        """Return what the one pass over the unpruned model tells of all chains."""
        if self._first is not None:
            return self._first
        state = State(self.subject, self.subject.existing, Within())
        keys = {label: digest(self.key, "scores", label, self._code(step.wanted)) for label, step in self.steps.items()}
        asi = digest(self.key, "stability")
        found = {label: kept for label, key in keys.items() if (kept := self._load(key)) is not None}
        stability = self._load(asi) if self.stable else None
        if missing := {label: self.steps[label].wanted for label in keys if label not in found}:
            made = self._calibrate(missing, state, self.stable and stability is None)
            for label in missing:
                wanted = missing[label]
                own = {*wanted.parts(tuple(self.subject.existing)).values()} if label == wanted.estimator else {label}
                found[label] = Calibrated(
                    {name: {label: each[label]} for name, each in made.scenarios.items()}, None,
                    {name: {n: fused for n, fused in each.items() if n in own} for name, each in made.fusions.items()},
                )  # fmt: skip
                self._save(keys[label], found[label])
        elif self.stable and stability is None:
            made = self._calibrate({}, state, True)
        else:
            made = None
        if self.stable and stability is None and made is not None:
            stability = made._replace(scenarios={name: {} for name in made.scenarios}, fusions={})
            self._save(asi, stability)
        scenarios = {name: {label: found[label].scenarios[name][label] for label in keys} for name in self.scenarios}
        fusions = {name: {n: fused for label in keys for n, fused in found[label].fusions.get(name, {}).items()}
                   for name in self.scenarios}  # fmt: skip
        if stability is None:
            self._first = Calibrated(scenarios, None, fusions)
        else:
            self._first = Calibrated(scenarios, stability.stability, fusions, stability.stability_of)
        return self._first

    def _code(self, wanted: Wanted) -> list[str]:
        """Return digests of the code of estimators that are not the package's."""
        return [*map(str, wanted), *(code_of(member) for member in wanted.members(tuple(self.subject.existing)))]

    def _scores(self, key: str, plan: Mapping[str, Wanted], state: State, stability: bool) -> Calibrated:
        if (kept := self._load(key)) is not None:
            return kept
        made = self._calibrate(plan, state, stability)
        self._save(key, made)
        return made

    def _calibrate(self, plan: Mapping[str, Wanted], state: State, stability: bool) -> Calibrated:
        return calibrate(
            state.subject, self.scenarios, plan, given=self.given, stability=stability,
            keep=None if state.gone is None else state.keep, batch_size=self.batch_size, remat=self.remat,
            track=self.track,
        )  # fmt: skip

    def _load(self, key: str) -> Calibrated | None:
        """Return scores that the cache has: arrays of scores `score/SCENARIO/LABEL/STRUCTURE` by number of label."""
        found = None if self.cache is None else self.cache.load(key)
        return None if found is None else unpacked(found)

    def _save(self, key: str, made: Calibrated) -> None:
        if self.cache is not None:
            self.cache.save(key, packed(made))


def packed(made: Calibrated) -> dict[str, np.ndarray]:
    """Return scores and stability indicators as arrays by number, and what the numbers mean as JSON."""
    places: list[list[str]] = []
    arrays: dict[str, np.ndarray] = {}

    def add(place: list[str], values: Any) -> None:
        arrays[str(len(places))] = np.asarray(values)
        places.append(place)

    for scenario, each in made.scenarios.items():
        for label, scores in each.items():
            for structure, values in scores.items():
                add(["scores", scenario, label, structure], values)
        for structure, values in made.stability_of.get(scenario, {}).items():
            add(["stability", scenario, structure], values)
    for structure, values in (made.stability or {}).items():
        add(["stability", "", structure], values)
    fusions = {
        scenario: {name: fused._replace(scores={}, trajectory=None)._asdict() for name, fused in each.items()}
        for scenario, each in made.fusions.items()
    }
    for scenario, each in made.fusions.items():
        for name, fused in each.items():
            for member, sigmas in (fused.trajectory or {}).items():
                add(["fusion", scenario, name, member], sigmas)
    about = {"places": places, "scenarios": list(made.scenarios), "fusions": fusions}
    return arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}


def unpacked(arrays: Mapping[str, np.ndarray]) -> Calibrated:
    """Return what `packed` wrote."""
    about = json.loads(arrays["about"].tobytes())
    scenarios: dict[str, dict[str, Scores]] = {name: {} for name in about["scenarios"]}
    stability: dict[str, Scores] = {}
    trajectories: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for number, (what, scenario, *rest) in enumerate(about["places"]):
        if what == "scores":
            scenarios[scenario].setdefault(rest[0], {})[rest[1]] = arrays[str(number)]
        elif what == "fusion":
            trajectories.setdefault((scenario, rest[0]), {})[rest[1]] = arrays[str(number)]
        else:
            stability.setdefault(scenario, {})[rest[0]] = arrays[str(number)]
    fusions = {
        scenario: {name: Fused(**{**fused, "trajectory": trajectories.get((scenario, name))})
                   for name, fused in each.items()}
        for scenario, each in about["fusions"].items()
    }  # fmt: skip
    return Calibrated(scenarios, stability.pop("", None), fusions, stability)


class _Training:
    """What the training of a step has come to, in a cache."""

    def __init__(self, cache: Cache, key: str) -> None:
        self.cache, self.key = cache, key

    def load(self) -> dict[str, np.ndarray]:
        """Return its arrays; none where there are none."""
        return self.cache.load(self.key) or {}

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays in place of those that are there."""
        self.cache.save(self.key, arrays)
