"""What is cheaper to check is still checked: every function and dataclass of the package, with jaxtyping's error."""

import dataclasses
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float

from saap_jax.evaluation.resample import few

Vector = Float[np.ndarray, "n"]
typed = jaxtyping.jaxtyped(typechecker=beartype)


@typed
def length(of: list[int], *, at_least: int = 0) -> int:
    return max(len(of), at_least) if of else "none"  # pyright: ignore[reportReturnType]


@typed
def same(a: Vector, b: Vector) -> Vector:
    return a + b


@typed
def numbers(count: int) -> Iterator[int]:
    yield from range(count)


@typed
@dataclasses.dataclass
class Named:
    name: str
    values: Vector | None = None


@pytest.mark.parametrize(
    "fault",
    [
        lambda: length("abc"),
        lambda: length([1], at_least=1.5),
        lambda: length([]),
        lambda: same(np.ones(2), np.ones(3)),
        lambda: Named(3),
        lambda: Named("a", np.ones((2, 2))),
        lambda: few("2"),
        lambda: numbers("2"),
    ],
)
def test_faults_are_found(fault, monkeypatch):
    with pytest.raises(jaxtyping.TypeCheckError):
        list(fault())
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # negative control: nothing else finds them
    found = None
    try:
        list(fault())
    except (TypeError, ValueError) as error:
        found = type(error)
    assert found is not jaxtyping.TypeCheckError
    assert (length([1, 2], at_least=3), same(np.ones(2), np.ones(2)).sum(), Named("a", np.ones(2)).name) == (3, 4, "a")
