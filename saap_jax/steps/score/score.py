"""Steps that score: an estimator, several that become one, and what turns scores into others."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np

from saap_jax.checks import number
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.registry import make_estimators
from saap_jax.steps.allocation.allocation import checked
from saap_jax.steps.base import Context, State, Step, TextSize, need, step
from saap_jax.steps.score.fusion import FusionMethod, FusionScope
from saap_jax.steps.score.oracles import constant, is_oracle, make_oracle
from saap_jax.steps.score.stability import ScenarioReduction, stabilised
from saap_jax.subjects.base import Subject
from saap_jax.syntax import attention_and_mlp, fusion_members
from saap_jax.types import STRUCTURES, Scores


@dataclasses.dataclass(frozen=True)
class Score(Step):
    """Score every unit by an estimator.

    `a+b` fuses the scores of two or more, `a/b` scores attention by a and MLP by b. Hyper-parameters stand in brackets:
    `taylor_element(reduction=max)`; an estimator of a file is `FILE.py:FACTORY`. All chains share one pass over the
    unpruned model.
    """

    kind = "score"
    name = "score"
    after = ()

    estimator: str
    given: Estimator | None = None
    """The estimator itself, where `estimator` is just what it is called."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts().values():
            members = fusion_members(part)
            for name in members:
                if members.count(name) > 1:
                    raise ValueError(f"{part}: expected each estimator of a fusion once, but {name!r} is named twice")
        make_members({"": self})

    @property
    def named(self) -> str:
        """The estimator, or several: `a+b`, `a/b`."""
        return self.estimator

    @property
    def fusion(self) -> tuple[FusionMethod, FusionScope, bool]:
        """How scores are fused, as `fuse` takes it."""
        return "closed_form", "structure", False

    @property
    def written(self) -> str:
        """The estimator as a chain writes it."""
        return self.estimator

    def parts(self, structures: tuple[str, ...] = STRUCTURES) -> dict[str, str]:
        """Name the estimator, or fusion, of each structure; those of a traced model are all scored by one.

        >>> Score("gate_fisher/wanda+magnitude").parts()
        {'attention': 'gate_fisher', 'mlp': 'wanda+magnitude'}
        """
        if structures != STRUCTURES:
            return dict.fromkeys(structures, self.named)
        return dict(zip(STRUCTURES, attention_and_mlp(self.named), strict=True))

    def members(self, structures: tuple[str, ...] = STRUCTURES) -> tuple[str, ...]:
        """List its estimators, each once."""
        members = itertools.chain.from_iterable(map(fusion_members, self.parts(structures).values()))
        return tuple(dict.fromkeys(members))

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for an estimator that looks at what the model does not have."""
        structures = tuple(subject.existing)
        if structures != STRUCTURES and "/" in self.named and ".py:" not in self.named:
            raise ValueError(
                f"{self.written}: expected one estimator for all structures of a traced model, got two around a slash"
            )
        subject.check_estimators(make_members({"": self}, structures))

    def depends_on(self, following: Sequence[Step]) -> "Stable | None":
        """Find the step that asks for the stability indicator of the same examples."""
        return next((each for each in following if isinstance(each, Stable) and each.over == "examples"), None)

    def __call__(self, state: State, on: Context) -> State:
        """Observe the model as it is, and score the units that are there."""
        stability = self.depends_on(on.following) is not None
        scored = on.chain(self).observe(self, state, stability)
        return state._replace(scored=scored, label=self.written, scores=scored.scores(self.written))


Plan = Mapping[str, Score]
"""What is scored, by label."""


def make_members(
    plan: Plan, structures: tuple[str, ...] = STRUCTURES, known: Mapping[str, Estimator] = MappingProxyType({})
) -> dict[str, Estimator]:
    """Make the estimators that the entries of a plan are made of, each once, but for those that are known.

    What stands for an oracle until its scores are known needs no statistic.
    """
    each = [score.members(structures) for score in plan.values()]
    members = tuple(dict.fromkeys(itertools.chain.from_iterable(each)))
    oracles = {member: constant({}, {}) for member in members if is_oracle(member) and make_oracle(member)}
    given = {score.named: score.given for score in plan.values() if score.given is not None}
    return make_estimators(members, {**oracles, **given, **known})


@step("fused")
@dataclasses.dataclass(frozen=True)
class Fused(Score):
    """Score every unit by several estimators, weighted by their learned uncertainty.

    I(u) = Σ_m I_m(u) / (2 σ_m²). Source: SAAP (arXiv:2412.15127), adaptive importance fusion; see `score.fusion.fuse`.
    """

    estimator: str = dataclasses.field(default="", init=False, repr=False)
    given: Estimator | None = dataclasses.field(default=None, init=False, repr=False)
    estimators: tuple[str, ...] = ("taylor_element", "gate_taylor", "wanda")
    """Two or more estimators, with hyper-parameters in brackets if any."""
    attention: str = "gate_fisher"
    """What scores attention units of a model of ours, since sums over elements say little of heads; `fused`: the same
    estimators."""
    method: FusionMethod = "closed_form"
    """Where σ comes from: its closed form, gradient steps (`learned`), or the variance over examples (`sampling`)."""
    scope: FusionScope = "structure"
    """Units that share a σ: all (`global`), those of a structure, or those of a structure in one layer (`layer`)."""
    scope_constant: bool = False
    """Add Σ log σ of its scope to each score."""

    def __post_init__(self) -> None:
        if len(set(self.estimators)) < max(2, len(self.estimators)):
            raise ValueError(f"fused: expected two or more estimators, each once, got {', '.join(self.estimators)}")
        if len(fusion_members(self.attention)) > 1:
            raise ValueError(f"fused.attention: expected one estimator, or fused for the same, got {self.attention}")
        super().__post_init__()

    @property
    def named(self) -> str:
        """What scores attention, and the estimators that are fused."""
        together = "+".join(self.estimators)
        if self.attention == "fused":
            return together
        return f"{self.attention}/{together}"

    @property
    def fusion(self) -> tuple[FusionMethod, FusionScope, bool]:
        """How scores are fused, as `fuse` takes it."""
        return self.method, self.scope, self.scope_constant

    @property
    def written(self) -> str:
        """The step as a chain writes it."""
        return Step.written.fget(self)  # type: ignore[attr-defined]

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for a share of attention where a traced model has none."""
        if tuple(subject.existing) != STRUCTURES and self.attention != "fused":
            raise ValueError(
                f"{self.written}: expected attention=fused for a traced model, whose structures are all scored alike, "
                f"got {self.attention}"
            )
        super().check(subject, text)


@step("scenarios")
@dataclasses.dataclass(frozen=True)
class Scenarios(Step):
    """Say how the scores of several calibration scenarios become one; without this step, their mean."""

    kind = "score"

    reduction: ScenarioReduction = "mean"
    """`mean`, `max` (what any of them needs is kept), or `min_rank` (the best rank: the same free of units)."""

    def __call__(self, state: State, on: Context) -> State:
        """Reduce the scores of the scenarios anew."""
        need(state, self)
        return state._replace(scores=state.scored.scores(state.label, self.reduction))


@step("normalize")
@dataclasses.dataclass(frozen=True)
class Normalize(Step):
    """Free scores of their unit before structures are ranked together: divide by the mean of the structure.

    FLAP's own standardisation of coordinates is `fluctuation(standardize=True)`, without this step.
    """

    kind = "score"

    within: Literal["structure", "sub_block"] = "structure"
    """`sub_block`: divide by the sum over a layer's attention or MLP. Errors become shares of the error of removing it
    all, which compare between layers: the prior of ZipLM (arXiv:2302.04089)."""
    to: Literal["parts", "ranks"] = "parts"
    """`ranks`: the share of units with no larger a score, of the structure or sub-block. One ranking of all by these,
    `global(by=score)`, removes as large a share of each."""

    def __call__(self, state: State, on: Context) -> State:
        """Normalise the scores of each structure, or of each sub-block."""
        scores = checked("scores", need(state, self), state.keep)
        normalised = self._parts
        if self.to == "ranks":
            normalised = self._ranks
        return state._replace(scores={name: normalised(name, np.asarray(each)) for name, each in scores.items()})

    def _parts(self, name: str, values: np.ndarray) -> np.ndarray:
        """Divide by the mean, or by sums."""
        # A structure without units has nothing to divide.
        mean = 1.0
        if np.isfinite(values).any():
            mean = np.nanmean(values)
        if not mean > 0:
            raise ValueError(
                f"normalize: expects scores of {name} with a mean above 0, got {mean:.4g}; use another estimator, "
                "to=ranks, or leave the step out"
            )
        if self.within == "structure":
            return values / mean
        # Where all scores of a sub-block are 0, it stays at 0.
        sums = np.nansum(values, axis=1, keepdims=True)
        return values / np.where(sums > 0, sums, mean)

    def _ranks(self, name: str, values: np.ndarray) -> np.ndarray:
        """Replace scores by shares; NaN, of what is no unit, stays."""
        rows = values
        if self.within == "structure":
            rows = values.reshape(1, -1)
        shares = np.full(rows.shape, np.nan)
        for row, found in zip(rows, shares, strict=True):
            there = ~np.isnan(row)
            found[there] = np.searchsorted(np.sort(row[there]), row[there], side="right") / there.sum()
        return shares.reshape(values.shape)


@step("stable")
@dataclasses.dataclass(frozen=True)
class Stable(Step):
    """Weigh importance by its stability: S(u) = log I(u) + λ · ASI(u), as its exponential.

    ASI is the stability indicator of importance, of a fusion the fused one, over examples or over scenarios: its
    standard deviation over its mean, standardised within its layer. Over examples it takes a second pass over the text,
    an example at a time. Source: SAAP (arXiv:2412.15127), adaptive structure search; see `score.stability`.
    """

    kind = "score"

    weight: Annotated[float, number("a finite number", np.isfinite)] = 0.25
    """λ. Above 0 keeps what matters only sometimes; below 0 removes it."""
    over: Literal["examples", "scenarios"] = "examples"
    """What importance has to be stable over."""

    def __call__(self, state: State, on: Context) -> State:
        """Weigh the scores."""
        scores = checked("scores", need(state, self), state.keep)
        if not self.weight:
            return state._replace(scores=scores)
        found: Scores | None = state.scored.indicator(state.label, self.over)
        if found is None:
            raise ValueError("stable: expected a stability indicator over two examples or more, got none")
        return state._replace(scores=stabilised(scores, checked("stability", found, state.keep), self.weight))
