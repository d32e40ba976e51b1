"""Running chains: what they begin with in common is done once, and what is costly is kept.

A state is known by a digest of all that it was made from: the model, the text, the steps up to it with their options
and their code, the share that is to be gone. States are kept in memory, scores and keep-sets of costly steps in a cache
where there is one; to go on after a kill is to look up.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.estimation.observe import union_of_needs
from saap_jax.estimation.registry import code_of, code_of_statistic
from saap_jax.runtime import progress
from saap_jax.runtime.digests import code_digest
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation.allocation import choose, impossible
from saap_jax.steps.base import Context, Runs, State, Step, Store, TextSize
from saap_jax.steps.chain import Chain, asked_of_first, choices, largest_ratio_of, prefix_of
from saap_jax.steps.limits import Within
from saap_jax.steps.score.calibrate import Calibrated, calibrate, put_together
from saap_jax.steps.score.fusion import Fusion
from saap_jax.steps.score.score import Plan, Score, make_members
from saap_jax.subjects.base import Examples, Subject, explained
from saap_jax.types import Scores


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
        passes: Passes = Passes(),
        *,
        store: Store = Store(),
        open_end: bool = False,
    ) -> None:
        """Take what chains run on.

        Args:
            chains: all that will be run, so that one pass observes what all of them ask of the unpruned model.
            store: the cache, and a digest of the model and the text.
            open_end: the ratio at the end is not known on the way, as where targets say how much goes; steps that
                depend on the end then go by the ratio of the round.
        """
        self.open_end = open_end
        self.subject = subject
        self.scenarios = scenarios
        self.passes = passes
        self.cache = store.cache
        self.text = scenarios
        self.steps: dict[str, Score] = {}
        self.stable: set[str] = set()
        self.key = self.root = digest(store.key, passes.batch_size)
        self._parts: dict[str, Calibrated] = {}
        self._memory: dict[str, Any] = {}
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
        """Digest the sources of a chain's outcome."""
        return self._key(chain.steps, self._start(), ratio, ratio, ())

    def _start(self) -> State:
        return State(self.subject, self.subject.existing, Within(), key=self.root)

    def _expect(self, chain: Chain) -> None:
        """Add what a chain asks of the unpruned model to what the one pass observes."""
        self.steps |= {step.written: step for step in chain.scores}
        for at, step in enumerate(chain.steps, 1):
            if isinstance(step, Score) and step.depends_on(chain.steps[at:]):
                self.stable.add(step.written)
            for inner in step.inner:
                self._expect(inner)

    def _to(self, chain: Chain, end: int, ratio: float) -> State:
        self._expect(chain)
        return self._after(chain.steps[:end], self._start(), ratio, ratio, chain.steps[end:])

    @property
    def text_size(self) -> TextSize:
        """Size of the calibration text."""
        windows = sum(self.subject.size(each).rows for each in self.text.values())
        return TextSize(windows, self.passes.batch_size)

    def begin(self, chain: Chain, ratio: float) -> None:
        """Score the unpruned model, and say how many passes over the text a chain takes behind that."""
        after = round(chain.passes(self.text_size, ratio, self.subject))
        then = ""
        if after > 1:
            then = f", before about {after} passes over the text"
        with progress.step(self.passes.track, f"score all units{then}"):
            self.first()

    def check(self, chain: Chain, ratios: Sequence[float]) -> None:
        """Raise ValueError for what can be known to fail before any time is spent."""
        chain.check(self.subject, self.text_size)
        asked = [*asked_of_first(chain.steps, self.subject, ratios)]
        for ratio, rest in zip(ratios, asked, strict=True):
            if rest != ratio and ratio > self.most_removable(chain):
                raise impossible(ratio, self.most_removable(chain))
        inner = [each for step in chain.steps for each in step.inner]
        if inner:
            for each in inner:
                self.check(each, asked)
            return
        equal: Scores = {name: np.ones(units.shape) for name, units in self.subject.existing.items()}
        for (allocation, within), ratio in itertools.product(choices(chain.steps), asked):
            choose(self.subject, equal, ratio, allocation, within)

    def most_removable(self, chain: Chain) -> float:
        """Find the largest ratio that a chain can meet whatever the scores, rounded down to four decimals."""
        return largest_ratio_of(chain.steps, self.subject)

    # --- steps

    def _key(self, steps: Sequence[Step], start: State, ratio: float, final: float, following: Sequence[Step]) -> str:
        """Digest all that the state after some steps is made from."""
        made = []
        for at, each in enumerate(steps, 1):
            later = each.depends_on((*steps[at:], *following))
            codes = self._code(each) if isinstance(each, Score) else []
            inner = [self._key(chain.steps, start, ratio, final, ()) for chain in each.inner]
            made.append([each.written, code_digest(type(each), each.source), later and later.written, codes, *inner])
        # a share for attention from some ratio on is that of the end of the chain, also in the rounds before it
        by_end = any(isinstance(each, Within) and each.attention_from for each in steps)
        end = [final, self.open_end] if by_end else None
        return digest(start.key, made, ratio, end)

    def _after(
        self, steps: Sequence[Step], start: State, ratio: float, final: float, following: tuple[Step, ...]
    ) -> State:
        """Run some steps."""
        if not steps:
            return start
        key = self._key(steps, start, ratio, final, following)
        if key in self._states:
            return self._states[key]
        *earlier, step = steps

        def run_prefix(state: State, ratio: float) -> State:
            return self._after(earlier, state, ratio, ratio if self.open_end else final, (step, *following))

        def run(chain: Chain, text: Mapping[str, Examples], end: int) -> State:
            return self.fitted_on(text)._to(chain, end, ratio)

        if step.runs_prefix:
            state = start
        else:
            state = run_prefix(start, ratio)
        prefix = prefix_of(earlier, self.subject)
        on = Context(
            dense=self.subject,
            scenarios=self.text,
            own_text=state.text,
            ratio=ratio,
            final=final,
            following=following,
            batch_size=self.passes.batch_size,
            track=self.passes.track,
            store=Store(self.cache, digest(key, "training")),
            runs=Runs(prefix, run_prefix, run, self._observe, self._memory),
        )
        new = self._taken(step, state, on, Store(self.cache, key))._replace(key=key)
        if new.subject is not self.subject or new.precomputed:
            self._forget_other_models()
        self._states[key] = new
        return new

    def _taken(self, step: Step, state: State, on: Context, kept: Store) -> State:
        """Take a step, or read the keep-set that it has chosen before."""
        found = kept.load() if step.cacheable else {}
        if found:
            keep = {name: found[f"keep/{name}"] for name in state.keep}
            return state._replace(keep=keep, metrics=json.loads(found["metrics"].tobytes()))
        with explained(step.name, self.subject, state.text or self.text, self.passes.batch_size):
            new = step(state, on)
        if step.cacheable and new.subject is self.subject:
            arrays = {f"keep/{name}": units for name, units in new.keep.items()}
            metrics = json.dumps(dict(new.metrics)).encode()
            kept.save({**arrays, "metrics": np.frombuffer(metrics, np.uint8)})
        return new

    def _forget_other_models(self) -> None:
        """Drop the states that have weights of their own, since one such model is held at a time."""
        for key, state in [*self._states.items()]:
            if state.subject is not self.subject or state.precomputed:
                del self._states[key]

    def fitted_on(self, text: Mapping[str, Examples]) -> "Runner":
        """Give a runner whose scores come from all of the text, and whose other steps see some of it alone."""
        if text is self.text:
            return self
        self.first()
        other = copy.copy(self)
        other.text = text
        other.root = digest(self.root, "some")
        other._states = {}
        other._memory = {}
        return other

    # --- scores

    def _observe(self, step: Score, state: State, stability: bool) -> Calibrated:
        """Score a state by a step; of the unpruned model from the one pass for all."""
        if state.subject is self.subject and state.removed is None:
            return self.first()
        kept = Store(self.cache, digest(state.key, "scores", step.written, stability, self._code(step)))
        found = kept.load()
        if found:
            return unpacked(found)
        made = self._calibrate({step.written: step}, state, [step.written] if stability else [])
        kept.save(packed(made))
        return made

    def first(self, made: Calibrated | None = None) -> Calibrated:
        """Score the unpruned model for all chains in one pass, or take what a pass has `made`; each score has a file of
        its own."""
        stores = {label: self._store_of(label, step) for label, step in self.steps.items()}
        missing = {}
        for label, store in stores.items():
            if store.key in self._parts:
                continue
            kept = store.load()
            if kept:
                self._parts[store.key] = unpacked(kept)
            else:
                missing[label] = self.steps[label]
        if missing:
            made = made or self._calibrate(missing, self._start(), self.stable & missing.keys())
            for label, step in missing.items():
                part = made.part(label, step)
                self._parts[stores[label].key] = part
                stores[label].save(packed(part))
        return put_together([self._parts[store.key] for store in stores.values()], [*self.scenarios])

    def _store_of(self, label: str, step: Score) -> Store:
        """Name the file of a score of the unpruned model."""
        return Store(self.cache, digest(self.key, "scores", label, self._code(step), *self.stable & {label}))

    def _code(self, score: Score) -> list[str]:
        """Digest the code of estimators that are not the package's."""
        members = score.members(tuple(self.subject.existing))
        return [score.named, *map(str, score.fusion), *map(code_of, members)]

    def _calibrate(self, plan: Plan, state: State, stability: Collection[str]) -> Calibrated:
        keep = None if state.removed is None else state.keep
        return calibrate(state.subject, self.scenarios, plan, self.passes, stability=stability, keep=keep)


def codes_of(steps: Iterable[Step], structures: Sequence[str]) -> dict[str, str]:
    """Digest the files of the estimators, statistics and steps that are not the package's, by `code of NAME`."""
    found = {}
    for each in steps:
        found |= {f"code of {each.written}": code_digest(type(each), each.source)}
        if isinstance(each, Score):
            members = make_members({each.written: each}, tuple(structures))
            found |= {f"code of {member}": code_of(member) for member in members}
            needs = union_of_needs(members.values())
            found |= {f"code of the statistic {need.name}": code_of_statistic(need) for need in needs}
        for chain in each.inner:
            found |= codes_of(chain.steps, structures)
    return {name: code for name, code in found.items() if code}


def packed(made: Calibrated) -> dict[str, np.ndarray]:
    """Write scores, stability indicators and fusions as numbered arrays, and their places as JSON."""
    arrays: dict[str, np.ndarray] = {}

    def numbered(value: Any) -> Any:
        if isinstance(value, Fusion):
            value = value._replace(scores={})._asdict()
        if isinstance(value, Mapping):
            return {name: numbered(each) for name, each in value.items()}
        if value is None or isinstance(value, float):
            return value
        arrays[number := str(len(arrays))] = np.asarray(value)
        return number

    about = json.dumps(numbered(made._asdict()))
    return arrays | {"about": np.frombuffer(about.encode(), np.uint8)}


def unpacked(arrays: Mapping[str, np.ndarray]) -> Calibrated:
    """Undo `packed`."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(each) for name, each in value.items()}
        if isinstance(value, str):
            return arrays[value]
        return value

    made = whole(json.loads(arrays["about"].tobytes()))
    fusions = {name: {n: Fusion(**fused) for n, fused in each.items()} for name, each in made["fusions"].items()}
    return Calibrated(**{**made, "fusions": fusions})
