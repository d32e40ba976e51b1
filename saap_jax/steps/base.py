"""What a chain is made of: a state, what steps look at beside it, and the steps by name.

A step is a frozen dataclass: its fields are its options, its docstring is its help, its name is that of `@step`. It
takes what the steps before it have come to and returns what it has come to. Whatever cannot follow what came before is
said by the step that cannot, in one line. Steps know a `Subject` and never a kind of model.

| kind       | from what to what                                    |
|------------|------------------------------------------------------|
| score      | a model and text -> importance of its units           |
| limits     | what may go at all, and to which widths               |
| allocation | importance, limits, a share of the parameters -> keep |
| refinement | keep, text -> another keep of the same share          |
| repair     | keep, text -> changed weights                         |
| text       | text -> the text that steps behind go by              |
"""

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
    """What the last observation tells of the units that were there: `steps.score.calibrate.Calibrated`; None: nothing
    yet."""
    label: str = ""
    """Which of the scores in it."""
    scores: Scores | None = None
    """Importance as steps have turned it since, larger = more important; NaN where no unit was there."""
    ready: "Ready | None" = None
    """What a step has done already of the repair behind it."""
    text: Mapping[str, Examples] | None = None
    """What steps go by in place of the calibration text."""
    told: Mapping[str, Any] = MappingProxyType({})
    """What steps report, by name: divergences, prices, corrections."""
    key: str = ""
    """Digest of all that it was made from."""

    def tell(self, **said: Any) -> "State":
        """Add a report; that of an earlier step of the name is replaced."""
        return self._replace(told={**self.told, **said})

    @property
    def gone(self) -> Keep | None:
        """The units that were removed so far; None where all are there."""
        gone = {name: units & ~self.keep[name] for name, units in self.subject.existing.items()}
        return gone if any(each.any() for each in gone.values()) else None


class Ready(NamedTuple):
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
        return {} if self.cache is None else self.cache.load(self.key) or {}

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays in place of what was saved before."""
        if self.cache is not None:
            self.cache.save(self.key, arrays)


@dataclasses.dataclass(frozen=True)
class Room:
    """What is known of the steps before one while nothing has run yet."""

    subject: Subject
    """The unpruned model."""
    within: Any
    """The limits that they set: `steps.limits.Within`."""
    find_most: Callable[[], float]

    @functools.cached_property
    def most(self) -> float:
        """The largest ratio that they can meet whatever the scores, rounded down to four decimals."""
        return self.find_most()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What steps look at beside the state."""

    dense: Subject
    """The unpruned model."""
    scenarios: Mapping[str, Examples]
    """Calibration examples by name."""
    instead: Mapping[str, Examples] | None = None
    """What a step before has put in their place."""
    ratio: float
    """Share of the prunable parameters that is to be gone behind the step."""
    final: float
    """The same at the end of the chain; within a round it is more than `ratio`."""
    behind: tuple["Step", ...] = ()
    """The steps that follow."""
    batch_size: int = 8
    track: Track = quiet
    observe: Callable[[Any, State, bool], Any] | None = None
    """Scores a state by a step: `steps.run.Runner`."""
    run: Callable[[Any, Mapping[str, Examples], int], State] | None = None
    """Runs so many steps of another chain to `ratio` on a text of the shape of `scenarios`."""
    store: Store = dataclasses.field(default_factory=Store)
    """What the step can go on from."""
    room: Room | None = None
    """What was known of the steps before, as `Step.asks` was given it."""
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What steps keep in memory that comes of the unpruned model and the calibration text alone."""

    @property
    def text(self) -> Examples:
        """All examples that the step goes by, one scenario behind the other."""
        return joined([*(self.instead or self.scenarios).values()])

    def progress(self, doing: str) -> Callable[[Sequence[Any]], Iterator[Any]]:
        """Make a wrapper of the parts of a step that shows them."""
        return lambda parts: self.track(doing, parts, len(parts))


class Extent(NamedTuple):
    """How much text there is."""

    windows: int
    batch: int
    """Windows of a microbatch."""

    @property
    def parts(self) -> int:
        """Microbatches."""
        return -(-self.windows // self.batch)


Before = Callable[[State, float], State]
"""The chain up to a step, as a function of where it starts and of the share that is to be gone."""


class Step:
    """One step of a chain.

    >>> find_step("rounds")(every=0.2).text
    'rounds(every=0.2)'
    """

    kind: ClassVar[Kind]
    name: ClassVar[str]
    drives: ClassVar[bool] = False
    """Whether the step runs the chain before it by itself: it is given the start, and `before`."""
    costly: ClassVar[bool] = False
    """Whether the keep-set that the step chooses is worth a file."""
    begins: ClassVar[bool] = False
    """Whether a chain may begin with the step, as it may with a score."""
    judges: ClassVar[bool] = False
    """Whether the step goes by the divergence from the unpruned model on text, of which some is held out."""
    reorders: ClassVar[bool] = False
    """Whether units that have gone may come back by their scores, which those that went in rounds do not have."""
    of: ClassVar[type[Subject]] = Subject
    """The models that the step is for: all, or `LanguageModel`."""
    source: ClassVar[str] = ""
    """The Python file that the step is from, where a chain names one."""

    def __post_init__(self) -> None:
        """Check the options by their types, and by what `Annotated` adds to those."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        name = getattr(self, "name", type(self).__name__)  # a class that is no step yet has no name
        check_values(type(self), {each.name: getattr(self, each.name) for each in fields if each.init}, f"{name}.")

    @property
    def said(self) -> dict[str, Any]:
        """The options that are not as usual."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: value for field in fields
                if field.init and (value := getattr(self, field.name)) != default_of(field)}  # fmt: skip

    @property
    def text(self) -> str:
        """The step as it is written: its name, and the options that are not as usual."""
        return written_call(f"{self.source}:{self.name}" if self.source else self.name, self.said)

    @property
    def inner(self) -> tuple[Any, ...]:
        """The chains that the step runs, each a `steps.chain.Chain`."""
        return ()

    @property
    def looks_ahead(self) -> bool:
        """Whether the step depends on what is to be gone at the end of the chain."""
        return False

    def ahead(self, behind: Sequence["Step"]) -> "Step | None":
        """Find the step behind it on which it depends, if any.

        Raises:
            ValueError: the step cannot work before that one.
        """
        return None

    def asks(self, room: Room, ratio: float) -> float:
        """Say how much of the prunable parameters the chain before it is to remove, where `ratio` is to be gone."""
        return ratio

    def passes(self, before: float, text: Extent, ratio: float, room: Room) -> float:
        """Estimate how many forward passes over the text a chain takes up to this step.

        The one that scores the unpruned model does not count.

        Args:
            before: passes of the steps before it.
            text: of which size the text is that the step goes by.
            ratio: share of the prunable parameters that goes.
            room: what is known of the steps before it.

        Raises:
            ValueError: a ratio that the step cannot meet.
        """
        return before

    def extent(self, text: Extent, calibration: Extent) -> Extent:
        """Say of which size the text is that steps behind go by; `text` is what this step goes by."""
        return text

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Take the step.

        Raises:
            ValueError: something before it that this step cannot follow.
        """
        raise NotImplementedError

    def check(self, subject: Subject, text: Extent) -> None:
        """Raise ValueError for a model, or too little text, with which the step cannot work, before time is spent."""
        if self.of is LanguageModel:
            language_model(self.name, subject)
        if self.judges:
            check_microbatches(self.name, text.parts)


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
    ...     def __call__(self, state, on, before):
    ...         return state
    >>> STEPS.pop("nothing")().text
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
        code_digest(kind)  # of the file as it is now, whatever becomes of it while this process runs
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


def need_room(on: Context, step: Step) -> Room:
    """Read what is known of the steps before one.

    Raises:
        ValueError: the step is not called by a chain.
    """
    if on.room is None:
        raise ValueError(f"{step.name}: expected to be run in a chain, as run_chain does, got a call of its own")
    return on.room


def default_of(field: Any) -> Any:
    """Read the default of a field."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
