"""`saap_jax.prune` for a model of one's own: smaller parameters of the same kind, a function of any shape, widths."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from saap_jax.runtime.progress import Passes, Track, quiet
from saap_jax.steps.chain import Chain, parse
from saap_jax.steps.run import Runner
from saap_jax.surgery.corrections import Correction
from saap_jax.trace.adapters import from_equinox, from_keras, from_nnx
from saap_jax.trace.cut import like
from saap_jax.trace.own_code import compared
from saap_jax.trace.problem import Examples, Problem
from saap_jax.trace.subject.subject import CutTraced, TracedSubject, subject_of
from saap_jax.trace.trace import by_path, groups_of
from saap_jax.types import Keep

ADAPTERS: dict[str, Callable[..., Problem]] = {"flax.nnx": from_nnx, "equinox": from_equinox, "keras": from_keras}
"""Adapters of models that hold their parameters, by the library whose `Module` or `Model` they are."""


class Width(NamedTuple):
    """How many units a structure has before and after, and what they are."""

    role: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True, repr=False)
class Pruned:
    """A pruned model."""

    params: Any
    """The smaller parameters: the pytree of the problem's, with the same types and shardings of arrays."""
    function: Callable[..., Any]
    """`function(params, *inputs)` for inputs of any shape that the dense model takes."""
    widths: dict[str, Width]
    """What the model's configuration has to say, by structure; equal layers in one entry where they agree."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Shape of each parameter that changes, before and after, by path."""
    keep: Keep
    """The units that are kept, `[copies, units]` a structure."""
    ratio: float
    """Share of the prunable parameters that is removed."""
    losses: dict[str, float]
    """Mean held-out loss: `dense`, `masked`, `cut`."""
    rebuild: Callable[[Any], Any] | None
    corrections: list[Correction] = dataclasses.field(default_factory=list)
    """What repairs did to each matrix."""
    unrepaired: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Structures that lost units and that repairs left as they are, and why."""

    @functools.cached_property
    def model(self) -> Any:
        """The user's object with the smaller parameters, in the mode (training, evaluation) in which it was given; the
        parameters where an object holds none."""
        if self.rebuild:
            return self.rebuild(self.params)
        return self.params

    def __repr__(self) -> str:
        """Say widths and losses in one line."""
        widths = ", ".join(f"{name} {width.before} -> {width.after}" for name, width in self.widths.items())
        return (
            f"Pruned({self.ratio:.1%} removed: {widths}; loss {self.losses['dense']:.4g} -> {self.losses['cut']:.4g})"
        )


def prune(
    model: Any,
    *,
    ratio: float = 0.25,
    method: str | Chain = "gate_taylor > uniform",
    norms: bool = False,
    refused: bool = False,
    batch_size: int = 8,
    track: Track = quiet,
    **problem: Any,
) -> Pruned:
    """Prune a model of one's own.

    >>> from flax import nnx
    >>> net = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    >>> x, y = jax.numpy.ones((4, 3)), jax.numpy.ones((4, 2))
    >>> prune(net, loss=lambda a, b: abs(a - b).mean(), ratio=0.5, calibration=(x, y), held_out=(x + 1, y)).ratio
    0.5

    Args:
        model: a `Problem`, or a model that holds its parameters (NNX, Equinox, Keras), with `loss`, `calibration`,
            `held_out` and what else its adapter takes as further arguments. Of Linen and Haiku, give a `Problem` of
            `adapters.from_linen` or `from_haiku`.
        ratio: share of the prunable parameters to remove at least.
        method: a chain of steps, such as `fused(attention=fused) > uniform > least_squares`; see `steps.chain`.
        norms, refused: see `traced_problem`.

    Raises:
        ValueError: bad input, a ratio that cannot be met, or a cut model that is not the masked one.
    """
    chain = parse(method) if isinstance(method, str) else method
    given = _problem_of(model, problem)
    subject = subject_of(given, norms=norms, refused=refused)
    runner = Runner(subject, subject.problem.scenarios, [chain], Passes(batch_size, track=track))
    runner.check(chain, [ratio])
    state = runner.run(chain, ratio)
    repaired = state.subject
    keep = state.keep
    assert isinstance(repaired, TracedSubject)
    cut = repaired.cut(keep)
    losses = checked_losses(subject, keep, cut, subject.problem.held_out_sets, batch_size)
    widths: dict[str, Width] = {}
    for pattern, group in groups_of(subject.structures).items():
        each = {one.name: Width(one.role, one.units, int(keep[one.name].sum(1)[0])) for one in group}
        if len(set(each.values())) == 1:
            widths |= {pattern: each[group[0].name]}
        else:
            widths |= each
    params = jax.tree.map(like, cut.params, given.params)
    before = subject.traced.shapes
    after = {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}
    return Pruned(
        params=params,
        function=cut.function,
        widths=widths,
        shapes={path: (shape, after[path]) for path, shape in before.items() if shape != after[path]},
        keep=keep,
        ratio=subject.removed(keep) / subject.prunable,
        losses=losses,
        rebuild=subject.problem.rebuild,
        corrections=list(state.metrics.get("corrections", ())),
        unrepaired=chain.unrepaired(subject, keep),
    )


def checked_losses(
    subject: TracedSubject, keep: Keep, cut: CutTraced, sets: Mapping[str, Examples], batch_size: int
) -> dict[str, float]:
    """Compute the mean losses on the first of some sets of examples: `dense`, `masked`, `cut`; the last two with the
    parameters that were cut, compensated or not.

    Raises:
        ValueError: one that is not finite, or the cut model's is not that of the masked one, but for rounding.
    """
    examples = next(iter(sets.values()))
    (dense,) = subject.losses(examples, [subject.existing, keep], batch_size=batch_size, at_once=2)
    (masked,) = cut.subject.losses(examples, [subject.existing, keep], batch_size=batch_size, at_once=2)
    losses = {"dense": dense[0].mean, "masked": masked[1].mean, "cut": cut.losses(examples, batch_size).mean}
    if not np.isfinite([losses["dense"], losses["masked"]]).all():
        raise ValueError(
            f"held_out: expected finite losses, got {losses['dense']:.6g} of the model and {losses['masked']:.6g} of "
            "the pruned one; check the parameters, the examples and the loss"
        )
    if not abs(losses["cut"] - losses["masked"]) <= subject.tolerance * max(abs(losses["masked"]), 1e-6):
        raise ValueError(
            f"expected the cut model to have the masked one's held-out loss of {losses['masked']:.6g} within "
            f"{subject.tolerance:g}, got {losses['cut']:.6g}; please report this with the model"
        )
    return losses


def own_code(cut: CutTraced) -> str:
    """Say what the model's own code makes of the smaller parameters, beside the pruned program."""
    problem = cut.subject.problem
    inputs = problem.inputs(problem.row(next(iter(problem.held_out_sets.values())), 0)[0])
    try:
        own = problem.function(cut.params, *inputs)
    except Exception as error:  # whatever the user's code says about sizes
        first = " ".join(str(error).split())[:120]
        return f"the model's own code does not take the smaller parameters ({type(error).__name__}: {first})"
    same = compared(own, cut.function(cut.params, *inputs)).verdict == "takes"
    return f"the model's own code takes the smaller parameters, with {'the same' if same else 'other'} outputs"


def _problem_of(model: Any, given: Mapping[str, Any]) -> Problem:
    if isinstance(model, Problem):
        if given:
            raise ValueError(f"prune: expected nothing more beside a Problem, got {', '.join(given)}")
        return model
    for kind in type(model).__mro__:
        for library, adapter in ADAPTERS.items():
            if kind.__module__.startswith(library) and kind.__name__ in ("Module", "Model"):
                return adapter(model, **given)
    raise ValueError(
        f"prune: expected a Problem or a module of NNX, Equinox or Keras, got {type(model).__name__}; build a Problem, "
        "for Linen and Haiku with saap_jax.trace.adapters"
    )
