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
from saap_jax.steps.base import STEPS, Prefix, Step, TextSize, find_step, options_of
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
        return " > ".join(each.written for each in self.steps)

    @property
    def every(self) -> tuple[Step, ...]:
        """All steps, also those of chains that a step runs."""
        found: list[Step] = []
        for each in self.steps:
            found.append(each)
            for inner in each.inner:
                found += inner.every
        return tuple(found)

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
        found = [each for each in _scoring(self.steps) if isinstance(each, Score)]
        for each in self.steps:
            for inner in each.inner:
                found += inner.scores
        return tuple(found)

    def passes(self, text: TextSize, ratio: float, subject: Subject) -> float:
        """Estimate how many forward passes over the calibration text it takes beside the one that scores."""
        spent = 0.0
        for at, (each, own_text) in enumerate(self._text_sizes(text)):
            cost = each.plan(own_text, ratio, prefix_of(self.steps[:at], subject))
            # a step counts passes over the text that it goes by, which may be longer than the calibration text
            spent = cost.prefix_runs * spent + cost.passes * own_text.windows / text.windows
        return spent

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for a model, or too little text, with which a step cannot work."""
        for each, own_text in self._text_sizes(text):
            each.check(subject, own_text)

    def _text_sizes(self, text: TextSize) -> Iterator[tuple[Step, TextSize]]:
        """Yield the steps, and how much text each goes by."""
        own_text = text
        for each in self.steps:
            yield each, own_text
            own_text = each.text_size(own_text, text)

    def unrepaired(self, subject: Subject, keep: Keep | None = None) -> dict[str, str]:
        """Give the reasons for which repairs leave structures alone, by name; with `keep` those that lose units."""
        found = {}
        for each in self.every:
            if isinstance(each, OutputRepair):
                found |= subject.unrepaired(each, keep)
        return found


def chain(*steps: Step | str) -> Chain:
    """Make a chain of steps, or of texts of steps.

    >>> str(chain("wanda", Uniform(floor=True), "least_squares"))
    'wanda > uniform(floor=True) > least_squares'

    Raises:
        ValueError: a text that names several chains or none, or steps that cannot stand so.
    """
    made: list[Step] = []
    names = []
    for each in steps:
        if isinstance(each, Step):
            made.append(each)
            names.append(each.written)
        else:
            made += steps_of(each)
            names.append(each)
    return _checked(made, " > ".join(names))


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
        chain_text = text[given.end() :] if given else text
        for alternative in alternatives(chain_text):
            segments = [each for each in split(alternative, ">,") if each != NONE]
            # each segment stands for one or several (name, steps); a chain takes one of each
            for chosen in itertools.product(*[list(_read(segment)) for segment in segments]):
                steps = [each for _, steps in chosen for each in steps]
                if given:
                    name = given["name"]
                else:
                    name = " > ".join(written for written, _ in chosen)
                made = _checked(steps, name)
                earlier = found.setdefault(name, made)
                if earlier is not made and (given or earlier != made):
                    raise ValueError(f"chain: expected each name once, got {name!r} for several chains")
    return list(found.values())


# --- which steps may stand where -------------------------------------------------------------------


def _checked(steps: list[Step], name: str) -> Chain:
    """Return a chain with an allocation.

    Raises:
        ValueError: a step that cannot stand where it does, or changes nothing there.
    """
    if name in RECIPES and RECIPES[name].repair:
        raise ValueError(f"{name} only repairs: expected a chain before it, such as wanda > {name}")
    _check_order(steps, name)
    steps = _with_allocation(steps)
    if idle := _idle(steps):
        expected = "expected one score and limits, then one allocation, then other steps"
        raise ValueError(f"chain {name!r}: {expected}, got {idle[0].written}, which changes nothing there")
    for at, each in enumerate(steps, 1):
        each.depends_on(steps[at:])  # refuses the steps that cannot follow it
    made = Chain(tuple(steps), name)
    for each, other in itertools.product(steps, made.every):
        if other.name in each.excludes:
            raise ValueError(
                f"chain {name!r}: expected no {other.name} beside {each.name}: {each.excludes[other.name]}"
            )
    return made


def _check_order(steps: Sequence[Step], name: str) -> None:
    """Raise ValueError where nothing earlier is of a kind that a step stands after."""
    kinds = set()
    for each in steps:
        if begins_chain(type(each)) and each is not steps[0]:
            raise ValueError(f"chain {name!r}: expected {each.name} first, got it behind {steps[0].written}")
        if each.after and not kinds.intersection(each.after):
            if kinds <= {"limits"}:
                raise ValueError(f"chain {name!r}: expected a score first, such as wanda, got {each.name}")
            expected = " or ".join(each.after)
            raise ValueError(f"chain {name!r}: expected {expected} before {each.name}, got {steps[0].name}")
        kinds.add(each.kind)
    if kinds <= {"limits"}:
        raise ValueError(f"chain {name!r}: expected a score first, such as wanda, got nothing")


def begins_chain(kind: type[Step]) -> bool:
    """Tell whether a step stands at the beginning in place of a score and an allocation: it takes chains."""
    return kind.kind == "allocation" and not kind.after


def _scoring(steps: Sequence[Step]) -> list[Step]:
    """Take the scores and limits at the beginning."""
    return [*itertools.takewhile(lambda each: each.kind in ("score", "limits"), steps)]


def _with_allocation(steps: list[Step]) -> list[Step]:
    """Add `uniform` behind the scores and limits where no allocation follows them."""
    early = _scoring(steps)
    rest = steps[len(early) :]
    chooses = rest and (begins_chain(type(rest[0])) or isinstance(rest[0], Allocation))
    if chooses:
        return steps
    return [*early, Uniform(), *rest]


def _idle(steps: Sequence[Step]) -> list[Step]:
    """List the steps that change nothing where they stand."""
    early = _scoring(steps)
    rest = steps[len(early) :]
    # The last score takes the place of those before it; `scenarios` takes that of all that turned scores before it.
    idle: list[Step] = [*[each for each in early if isinstance(each, Score)][:-1]]
    reduced = max((at for at, each in enumerate(early) if isinstance(each, Scenarios)), default=0)
    idle += [each for each in early[:reduced] if each.kind == "score" and not isinstance(each, Score)]
    # Nothing after the first allocation chooses by another one, nor reads scores or limits after the last choice.
    idle += [each for each in rest[1:] if isinstance(each, (Allocation, Score))]
    last = max(at for at, each in enumerate(rest) if each.kind in ("allocation", "refinement"))
    idle += [each for each in rest[last:] if each.kind in ("score", "limits")]
    return idle


# --- reading -------------------------------------------------------------------------------------


def steps_of(text: str) -> list[Step]:
    """Read steps, perhaps a part of a chain, of which none stands for several.

    Raises:
        ValueError: something is unknown or wrong, or a step stands for several.
    """
    found: list[Step] = []
    for segment in split(text, ">,"):
        if segment == NONE:
            continue
        (_, steps), *others = _read(segment)
        if others:
            raise ValueError(f"chain: expected one value an option, got {segment!r}")
        found += steps
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
    types = {field.name: str(field.type) for field in options_of(kind)}
    options = _options(segment, kind, call)
    several = {}
    for name, value in options.items():
        if isinstance(value, tuple) and value and "tuple" not in types[name]:
            several[name] = value
    for values in itertools.product(*several.values()):
        chosen = {**options, **dict(zip(several, values, strict=True))}
        check_values(kind, chosen, f"{kind.name}.")
        for name, value in chosen.items():
            if "float" in types[name] and "int" not in types[name]:
                chosen[name] = _number(value)
        try:
            made = kind(**chosen)
        except TypeError as error:
            # Python names the constructor in front of what is wrong, which the user has not seen
            raise ValueError(f"{segment!r}: {str(error).partition(') ')[2] or error}") from None
        yield made.written if several else segment, (made,)


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
    fields = options_of(kind)
    if begins_chain(kind):
        if call.inside.strip():
            inside = split(call.inside, ",")
        else:
            inside = []
        return {fields[0].name: tuple(map(parse, inside))}
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
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"{segment!r}: expected each option of {kind.name} once, got one twice")
    known = [field.name for field in fields]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
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
    if type(value) is int:
        return float(value)
    return value


def allocation_of(chain: Chain) -> tuple[Allocation, Within]:
    """Take the first allocation of a chain, and the limits by which it chooses: those before it."""
    return _allocation_of(chain.steps)


def limits_of(chain: Chain) -> Within:
    """Join the limits of a chain."""
    return _limits_of(chain.steps)


def _allocation_of(steps: Sequence[Step]) -> tuple[Allocation, Within]:
    for at, each in enumerate(steps):
        if isinstance(each, Allocation):
            return each, _limits_of(steps[:at])
    raise ValueError("chain: expected an allocation, got none")


def _limits_of(steps: Sequence[Step]) -> Within:
    limits = Within()
    for each in steps:
        if isinstance(each, Within):
            limits = each.joined(limits)
    return limits


# --- what a chain can remove, before it runs -----------------------------------------------------


def choices(steps: Sequence[Step]) -> list[tuple[Allocation, Within]]:
    """List which allocation chooses by which limits: the first one, and as refinements do by limits after it."""
    allocation, before = _allocation_of(steps)
    every = _limits_of(steps)
    if every == before:
        return [(allocation, before)]
    return [(allocation, before), (allocation, every)]


def prefix_of(steps: Sequence[Step], subject: Subject) -> Prefix:
    """Tell what is known of some steps before they run."""
    return Prefix(subject, _limits_of(steps), lambda: largest_ratio_of(steps, subject))


def asked_of_first(steps: Sequence[Step], subject: Subject, ratios: Iterable[float]) -> Iterator[float]:
    """Yield how much the first allocation is to remove where some ratios are to be gone after all steps."""
    backwards = []
    for at, each in reversed([*enumerate(steps)]):
        if each.runs_prefix:
            backwards.append((each, prefix_of(steps[:at], subject)))
    for ratio in ratios:
        for each, prefix in backwards:
            asked = each.plan(TextSize(1, 1), ratio, prefix).prefix_ratio
            ratio = ratio if asked is None else asked
        yield ratio


def largest_ratio_of(steps: Sequence[Step], subject: Subject) -> float:
    """Find the largest ratio that steps can meet whatever the scores, rounded down to four decimals."""
    inner = [each for step in steps for each in step.inner]
    if inner:
        top = min(largest_ratio_of(each.steps, subject) for each in inner)
    else:
        top = min(most_removable(subject, *each) for each in choices(steps))
    ratios = [share / 10_000 for share in range(9_999, -1, -1)]
    asked = asked_of_first(steps, subject, ratios)
    return next(ratio for ratio, rest in zip(ratios, asked, strict=False) if rest <= top)
