"""The seam: what the method needs of a model. What lies before it exists once, for all models.

Scenarios, seeds, grids, fusion, search, resuming and reports know a `Subject` and nothing else of a model. What lies
behind it (a scan over layers with a mesh, or a traced program that is interpreted) is right for one kind each.

| kind         | examples                            | loss of a row                | groups of a structure        |
|--------------|-------------------------------------|------------------------------|------------------------------|
| `llama`      | `Windows` of tokens                 | next token, nats a token     | layers, each with a width    |
| `traced`     | `(inputs, targets)` of a `Problem`  | the problem's, of an example | copies, all of one width     |
"""

import abc
import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.config.method import CalibrationConfig, EvaluationConfig
from saap_jax.estimation.ablation import Unit
from saap_jax.estimation.base import Curvature, Estimator, Statistic, Statistics
from saap_jax.runtime.decisions import UndecidedError
from saap_jax.runtime.gather import first_not_finite
from saap_jax.runtime.progress import Passes
from saap_jax.surgery.corrections import Correction, Repair, Walk
from saap_jax.types import Keep, Scores, WindowLosses

Examples = Any
"""Rows that a subject observes or is judged on; see the table above."""

Progress = Callable[[Sequence[Any]], Iterator[Any]]
"""Wraps the steps of a pass, to show progress."""


silent: Progress = iter
"""Show no progress."""

TOLERANCE = 1e-3
"""How far numbers that are equal but for rounding may be apart, relative to the largest; see `tolerance_of`."""


class Size(NamedTuple):
    """The size of examples."""

    rows: int
    length: int
    """Tokens of a row, with padding; 1 of a traced model."""
    tokens: int
    """Tokens of all rows, without padding; of a traced model, rows."""


@runtime_checkable
class GateObjective(Protocol):
    """How far a model with some units masked is from the whole one, on parts of a text."""

    parts: int
    """Number of parts that are learnt from; others are held out."""

    def gradient(self, gates: Scores, part: int) -> tuple[float, Scores]:
        """Compute what is lowered on a part in nats a token, and its derivative by each gate, of what is gone too."""
        ...

    def value(self, gates: Keep | Scores, part: int) -> float:
        """The divergence on a part in nats a token."""
        ...

    def judge(self, gates: Keep | Scores) -> float:
        """The divergence on what is held out."""
        ...


@runtime_checkable
class HasSubject(Protocol):
    """What can be pruned beside our models: it knows how it is seen by the method."""

    def as_subject(self) -> "Subject":
        """Make the subject of it."""
        ...


class Subject(abc.ABC):
    """A model as the method sees it. Units are `[groups, units]` a structure, in the order of `existing`."""

    name: str
    """What the user calls the model."""

    existing: functools.cached_property[Keep]
    """Which units there are."""
    costs: functools.cached_property[dict[str, np.ndarray]]
    """Parameters that one unit of each group takes with it, `[groups]` int64 a structure."""
    parameters: functools.cached_property[int]
    """All parameters, each once."""
    prunable: functools.cached_property[int]
    """The parameters that belong to a structure, each once."""
    weights: functools.cached_property[Any]
    """The parameters as formulas of estimators see them, `structures.weights.Weights`."""
    tolerance: functools.cached_property[float]
    """How far figures of the masked and of the cut model may be apart, relative to them."""
    described: Sequence[dict[str, Any]] = ()
    """The structures as a run records them; none where `attention` and `mlp` explain themselves."""

    @abc.abstractmethod
    def limits(self, within: Any) -> Any:
        """Say what a `steps.limits.Within` means here.

        Where layers are told apart, the same with what this model asks for beside it; else `types.Limits` of each
        structure, all its groups alike.

        Raises:
            ValueError: an option that has no meaning for this kind of model.
        """

    @abc.abstractmethod
    def removed(self, keep: Keep) -> int:
        """Count the prunable parameters that a cut removes."""

    def check_estimators(self, estimators: Mapping[str, Estimator]) -> None:
        """Raise ValueError for an estimator that looks at what this model does not have."""
        return

    @abc.abstractmethod
    def scenarios(self, config: CalibrationConfig) -> dict[str, Examples]:
        """Draw the calibration examples of each scenario, by `config.seed`."""

    @abc.abstractmethod
    def texts(self, config: EvaluationConfig) -> dict[str, Examples]:
        """What the model is judged on by metric, the one of the calibration domain first."""

    @abc.abstractmethod
    def size(self, examples: Examples) -> "Size":
        """Measure examples."""

    @abc.abstractmethod
    def observe(
        self,
        examples: Examples,
        needs: frozenset[Statistic],
        passes: Passes = Passes(),
        *,
        curvature: Curvature | None = None,
        keep: Keep | None = None,
    ) -> Statistics:
        """Run the one pass over examples; with `keep`, with all other units masked."""

    @abc.abstractmethod
    def losses(
        self,
        examples: Examples,
        keeps: Sequence[Keep],
        *,
        batch_size: int = 8,
        at_once: int = 8,
        done: Collection[int] = (),
        progress: Progress = silent,
    ) -> Iterator[dict[int, WindowLosses]]:
        """Yield the losses of each row under each keep-set by masks, by the number of the keep-set, a group at a time.

        How keep-sets are grouped depends on all of them and not on `done`, those that need no evaluation.
        """

    @abc.abstractmethod
    def ablate(
        self,
        examples: Examples,
        units: Sequence[Unit],
        *,
        batch_size: int = 8,
        done: Mapping[Unit, float] | None = None,
        save: Callable[[list[tuple[Unit, float]]], None] | None = None,
        progress: Progress = silent,
    ) -> dict[Unit, float]:
        """Compute the exact change of the mean loss when each unit goes by itself; positive: the unit helps."""

    def check_repair(self, repair: Repair, microbatches: int) -> None:
        """Raise ValueError for a repair that this model cannot have, from so many microbatches of examples."""
        return

    @abc.abstractmethod
    def unrepaired(self, repair: Repair, keep: Keep | None = None) -> dict[str, str]:
        """Say why a repair leaves structures as they are, by name; with `keep` those that lose units."""

    @abc.abstractmethod
    def repaired(
        self,
        keep: Keep,
        examples: Examples,
        repair: Repair,
        *,
        dense: "Subject",
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> tuple["Subject", Sequence[Correction]]:
        """Make the subject whose kept units stand in for the removed ones, and what was done where.

        It wants the masks all the same. `dense` is the unpruned model; `progress` wraps the places.
        """

    @abc.abstractmethod
    def load(self, directory: Any) -> "Cut":
        """Read back what `Cut.save` wrote."""

    @abc.abstractmethod
    def cut(self, keep: Keep) -> "Cut":
        """The smaller model."""

    @abc.abstractmethod
    def digests(self) -> dict[str, str]:
        """Digests of what the model is, by what a refusal calls them."""

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What a run records of the model: name, parameters, groups (`layers`), units."""


class LanguageModel(Subject):
    """A model of tokens that tells attention and MLP of layers apart: what more steps can ask of it.

    A step that needs it says so by `of = LanguageModel`.
    """

    @abc.abstractmethod
    def articles(self, config: EvaluationConfig) -> dict[str, list[int]]:
        """The number of the article of each window of these texts, as far as they have articles."""

    @abc.abstractmethod
    def objective(
        self, examples: Examples, batch_size: int, dense: "Subject", language_loss: float = 0.0, first: int = 0
    ) -> "GateObjective":
        """What the training of gates lowers: the divergence from `dense`, and some of the next-token loss.

        A divergence may be infinite or NaN: choose by `runtime.decisions.least_first`.

        Args:
            first: layers in front of this one are whole, whatever gates say; derivatives of their gates are 0.

        Raises:
            ValueError: too few examples to hold some out, or nothing but padding in these.
        """

    @abc.abstractmethod
    def blanked(self, examples: Examples, rows: np.ndarray) -> Examples:
        """Leave the tokens of some rows, `[rows]` True, out of every mean; shapes stay."""

    @abc.abstractmethod
    def continued(self, examples: Examples, rows: int, prompt: int, *, temperature: float, seed: int) -> Examples:
        """Write as many rows as are asked for, each from the first tokens of one of the examples on, in turn.

        All are as long as the examples, and end before that nowhere. Only examples without padding are gone on from.

        Args:
            prompt: how many tokens that is, at most half of an example.

        Raises:
            ValueError: no example without padding.
        """

    @abc.abstractmethod
    def divergences(self, examples: Examples, keep: Keep, pruned: "Subject", *, batch_size: int = 8) -> np.ndarray:
        """Compute the mean KL(p ‖ p_pruned) of each row in nats a token, `[rows]`; of rows without tokens NaN."""

    @abc.abstractmethod
    def layerwise(
        self,
        keep: Keep,
        examples: Examples,
        rule: str,
        walk: Walk,
        *,
        dense: "Subject",
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> tuple[Keep, tuple["Subject", Sequence[Correction]] | None]:
        """Choose as many units of each group and structure, chosen behind the groups that were pruned already.

        With a repair in `walk` also what `repaired` would give of them.
        """

    @abc.abstractmethod
    def folded(self, scales: Scores) -> "Subject":
        """Multiply what each unit writes by its factor."""


class Cut(Protocol):
    """A smaller model."""

    @property
    def parameters(self) -> int:
        """All parameters."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of all parameters in memory."""
        ...

    @property
    def segments(self) -> int:
        """Stretches of equal layers, each compiled once."""
        ...

    def losses(self, examples: Examples, batch_size: int) -> WindowLosses:
        """The loss of each row."""
        ...

    def save(
        self,
        directory: Any,
        keep: Keep,
        about: Mapping[str, Any] = MappingProxyType({}),
        *,
        further: Mapping[str, dict[str, Any] | str] = MappingProxyType({}),
    ) -> None:
        """Write the model to a new directory.

        Args:
            keep: which units of the unpruned model it has.
            about: further plain values for its record.
            further: JSON objects and texts by file name.
        """
        ...


def tolerance_of(dtype: Any) -> float:
    """Give `TOLERANCE`, or eight roundings of a coarser type.

    >>> tolerance_of(jnp.float32), tolerance_of(jnp.bfloat16)
    (0.001, 0.0625)
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return max(TOLERANCE, 8 * float(jnp.finfo(dtype).eps))
    return TOLERANCE


def joined(parts: Sequence[Examples]) -> Examples:
    """Put examples one after the other."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def rows_of(examples: Examples, chosen: slice | np.ndarray) -> Examples:
    """Take some rows of examples, in the order that is asked for."""
    return jax.tree.map(lambda array: array[chosen], examples)


def tokens_at_once(subject: Subject, examples: Examples, rows: int) -> int:
    """Count the tokens, with padding, of a batch of so many rows, or of all rows where there are fewer."""
    size = subject.size(examples)
    return min(rows, size.rows) * size.length


def articles_of(subject: Subject, config: EvaluationConfig) -> dict[str, list[int]]:
    """Number the article of each window of the evaluation texts; none of a traced model."""
    if isinstance(subject, LanguageModel):
        return subject.articles(config)
    return {}


def structures_record(subject: Subject) -> dict[str, Any]:
    """Record the structures of a run, where the model has others than `attention` and `mlp`."""
    if subject.described:
        return {"structures": subject.described}
    return {}


def language_model(who: str, subject: Subject) -> LanguageModel:
    """Return a subject as a language model.

    Raises:
        ValueError: its units are not those of attention and MLP of layers, which `who` is for.
    """
    if not isinstance(subject, LanguageModel):
        raise ValueError(f"{who}: is for attention and MLP of layers, which this model does not tell apart")
    return subject


def run_losses(subject: Subject, examples: Examples, keep: Keep, batch_size: int) -> WindowLosses:
    """The losses of each row under one keep-set."""
    (group,) = subject.losses(examples, [keep], batch_size=batch_size, at_once=1)
    return group[0]


@contextlib.contextmanager
def explained(who: str, subject: Subject, texts: Mapping[str, Examples], batch_size: int) -> Iterator[None]:
    """Say, where a number that decides is not finite, whose fault that is; what does not decide costs nothing.

    Args:
        who: wants to choose.
        subject: the model that is pruned.
        texts: what it goes by, by name.

    Raises:
        ValueError: such a number, with the model, and the first window on which its loss is none.
    """
    try:
        yield
    except UndecidedError as error:
        raise ValueError(f"{who}: {error}; {_fault(subject, texts, batch_size)}") from error


def _fault(subject: Subject, texts: Mapping[str, Examples], batch_size: int) -> str:
    """Find the first window on which the loss of a model with all its units is not finite, and say why."""
    model = f"the model {subject.name}, with all its units,"
    for name, examples in texts.items():
        count, length, _ = subject.size(examples)
        tokens = [subject.size(rows_of(examples, slice(row, row + 1))).tokens for row in range(count)]
        predicting = np.flatnonzero(np.array(tokens) >= min(length, 2))  # rows that have a loss
        losses = run_losses(subject, examples, subject.existing, batch_size).means
        wrong = np.flatnonzero(~np.isfinite(losses))
        if len(wrong):
            kind = "window" if length > 1 else "example"
            why = "its activations overflow: take a wider dtype, or another text"
            if place := first_not_finite(subject.weights.model or subject.weights):
                why = f"its weights are not finite in {place}: load another model"
            return f"{model} has a loss of {losses[wrong[0]]} on {kind} {predicting[wrong[0]]} of {name}, from 0; {why}"
    return (
        f"{model} has finite losses on all of the text, so it overflows as it is pruned or repaired: remove less, or "
        "take a wider dtype"
    )
