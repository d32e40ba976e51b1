"""What a chain is made of: a state, what steps look at beside it, and the steps by name.

A step is a frozen dataclass: its fields are its options, its docstring is its help, its name is that of `@step`. It
takes the state that the steps before it left, and returns another one. Where a step may stand is data: `after` and
`excludes`. What it costs is one method: `plan`. Steps know a `Subject` and never a kind of model.

| kind       | from what to what                                    |
|------------|------------------------------------------------------|
| score      | a model and text -> importance of its units          |
| limits     | what may go at all, and to which widths              |
| allocation | importance, limits, a share of the parameters -> keep |
| refinement | keep, text -> another keep of the same share         |
| repair     | keep, text -> changed weights                        |
| text       | text -> the text that later steps go by              |
"""

import abc
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from saap_jax.checks import check_values
from saap_jax.runtime.digests import code_digest
from saap_jax.runtime.progress import Track, quiet
from saap_jax.subjects.base import Examples, LanguageModel, Subject, joined, language_model
from saap_jax.surgery.corrections import check_microbatches
from saap_jax.syntax import written_call
from saap_jax.types import Keep, Scores

Kind = Literal["score", "limits", "allocation", "refinement", "repair", "text"]


class State(NamedTuple):
    """What a chain carries from step to step; nothing else is passed between them."""

    subject: Subject
    """The model as repaired so far; its removed units want masks all the same."""
    keep: Keep
    """Which units stay."""
    limits: Any
    """What may go: `steps.limits.Within`."""
    scored: Any = None
    """The last observation of the units that were there: `steps.score.calibrate.Calibrated`; None: nothing yet."""
    label: str = ""
    """Which of the scores in it."""
    scores: Scores | None = None
    """Importance as steps have turned it since, larger = more important; NaN where no unit was there."""
    precomputed: "Precomputed | None" = None
    """A repair that was done while units were chosen."""
    text: Mapping[str, Examples] | None = None
    """What steps go by in place of the calibration text."""
    metrics: Mapping[str, Any] = MappingProxyType({})
    """What steps report, by name: divergences, prices, corrections."""
    key: str = ""
    """Digest of all that it was made from."""

    def report(self, **metrics: Any) -> "State":
        """Add metrics; those of an earlier step of the same names are replaced."""
        return self._replace(metrics={**self.metrics, **metrics})

    @property
    def removed(self) -> Keep | None:
        """The units that were removed so far; None where all are there."""
        removed = {}
        for name, units in self.subject.existing.items():
            removed[name] = units & ~self.keep[name]
        if any(each.any() for each in removed.values()):
            return removed
        return None


class Precomputed(NamedTuple):
    """A repair that was done while units were chosen, for the step that asks for it with the same units."""

    repair: "Step"
    of: Subject
    keep: Keep
    subject: Subject
    corrections: Sequence[Any]


@runtime_checkable
class Cache(Protocol):
    """Keeps arrays by a digest of what they were made from: `runs.cache.FileCache`."""

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the arrays of a key; None where there are none."""
        ...

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a key."""
        ...


class Store(NamedTuple):
    """Keeps arrays of a step, where there is a cache, so that a long one goes on where it was killed."""

    cache: Cache | None = None
    key: str = ""

    def load(self) -> dict[str, np.ndarray]:
        """Read the arrays that were saved last; none if there are none."""
        if self.cache is None:
            return {}
        return self.cache.load(self.key) or {}

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays in place of what was saved before."""
        if self.cache is not None:
            self.cache.save(self.key, arrays)


class TextSize(NamedTuple):
    """How much text there is."""

    windows: int
    batch: int
    """Windows of a microbatch."""

    @property
    def microbatches(self) -> int:
        """How many microbatches it is; the last one may be smaller."""
        return -(-self.windows // self.batch)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is known of the steps before one while nothing has run yet."""

    subject: Subject
    """The unpruned model."""
    within: Any
    """The limits that they set: `steps.limits.Within`."""
    find_largest_ratio: Callable[[], float]

    @functools.cached_property
    def largest_ratio(self) -> float:
        """The largest ratio that they can meet whatever the scores, rounded down to four decimals."""
        return self.find_largest_ratio()


class Cost(NamedTuple):
    """What a step takes, and what it asks of the steps before it."""

    passes: float = 0.0
    """Forward passes over the text that the step goes by."""
    prefix_runs: int = 1
    """How often the steps before it run."""
    prefix_ratio: float | None = None
    """The share of the prunable parameters that they are to remove; None: as much as the step itself."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """What a chain runs for a step: the steps before it, other chains, and the observation of a model."""

    prefix: Prefix
    """What was known of the steps before it, as `Step.plan` was given it."""
    run_prefix: Callable[[State, float], State]
    """(where to start, share that is to be gone) -> the state that the steps before it leave."""
    run: Callable[[Any, Mapping[str, Examples], int], State]
    """(another chain, text of the shape of `scenarios`, of how many of its steps) -> the state that they leave."""
    observe: Callable[[Any, State, bool], Any]
    """(score, state, with stability) -> `steps.score.calibrate.Calibrated`."""
    memory: dict[str, Any]
    """What steps keep in memory that comes of the unpruned model and the calibration text alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What steps look at beside the state."""

    dense: Subject
    """The unpruned model."""
    scenarios: Mapping[str, Examples]
    """Calibration examples by name."""
    own_text: Mapping[str, Examples] | None = None
    """What a step before has put in their place."""
    ratio: float
    """Share of the prunable parameters that is to be gone after the step."""
    final: float
    """The same at the end of the chain; within a round it is more than `ratio`."""
    following: tuple["Step", ...] = ()
    """The steps that follow."""
    batch_size: int = 8
    track: Track = quiet
    store: Store = dataclasses.field(default_factory=Store)
    """What the step can go on from."""
    runs: Runs | None = None
    """What the chain runs for it; see `chain`."""

    @property
    def text(self) -> Examples:
        """All examples that the step goes by, one scenario after the other."""
        scenarios = self.own_text or self.scenarios
        return joined([*scenarios.values()])

    def progress(self, doing: str) -> Callable[[Sequence[Any]], Iterator[Any]]:
        """Make a wrapper of the parts of a step that shows them."""
        return lambda parts: self.track(doing, parts, len(parts))

    def chain(self, step: "Step") -> Runs:
        """Return what the chain runs for a step.

        Raises:
            ValueError: the step is not called by a chain.
        """
        if self.runs is None:
            raise ValueError(f"{step.name}: expected to be run in a chain, as run_chain does, got a call of its own")
        return self.runs


class Step(abc.ABC):
    """One step of a chain.

    >>> find_step("rounds")(every=0.2).written
    'rounds(every=0.2)'
    """

    kind: ClassVar[Kind]
    name: ClassVar[str]
    of: ClassVar[type[Subject]] = Subject
    """The models that the step is for: all, or `LanguageModel`."""
    after: ClassVar[tuple[Kind, ...]] = ("score", "allocation")
    """Kinds of steps of which one stands earlier in the chain; none: the chain may begin with the step."""
    excludes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Name of a step that may not stand in the same chain -> why."""
    needs_objective: ClassVar[bool] = False
    """Whether the step goes by the divergence from the unpruned model on text, of which some is held out."""
    runs_prefix: ClassVar[bool] = False
    """Whether the step runs the steps before it by itself: its state is then the start of the chain."""
    cacheable: ClassVar[bool] = False
    """Whether the keep-set that the step chooses is worth a file."""
    source: ClassVar[str] = ""
    """The Python file that the step is from, where a chain names one."""

    def __post_init__(self) -> None:
        """Check the options by their types, and by what `Annotated` adds to those."""
        name = getattr(self, "name", type(self).__name__)  # a class that is no step yet has no name
        check_values(type(self), {each.name: getattr(self, each.name) for each in options_of(self)}, f"{name}.")

    @property
    def non_default_options(self) -> dict[str, Any]:
        """The options that are not as usual."""
        options = {}
        for field in options_of(self):
            value = getattr(self, field.name)
            if value != default_of(field):
                options[field.name] = value
        return options

    @property
    def written(self) -> str:
        """The step as a chain writes it: its name, and the options that are not as usual."""
        if self.source:
            name = f"{self.source}:{self.name}"
        else:
            name = self.name
        return written_call(name, self.non_default_options)

    @property
    def inner(self) -> tuple[Any, ...]:
        """The chains that the step runs, each a `steps.chain.Chain`."""
        return ()

    def depends_on(self, following: Sequence["Step"]) -> "Step | None":
        """Find the later step on which it depends, if any.

        Raises:
            ValueError: the step cannot work before that one.
        """
        return None

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """Estimate what the step takes. The pass that scores the unpruned model does not count.

        Args:
            text: of which size the text is that the step goes by.
            ratio: share of the prunable parameters that is to be gone after the step.
            prefix: what is known of the steps before it.

        Raises:
            ValueError: a ratio that the step cannot meet.
        """
        return Cost()

    def text_size(self, text: TextSize, calibration: TextSize) -> TextSize:
        """Say of which size the text is that later steps go by; `text` is what this step goes by."""
        return text

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for a model, or too little text, with which the step cannot work, before time is spent."""
        if self.of is LanguageModel:
            language_model(self.name, subject)
        if self.needs_objective:
            check_microbatches(self.name, text.microbatches)

    @abc.abstractmethod
    def __call__(self, state: State, on: Context) -> State:
        """Take the step."""


STEPS: dict[str, type[Step]] = {}
"""Name -> step; estimators, which are scores, have their own names in `estimation.ESTIMATORS`."""

PLUGINS = "saap_jax.steps"
"""Group of the entry points by which packages add steps: name -> class."""

S = TypeVar("S", bound=type[Step])


def step(name: str) -> Callable[[S], S]:
    """Give a step its name, and add it to `STEPS`.

    >>> @step("nothing")
    ... @dataclasses.dataclass(frozen=True)
    ... class Nothing(Step):
    ...     def __call__(self, state, on):
    ...         return state
    >>> STEPS.pop("nothing")().written
    'nothing'

    Raises:
        ValueError: the name is no identifier, or is taken by another step.
    """

    def register(kind: S) -> S:
        if not name.isidentifier():
            raise ValueError(f"step: expected an identifier, got {name!r}")
        known = STEPS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"step: {name!r} exists already; choose another name")
        kind.name = name
        STEPS[name] = kind
        # The digest is kept: it is that of the file as it is now, whatever becomes of it while this process runs.
        code_digest(kind)
        return kind

    return register


def find_step(name: str) -> type[Step] | None:
    """Return a step by name, of the package or of an installed plug-in; None where there is none."""
    if name not in STEPS:
        for point in importlib.metadata.entry_points(group=PLUGINS, name=name):
            try:
                step(name)(point.load())
            except Exception as error:  # whatever the plug-in raises
                raise ValueError(
                    f"step {name!r}: the plug-in {point.value} cannot be loaded: {type(error).__name__}: {error}"
                ) from error
    return STEPS.get(name)


def need(state: State, step: Step) -> Scores:
    """Read the scores for a step.

    Raises:
        ValueError: nothing before it scores.
    """
    if state.scores is None:
        raise ValueError(f"{step.name}: expected a score before it, such as wanda, got none")
    return state.scores


def options_of(step: Step | type[Step]) -> list[Any]:
    """List the fields of a step that are its options."""
    fields: Any = dataclasses.fields(step)  # type: ignore[arg-type]
    return [field for field in fields if field.init]


def default_of(field: Any) -> Any:
    """Read the default of a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
