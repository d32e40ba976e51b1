"""A method as a chain of steps: read from text, written back, expanded into several.

    wanda > uniform > least_squares
    fused > within(protect=(0.13, -0.07)) > uniform > rounds(0.1) > learn(steps=72) > least_squares > scales(steps=48)
    {wanda,fisher} > {uniform,global} > {none,least_squares}

Between steps stands `>`, or a comma where nobody wants to quote. A step is its name with options in brackets: values
are numbers, words, tuples, `{structure: value}`; those of the first options may stand without a name. Braces outside of
brackets stand for each of what they hold, and a tuple where an option takes one value for each of them. `none` is no
step. `NAME = CHAIN` gives a chain a name of its own; without it, the text is the name. Where no allocation follows the
scores and limits at the beginning, `uniform` does. The name of a recipe stands for its chain. A step of a file is
`FILE.py:NAME`. What is no step is an estimator: `estimator`, `a+b`, `a/b` or `FILE.py:FACTORY`, see
`steps.score.score.Score`.
"""

import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from saap_jax.checks import check_values
from saap_jax.config.method import PACKAGED_MODELS
from saap_jax.config.packaged import packaged
from saap_jax.estimation.registry import ESTIMATORS, from_file
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps import known as _known  # noqa: F401  the package's own steps are registered
from saap_jax.steps.allocation.allocation import Allocation, most_removable
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.allocation.rounds import Rounds
from saap_jax.steps.base import STEPS, Extent, Room, Step, find_step
from saap_jax.steps.limits import Within
from saap_jax.steps.repair.output import OutputRepair
from saap_jax.steps.score.oracles import ORACLES
from saap_jax.steps.score.score import Scenarios, Score
from saap_jax.subjects.base import Subject
from saap_jax.syntax import Call, alternatives, names_file, read_call, split
from saap_jax.types import Keep

_NAMED = re.compile(r"\s*(?P<name>[\w.+-]+)\s*=(?!=)")

NONE = "none"
"""The step that is none."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """A method: steps, and the text that names it in tables."""

    steps: tuple[Step, ...]
    name: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def written(self) -> str:
        """All steps in full, also those of a recipe."""
        return " > ".join(each.text for each in self.steps)

    @property
    def every(self) -> tuple[Step, ...]:
        """All steps, also those of chains that a step runs."""
        return tuple(one for each in self.steps for one in (each, *(s for chain in each.inner for s in chain.every)))

    @property
    def repairs(self) -> bool:
        """Whether the chain changes weights."""
        return any(each.kind == "repair" for each in self.every)

    @property
    def choosing(self) -> int:
        """How many steps there are up to the last one that has to do with which units stay."""
        return max(at for at, each in enumerate(self.steps, 1) if each.kind not in ("repair", "text"))

    @property
    def scores(self) -> tuple[Score, ...]:
        """The steps that score the unpruned model: those before the first that chooses units."""
        early = itertools.takewhile(lambda each: each.kind in ("score", "limits"), self.steps)
        inner = (score for each in self.steps for chain in each.inner for score in chain.scores)
        return (*(each for each in early if isinstance(each, Score)), *inner)

    def passes(self, text: Extent, ratio: float, subject: Subject) -> float:
        """Estimate how many forward passes over the calibration text it takes beside the one that scores."""
        spent = 0.0
        for (each, now), room in zip(self._extents(text), rooms(self.steps, subject), strict=True):
            size = now.windows / text.windows  # passes of a step are those over the text that it goes by
            spent = each.passes(spent / size, now, ratio, room) * size
        return spent

    def check(self, subject: Subject, text: Extent) -> None:
        """Raise ValueError for a model, or too little text, with which a step cannot work."""
        for each, now in self._extents(text):
            each.check(subject, now)

    def _extents(self, text: Extent) -> Iterator[tuple[Step, Extent]]:
        """Yield the steps, and how much text each goes by."""
        now = text
        for each in self.steps:
            yield each, now
            now = each.extent(now, text)

    def unrepaired(self, subject: Subject, keep: Keep | None = None) -> dict[str, str]:
        """Give the reasons for which repairs leave structures alone, by name; with `keep` those that lose units."""
        repairs = [each for each in self.every if isinstance(each, OutputRepair)]
        return {name: why for each in repairs for name, why in subject.unrepaired(each, keep).items()}


def chain(*steps: Step | str) -> Chain:
    """Make a chain of steps, or of texts of steps.

    >>> str(chain("wanda", Uniform(floor=True), "least_squares"))
    'wanda > uniform(floor=True) > least_squares'

    Raises:
        ValueError: a text that names several chains or none, or steps that cannot stand so.
    """
    found = [one for each in steps for one in ([each] if isinstance(each, Step) else steps_of(each))]
    return _whole(found, " > ".join(each if isinstance(each, str) else each.text for each in steps))


def parse(text: str) -> Chain:
    """Read one chain.

    Raises:
        ValueError: it names several, or something in it is unknown or wrong.
    """
    found = expand([text])
    if len(found) > 1:
        raise ValueError(f"chain: expected one, got {len(found)} of {text!r}")
    return found[0]


def expand(texts: Iterable[str]) -> list[Chain]:
    """Read chains, each once: braces and tuples of values are expanded.

    >>> [str(each) for each in expand(["{wanda,magnitude} > {uniform,global} > none"])]
    ['wanda > uniform', 'wanda > global', 'magnitude > uniform', 'magnitude > global']

    Raises:
        ValueError: something is unknown or wrong; one line says what.
    """
    found: dict[str, Chain] = {}
    for text in texts:
        given = _NAMED.match(text)
        for alternative in alternatives(text[given.end() :] if given else text):
            segments = [each for each in split(alternative, ">,") if each != NONE]
            choices = [list(_read(segment)) for segment in segments]
            for chosen in itertools.product(*choices):
                name = given["name"] if given else " > ".join(said for said, _ in chosen)
                made = _whole([each for _, steps in chosen for each in steps], name)
                if found.setdefault(name, made) is not made and (given or found[name] != made):
                    raise ValueError(f"chain: expected each name once, got {name!r} for several chains")
    return list(found.values())


def _whole(steps: list[Step], name: str) -> Chain:
    """Return a chain with an allocation.

    Raises:
        ValueError: no score at the beginning, or a step that cannot stand where it does, or changes nothing there.
    """
    if name in RECIPES and RECIPES[name].repair:
        raise ValueError(f"{name} only repairs: expected a chain before it, such as wanda > {name}")
    first = next((each for each in steps if each.kind != "limits"), None)
    if any(each.begins for each in steps[1:]):
        raise ValueError(f"chain {name!r}: expected best_of first, got it behind {steps[0].text}")
    begun = first is not None and first.begins
    if begun and any(isinstance(each, Rounds) for each in steps):
        raise ValueError(f"chain {name!r}: expected rounds in the chains of best_of, got them behind it")
    if not (begun or isinstance(first, Score)):
        raise ValueError(
            f"chain {name!r}: expected a score first, such as wanda, got {first.name if first else 'nothing'}"
        )
    early = [*itertools.takewhile(lambda each: each.kind in ("score", "limits"), steps)]
    rest = steps[len(early) :]
    if not (begun or (rest and isinstance(rest[0], Allocation))):
        rest = [Uniform(), *rest]
    last = max(at for at, each in enumerate(rest) if each.kind in ("allocation", "refinement"))
    idle = [each for each in early if isinstance(each, Score)][:-1]
    turned = max((at for at, each in enumerate(early) if isinstance(each, Scenarios)), default=0)  # begins with scores
    idle += [each for each in early[:turned] if each.kind == "score" and not isinstance(each, Score)]
    idle += [each for each in rest[1:] if isinstance(each, (Allocation, Score))]
    idle += [each for each in rest[last:] if each.kind in ("score", "limits")]
    if idle:
        said = "expected one score and limits, then one allocation, then other steps"
        raise ValueError(f"chain {name!r}: {said}, got {idle[0].text}, which changes nothing there")
    for at, each in enumerate(rest, 1):
        each.ahead(rest[at:])  # refuses what cannot stand behind it
    made = Chain((*early, *rest), name)
    reader = next((each for each in rest if each.reorders), None)
    if reader and any(isinstance(each, Rounds) for each in made.every):
        raise ValueError(f"chain {name!r}: expected no rounds beside {reader.name}: it reads the scores of all units")
    return made


# --- reading -------------------------------------------------------------------------------------


def steps_of(text: str) -> list[Step]:
    """Read steps, perhaps a part of a chain, of which none stands for several.

    Raises:
        ValueError: something is unknown or wrong, or a step stands for several.
    """
    found: list[Step] = []
    for segment in split(text, ">,"):
        read = list(_read(segment)) if segment != NONE else [("", ())]
        if len(read) > 1:
            raise ValueError(f"chain: expected one value an option, got {segment!r}")
        found += read[0][1]
    return found


def _read(segment: str) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """Yield what a part of a chain stands for: how it is written, and its steps; several where an option is a tuple."""
    if segment in RECIPES:
        recipe = RECIPES[segment]
        if recipe.missing:
            raise ValueError(f"{segment} cannot be run: {recipe.missing}")
        yield segment, tuple(steps_of(recipe.chain))
        return
    call = read_call(segment)
    kind = _kind_of(call) if call else None
    if call is None or kind is None:
        yield segment, (_score(segment),)
        return
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    options = _options(segment, kind, call)
    many = {name: value for name, value in options.items()
            if isinstance(value, tuple) and value and "tuple" not in types[name]}  # fmt: skip
    for values in itertools.product(*many.values()):
        chosen = {**options, **dict(zip(many, values, strict=True))}
        check_values(kind, chosen, f"{kind.name}.")
        try:
            made = kind(**{name: _number(value) if "float" in types[name] and "int" not in types[name] else value
                           for name, value in chosen.items()})  # fmt: skip
        except TypeError as error:
            raise ValueError(f"{segment!r}: {str(error).partition(') ')[2] or error}") from None
        yield made.text if many else segment, (made,)


def _kind_of(call: Call) -> type[Step] | None:
    """Return the step that is called, also one in a file; None of an estimator."""
    if not call.file:
        return find_step(call.name)
    made = from_file(call.file, call.name)
    if not (isinstance(made, type) and issubclass(made, Step)):
        return None
    if "name" not in vars(made):
        made.name = made.__name__
    made.source = call.file
    return made


def _score(segment: str) -> Score:
    """Return the score of an estimator.

    Raises:
        ValueError: nothing has that name; the nearest one is suggested.
    """
    try:
        return Score(segment)
    except ValueError as error:
        name = segment.partition("(")[0].strip()
        if segment in PACKAGED_MODELS or os.path.exists(segment):
            raise ValueError(f"unknown step {name!r}; did you mean --model {segment}?") from None
        if names_file(segment) or not str(error).startswith("unknown estimator") or set("+/") & set(name):
            raise
        near = difflib.get_close_matches(name, [*STEPS, *ESTIMATORS, *ORACLES, *RECIPES, *packaged()], 1, cutoff=0.0)
        raise ValueError(
            f"unknown step {name!r}; did you mean {near[0]!r}? `saap methods` lists steps, estimators and recipes"
        ) from None


def _options(segment: str, kind: type[Step], call: Call) -> dict[str, Any]:
    """Read the options of a step."""
    fields = [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    if kind.begins:
        return {fields[0].name: tuple(map(parse, split(call.inside, ","))) if call.inside.strip() else ()}
    try:
        given, named = call.arguments(expressions=True)
    except ValueError:
        raise ValueError(f"{segment!r}: expected NAME or NAME(option=value, …)") from None
    free = [field for field in fields if not field.kw_only]
    if given and free and str(free[0].type).startswith("tuple") and not isinstance(given[0], tuple):
        given = [tuple(given)]
    if len(given) > len(free):
        raise ValueError(f"{segment!r}: {kind.name} takes {len(free)} options without a name, got {len(given)}")
    pairs = [*zip([field.name for field in free], given, strict=False), *named]
    if len(options := dict(pairs)) < len(pairs):
        raise ValueError(f"{segment!r}: expected each option of {kind.name} once, got one twice")
    known = [field.name for field in fields]
    if unknown := next((name for name in options if name not in known), None):
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{segment!r}: unknown option {unknown!r}; {kind.name} takes {', '.join(known) or 'none'}{hint}"
        )
    return options


def _number(value: Any) -> Any:
    """Turn whole numbers into floats for an option of floats, also within a dictionary."""
    if isinstance(value, dict):
        return {key: _number(each) for key, each in value.items()}
    return float(value) if type(value) is int else value


def allocation_of(chain: Chain) -> tuple[Allocation, Within]:
    """Take the first allocation of a chain, and the limits by which it chooses: those before it."""
    return _allocation_of(chain.steps)


def limits_of(chain: Chain) -> Within:
    """Join the limits of a chain."""
    return _limits_of(chain.steps)


def _allocation_of(steps: Sequence[Step]) -> tuple[Allocation, Within]:
    at, allocation = next((at, each) for at, each in enumerate(steps) if isinstance(each, Allocation))
    return allocation, _limits_of(steps[:at])


def _limits_of(steps: Sequence[Step]) -> Within:
    limits = Within()
    for each in steps:
        limits = each.behind(limits) if isinstance(each, Within) else limits
    return limits


# --- what a chain can remove, before it runs -----------------------------------------------------


def choices(steps: Sequence[Step]) -> list[tuple[Allocation, Within]]:
    """List which allocation chooses by which limits: the first one, and as refinements do by limits behind it."""
    (allocation, before) = _allocation_of(steps)
    every = _limits_of(steps)
    return [(allocation, before), *([(allocation, every)] if every != before else [])]


def rooms(steps: Sequence[Step], subject: Subject) -> list[Room]:
    """Tell for each step what is known of those before it."""
    return [room_behind(steps[:at], subject) for at in range(len(steps))]


def room_behind(steps: Sequence[Step], subject: Subject) -> Room:
    """Tell what is known of some steps."""
    return Room(subject, _limits_of(steps), lambda: most_of_steps(steps, subject))


def asked_of_first(steps: Sequence[Step], subject: Subject, ratios: Iterable[float]) -> Iterator[float]:
    """Yield how much the first allocation is to remove where some ratios are to be gone behind all steps."""
    backwards = [*zip(steps, rooms(steps, subject), strict=True)][::-1]
    for ratio in ratios:
        for each, room in backwards:
            ratio = each.asks(room, ratio)
        yield ratio


def most_of_steps(steps: Sequence[Step], subject: Subject) -> float:
    """Find the largest ratio that steps can meet whatever the scores, rounded down to four decimals."""
    inner = [each for step in steps for each in step.inner]
    if inner:
        top = min(most_of_steps(each.steps, subject) for each in inner)
    else:
        top = min(most_removable(subject, *each) for each in choices(steps))
    ratios = [share / 10_000 for share in range(9_999, -1, -1)]
    asked = asked_of_first(steps, subject, ratios)
    return next(ratio for ratio, rest in zip(ratios, asked, strict=False) if rest <= top)
