"""From a model of another library to a `Problem`: NNX, Linen, Equinox, Haiku or Keras.

Each adapter takes the model as it is, and says what a traced program needs: dropout off, random keys fixed and out of
the parameters, statistics of batch norm beside the weights (they have the channels' axis, so they go with them), and
what is no array kept apart. `call(model, *inputs)` says how a model that holds its parameters is called where that is
more than `model(*inputs)`; with `has_aux`, outputs are a pair, the first of which counts. The libraries are imported
when they are asked for; none of them is needed otherwise.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from saap_jax.trace.problem import Examples, Problem


class Given(TypedDict):
    """What every adapter takes beside the model, as `Problem` has it, and whether outputs are a pair."""

    loss: Callable[[Any, Any], Any]
    calibration: Examples | Mapping[str, Examples]
    held_out: Examples | Mapping[str, Examples]
    has_aux: NotRequired[bool]


OFF: dict[str, bool] = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
    "inference": True,
    "use_running_average": True,
}
"""How libraries name the switch of dropout and batch statistics, and what it is when a model is judged."""


def _posed(
    run: Callable[..., Any], params: Any, given: Mapping[str, Any], rebuild: Callable[[Any], Any] | None = None
) -> Problem:
    """Build a problem of a function, of whose outputs the first counts where they are a pair."""

    def first(params: Any, *inputs: Any) -> Any:
        outputs = run(params, *inputs)
        if not isinstance(outputs, tuple | list) or len(outputs) < 2:
            raise ValueError(
                f"has_aux: expected a pair of outputs and what else there is, got {type(outputs).__name__}"
            )
        return outputs[0]

    fields = {name: value for name, value in given.items() if name != "has_aux"}
    function = first if given.get("has_aux") else run
    return Problem(function=function, params=params, rebuild=rebuild, **fields)


def from_nnx(model: nnx.Module, *, call: Callable[..., Any] | None = None, **given: Unpack[Given]) -> Problem:
    """Build the problem of a Flax NNX module, which is not changed; a copy is put into its evaluation mode."""
    copy = nnx.clone(model)
    copy.eval()
    graph, params, rest = nnx.split(copy, _is_weight, ...)
    own, _, _ = nnx.split(model, _is_weight, ...)

    def function(params: Any, *inputs: Any) -> Any:
        built = nnx.clone(nnx.merge(graph, params, rest))  # of variables that a call may change, as rngs are
        if call:
            return call(built, *inputs)
        return built(*inputs)

    return _posed(function, params, given, lambda params: nnx.clone(nnx.merge(own, params, rest)))


def from_linen(module: linen.Module, variables: Any, **given: Unpack[Given]) -> Problem:
    """Build the problem of a Flax Linen module and its variables, those of `batch_stats` included.

    The function is `module.apply`, with the switches of `OFF` that the module takes.
    """
    switches: dict[str, Any] = {n: OFF[n] for n in inspect.signature(type(module).__call__).parameters if n in OFF}
    return _posed(lambda variables, *inputs: module.apply(variables, *inputs, **switches),
                  linen.meta.unbox(variables), given)  # fmt: skip


def from_equinox(
    model: Any, *, state: Any = None, call: Callable[..., Any] | None = None, **given: Unpack[Given]
) -> Problem:
    """Build the problem of an Equinox module, which is called on one example at a time.

    Args:
        state: the state of a stateful model (batch norm), which is then called as `model(*inputs, state)`, or by
            `call(model, *inputs, state)`, and returns a pair in any case.
    """
    import equinox

    _, own = equinox.partition((model, state), _is_number)
    params, rest = equinox.partition((equinox.nn.inference_mode(model), state), _is_number)
    run = call or (lambda model, *inputs: model(*inputs))

    def function(params: Any, *inputs: Any) -> Any:
        built, held = equinox.combine(params, rest)
        further = () if state is None else (held,)
        return jax.vmap(lambda *row: run(built, *row, *further), out_axes=0)(*inputs)

    def rebuild(params: Any) -> Any:
        built, held = equinox.combine(params, own)
        return built if state is None else (built, held)

    return _posed(function, params, {**given, "has_aux": state is not None or given.get("has_aux", False)}, rebuild)


def from_haiku(
    transformed: Any,
    params: Any,
    *,
    state: Any = None,
    arguments: Mapping[str, Any] | None = None,
    **given: Unpack[Given],
) -> Problem:
    """Build the problem of a transformed Haiku function and its parameters.

    Args:
        state: the state, of `hk.transform_with_state`; its parameters are then a pair (params, state).
        arguments: what the function takes beside the inputs, such as `is_training=False`.
    """
    further = dict(arguments or {})

    def function(params: Any, *inputs: Any) -> Any:
        if state is None:
            return transformed.apply(params, None, *inputs, **further)
        return transformed.apply(*params, None, *inputs, **further)[0]

    return _posed(function, params if state is None else (params, state), given)


def from_keras(model: Any, **given: Unpack[Given]) -> Problem:
    """Build the problem of a built Keras 3 model on its JAX backend; parameters are arrays by the variables' paths.

    Raises:
        ValueError: another backend, or a model that is not built.
    """
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(
            f"from_keras: expected Keras on its jax backend, got {keras.backend.backend()}; set KERAS_BACKEND=jax"
        )
    if not model.built:
        raise ValueError("from_keras: expected a built model, got one without variables; call it once")
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    count = len(model.trainable_variables)
    weights = [index for index, each in enumerate(variables) if jnp.issubdtype(each.value.dtype, jnp.floating)]
    others = {index: each.value for index, each in enumerate(variables) if index not in weights}
    paths = [variables[index].path for index in weights]
    names = [f"{path}.{n}" if (n := 1 + paths[:at].count(path)) > 1 else path for at, path in enumerate(paths)]

    def function(params: Any, *inputs: Any) -> Any:
        values = others | {index: params[name] for index, name in zip(weights, names, strict=True)}
        ordered = [values[index] for index in range(len(variables))]
        return model.stateless_call(ordered[:count], ordered[count:], *inputs, training=False)[0]

    return _posed(function, {name: variables[at].value for name, at in zip(names, weights, strict=True)}, given)


def _is_weight(path: Any, value: Any) -> bool:
    """Say whether an NNX variable holds numbers that go with units: not random keys and their counts."""
    if isinstance(value, nnx.RngState) or (isinstance(value, nnx.Variable) and issubclass(value.type, nnx.RngState)):
        return False
    if isinstance(value, nnx.Variable):
        held = value.get_value()
    else:
        held = value
    return bool(jax.tree.leaves(held)) and all(_is_number(leaf) for leaf in jax.tree.leaves(held))


def _is_number(leaf: Any) -> bool:
    """Say whether a leaf is an array of numbers, and no key."""
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return False
    return jnp.issubdtype(leaf.dtype, jnp.number)
