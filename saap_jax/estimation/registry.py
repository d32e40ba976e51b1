"""The estimators by name: add yours with one line here."""

import ast
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_origin

from saap_jax.estimation import activations, baselines, blocks, gates, hessian, second_order, taylor
from saap_jax.estimation.base import Estimator

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "random": baselines.random,
    "magnitude": baselines.magnitude,
    "taylor_vector": taylor.taylor_vector,
    "taylor_element": taylor.taylor_element,
    "taylor_element_second": second_order.taylor_element_second,
    "fisher": second_order.fisher,
    "gate_taylor": gates.gate_taylor,
    "gate_taylor_signed": gates.gate_taylor_signed,
    "gate_fisher": gates.gate_fisher,
    "gate_hessian": hessian.gate_hessian,
    "wanda": activations.wanda,
    "fluctuation": activations.fluctuation,
    "activation_frequency": activations.activation_frequency,
    "block_influence": blocks.block_influence,
}

_LONGEST = 1000
"""The most characters of a name with its hyper-parameters."""


def make_estimator(text: str) -> Estimator:
    """Make an estimator from its name, with hyper-parameters in brackets if any.

    >>> sorted(make_estimator("taylor_element(reduction='max')").needs)
    [<Statistic.WEIGHT_GRADIENT: 'weight_gradient'>]

    Raises:
        ValueError: an unknown name (the nearest one is suggested), an unknown hyper-parameter, a value that is none of
            it, or a malformed call.
    """
    name, options = _parse(text)
    if name not in ESTIMATORS:
        near = difflib.get_close_matches(name, ESTIMATORS, n=1, cutoff=0.0)
        raise ValueError(f"unknown estimator {name!r}; did you mean {near[0]!r}? Known: {', '.join(ESTIMATORS)}")
    factory = ESTIMATORS[name]
    known = inspect.signature(factory).parameters
    for option, value in options.items():
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"estimator {name!r}: unknown hyper-parameter {option!r}; it {takes}")
        if expected := _refused(value, known[option].annotation):
            raise ValueError(f"estimator {name!r}: {option}: expected {expected}, got {value!r}")
    return factory(**options)


def _refused(value: Any, kind: Any) -> str:
    """Return what a hyper-parameter takes, where a value is none of it; what is not annotated takes all.

    >>> _refused(3, Literal["sum", "max"]), _refused(3, int | float), _refused(3, bool)
    ("'sum' or 'max'", '', 'bool')
    """
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        return "" if value in kinds else " or ".join(map(repr, kinds))
    taken = (*kinds, int) if float in kinds else kinds
    if inspect.Parameter.empty in kinds or type(value) in taken:
        return ""
    return " or ".join(each.__name__ for each in kinds)


def make_estimators(texts: Iterable[str]) -> dict[str, Estimator]:
    """Make estimators keyed by the text that names them; a name given twice is refused."""
    estimators: dict[str, Estimator] = {}
    for text in texts:
        if text in estimators:
            raise ValueError(f"estimator {text!r} is named twice")
        estimators[text] = make_estimator(text)
    if not estimators:
        raise ValueError(f"expected at least one estimator of {', '.join(ESTIMATORS)}, got none")
    return estimators


def _parse(text: str) -> tuple[str, dict]:
    """Split "name(key=value, …)" into the name and its literal keyword arguments."""
    if len(text) > _LONGEST:
        raise ValueError(f"estimator: expected at most {_LONGEST} characters, got {len(text):,}: {text[:40]!r}...")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser: whatever is odd about the text, it is refused below
            node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            pairs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            if None not in pairs:
                return node.func.id, pairs
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # the last two: brackets in brackets
        pass
    raise ValueError(f"estimator: expected NAME or NAME(option=value, …), got {text!r}")
