"""The estimators by name: add yours with one line here."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable

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


def make_estimator(text: str) -> Estimator:
    """Make an estimator from its name, with hyper-parameters in brackets if any.

    >>> sorted(make_estimator("taylor_element(reduction='max')").needs)
    [<Statistic.WEIGHT_GRADIENT: 'weight_gradient'>]

    Raises:
        ValueError: an unknown name (the nearest one is suggested), an unknown hyper-parameter or a malformed call.
    """
    name, options = _parse(text)
    if name not in ESTIMATORS:
        near = difflib.get_close_matches(name, ESTIMATORS, n=1, cutoff=0.0)
        raise ValueError(f"unknown estimator {name!r}; did you mean {near[0]!r}? Known: {', '.join(ESTIMATORS)}")
    factory = ESTIMATORS[name]
    known = [parameter.name for parameter in inspect.signature(factory).parameters.values()]
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"estimator {name!r}: unknown hyper-parameter {option!r}; it {takes}")
    return factory(**options)


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
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            pairs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            if None not in pairs:
                return node.func.id, pairs
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"estimator: expected NAME or NAME(option=value, …), got {text!r}")
