"""Methods that configurations name and that anybody may add to: a value each, under a name, without jax.

What is registered in a CONFIG.py, or in a module that it imports, can be named there and by the options beside it.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

Method = TypeVar("Method")


class Registry(dict[str, Method]):
    """Methods by name."""

    def register(self, name: str, method: Method) -> Method:
        """Add a method.

        Raises:
            ValueError: the name is no identifier, or is taken by another method.
        """
        if not name.isidentifier():
            raise ValueError(f"register: expected an identifier, got {name!r}")
        if self.get(name, method) is not method:
            raise ValueError(f"register: {name!r} exists already; choose another name")
        self[name] = method
        return method

    def check(self, field: str, name: str, *others: str) -> None:
        """Raise ValueError unless a field names one of the methods, or of `others`; the nearest one is suggested."""
        known = (*self, *others)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{field}: expected one of {', '.join(known)}, got {name!r}{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """How a budget is shared between layers and structures."""

    budgets: Callable[[np.ndarray], np.ndarray] | None = None
    """Prunable parameters of each layer, or of each structure of a traced model (0 of what is left alone) -> the share
    of what is removed that each loses, together 1; within a budget all widths shrink alike. None: one budget and one
    ranking of all units."""
    budgets_by_scores: Callable[[np.ndarray, np.ndarray, float], np.ndarray] | None = None
    """The same of (parameters, mean score of the units of each, `search.softmax_temperature`), instead of `budgets`.
    What a layer cannot lose any more is shared by the others, in proportion to their shares."""
    rounded_down: tuple[str, ...] = ()
    """Structures of few units, of which a layer loses no more than its share, rounded down to whole units; the rest of
    what it loses comes from the others, as far as they have it. Only beside `budgets`."""
    stability: bool = False
    """Whether units rank by log score + `stability_weight` · stability indicator."""
    priority: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda scores, config: scores
    """(scores, `[layers, units]` a structure, NaN where no unit is; `SearchConfig`) -> what ranks instead of them."""

    @property
    def ranks(self) -> bool:
        """Whether there is one ranking of all units."""
        return self.budgets is None and self.budgets_by_scores is None

    def __post_init__(self) -> None:
        if self.budgets is not None and self.budgets_by_scores is not None:
            raise ValueError("Allocation: expected budgets or budgets_by_scores, got both")


def _logarithmic(size: np.ndarray) -> np.ndarray:
    """Give layers shares in proportion to their parameters and log(layer + 1). Source: SlimGPT (arXiv:2412.18110)."""
    shares = size * np.log1p(np.arange(len(size)))
    return shares / shares.sum() if shares.any() else size / size.sum()


def _softmax(size: np.ndarray, scores: np.ndarray, temperature: float) -> np.ndarray:
    """Give layers shares in proportion to e^(-score / ε). Source: MoDeGPT (arXiv:2408.09632), theorem 4.

    With what a layer cannot lose shared by the others it is the optimum of its problem, max Σ s (1 - φ) + ε H(φ) with
    a given mean of the sparsities φ, also where the bound of a φ is met. Deviation: layers of other sizes count by
    their parameters.
    """
    lowest = scores[size > 0].min(initial=np.inf)
    shares = size * np.exp(-(np.where(size > 0, scores, lowest) - lowest) / temperature)
    return shares / shares.sum()


ALLOCATIONS: Registry[Allocation] = Registry(
    {
        "uniform": Allocation(budgets=lambda size: size / size.sum()),
        "uniform_floor": Allocation(budgets=lambda size: size / size.sum(), rounded_down=("attention",)),
        "log": Allocation(budgets=_logarithmic, rounded_down=("attention",)),
        "softmax": Allocation(budgets_by_scores=_softmax, rounded_down=("attention",)),
        "global": Allocation(),
        "adaptive": Allocation(stability=True),
    }
)
"""Name in `search.allocation` -> how a budget is shared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionMethod:
    """How what is left of a layer stands in for what was removed."""

    solve: Callable[..., Any] | None = None
    """(sums, output matrix, kept rows, `CompensationConfig`) -> `surgery.corrections.Solved`; None of those that
    `surgery.corrections.SOLVERS` holds."""
    biases: bool = False
    """Whether it adds biases to the output projections."""
    damped: bool = False
    """Whether it has a damping, which is chosen on text that was held out unless it is given."""


CORRECTIONS: Registry[CorrectionMethod] = Registry(
    {
        "none": CorrectionMethod(),
        "bias": CorrectionMethod(biases=True),
        "least_squares": CorrectionMethod(damped=True),
    }
)
"""Name in `compensation.method` -> how what is left stands in for what was removed."""
