"""Numbers that decide: what is not finite comes last, or is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.runtime.decisions import UndecidedError, finite, least_first

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ([2.0, 1.0, 2.0, 0.5], [3, 1, 0, 2]),
        ([NAN, 1.0, INF, 0.5, -INF], [3, 1, 0, 2, 4]),
        ([NAN, 3.0], [1, 0]),
        ([], []),
    ],
)
def test_least_first_puts_what_is_not_finite_last(values, order):
    assert least_first("losses", values).tolist() == order
    if np.isfinite(values).all():
        assert order == np.argsort(values, kind="stable").tolist(), "as a plain sort does"


@pytest.mark.parametrize("values", [[NAN], [INF, NAN], [-INF]])
def test_least_first_refuses_none_that_is_finite(values):
    with pytest.raises(UndecidedError, match=f"expected one of {len(values)} losses to be finite, .* got {values[0]}"):
        least_first("losses", values)


def test_finite_names_the_array():
    numbers = {"mlp": np.ones(3), "count": np.arange(2), "attention": jnp.zeros((2, 2))}
    assert finite("scores", numbers) is numbers
    for bad in (NAN, INF):
        with pytest.raises(UndecidedError, match=f"expected finite scores, got {bad} in mlp"):
            finite("scores", numbers | {"mlp": np.array([1.0, bad])})
    with pytest.raises(UndecidedError, match="expected finite losses, got inf in 1"):
        finite("losses", [1.0, INF])
