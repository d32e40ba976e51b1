"""What pruning a researcher's own model needs to know of it: the function, its parameters, a loss, and examples."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.runtime.mesh import automatic

Examples = tuple[Any, Any]
"""(inputs, targets): pytrees of arrays whose first axis numbers the examples. Of a function of several inputs, `inputs`
is a plain tuple of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, what is asked of it, and on what.

    >>> import jax, jax.numpy as jnp
    >>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
    >>> problem = Problem(
    ...     function=lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"],
    ...     params={"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))},
    ...     loss=lambda outputs, targets: jnp.square(outputs - targets).mean(),
    ...     calibration=(x, y),
    ...     held_out=(x + 1, y),
    ... )
    >>> problem.count, problem.row(problem.first_set, 0)[1].shape
    (4, (1, 2))
    """

    function: Callable[..., Any]
    """`function(params, *inputs)`: outputs of a batch of examples, each array of them with the batch first."""
    params: Any
    """Arrays, in any pytree. Shapes (`jax.eval_shape`) do for `load_pruned`, which reads the values."""
    loss: Callable[[Any, Any], Any]
    """`loss(outputs, targets)`: one number for a batch, the mean over its examples. It is asked for one at a time."""
    calibration: Examples | Mapping[str, Examples]
    """What units are scored on; sets of it by name are scenarios, whose scores are kept apart."""
    held_out: Examples | Mapping[str, Examples]
    """What pruned models are judged on; of sets by name, the first is of the calibration domain."""
    rebuild: Callable[[Any], Any] | None = None
    """Makes the user's object (a module) of parameters, where the parameters were taken out of one."""

    def __post_init__(self) -> None:
        for name in ("function", "loss"):
            if not callable(getattr(self, name)):
                raise ValueError(f"Problem.{name}: expected a function, got {type(getattr(self, name)).__name__}")
        for leaf in jax.tree.leaves(self.params):
            if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
                raise ValueError(
                    f"Problem.params: expected arrays, got {type(leaf).__name__}; let the function hold it"
                )
            if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
                raise ValueError(
                    f"Problem.params: expected numbers, got {leaf.dtype}; let the function hold random keys"
                )
        shapes = {}
        for field in ("calibration", "held_out"):
            for key, given in _sets(getattr(self, field), field).items():
                name = field if key == field else f"{field}[{key!r}]"
                if not re.fullmatch(r"[\w.-]+", key):
                    raise ValueError(
                        f"Problem.{field}: expected names of letters, digits, '.', '_' and '-', got {key!r}"
                    )
                if not (isinstance(given, tuple) and len(given) == 2):
                    raise ValueError(f"Problem.{name}: expected a pair (inputs, targets), got {type(given).__name__}")
                shapes[name] = example_shapes(name, given)
        first, *others = shapes
        for name in others:
            if shapes[name] != shapes[first]:
                raise ValueError(
                    f"Problem.{name}: expected examples of the shapes and types of {first}, {shapes[first]}, got "
                    f"{shapes[name]}"
                )

    def without_explicit_axes(self) -> "Problem":
        """Leave the arrays where they lie, on meshes whose axes are not explicit."""
        params, calibration, held_out = automatic((self.params, self.calibration, self.held_out))
        return dataclasses.replace(self, params=params, calibration=calibration, held_out=held_out)

    @property
    def scenarios(self) -> dict[str, Examples]:
        """The calibration examples of each scenario; of one set, `calibration`."""
        return _sets(self.calibration, "calibration")

    @property
    def held_out_sets(self) -> dict[str, Examples]:
        """The held-out examples of each set; of one, `held_out`."""
        return _sets(self.held_out, "held_out")

    @property
    def first_set(self) -> Examples:
        """The calibration examples of the first scenario."""
        return next(iter(self.scenarios.values()))

    @property
    def count(self) -> int:
        """Calibration examples, of all scenarios."""
        return sum(map(count_examples, self.scenarios.values()))

    def inputs(self, inputs: Any) -> tuple[Any, ...]:
        """Give the inputs as the function takes them."""
        return inputs if type(inputs) is tuple else (inputs,)

    def row(self, examples: Examples, index: int) -> Examples:
        """Take one example as a batch of one."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[index : index + 1]), examples)

    def loss_of(self, outputs: Any, targets: Any) -> Any:
        """Compute the loss of a batch of one example.

        Raises:
            ValueError: the loss returns something else than one number.
        """
        value = self.loss(outputs, targets)
        if not isinstance(value, jax.Array) or value.size != 1 or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype} of shape {value.shape}" if isinstance(value, jax.Array) else type(value).__name__
            raise ValueError(f"Problem.loss: expected one number of floating point for one example, got {got}")
        return value.reshape(())


def _sets(given: Any, name: str) -> dict[str, Any]:
    """Name sets of examples."""
    if not isinstance(given, Mapping):
        return {name: given}
    if not given:
        raise ValueError(f"Problem.{name}: expected one set of examples at least, got none")
    return dict(given)


def count_examples(examples: Examples) -> int:
    """Count examples."""
    return len(jax.tree.leaves(examples)[0])


def example_shapes(name: str, examples: Examples) -> list[str]:
    """Tell type and shape of each array of one example; raise where there is none, or their numbers differ."""
    leaves = jax.tree.leaves(examples)
    counts = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in leaves}
    if len(counts) != 1 or counts & {None, 0}:
        got = [getattr(leaf, "shape", type(leaf).__name__) for leaf in leaves]
        raise ValueError(f"Problem.{name}: expected arrays of as many examples each along their first axis, got {got}")
    return [f"{leaf.dtype}{list(leaf.shape[1:])}" for leaf in leaves]
