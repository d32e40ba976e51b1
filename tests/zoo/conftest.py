"""Libraries of others rely on jax's own promotion; what they warn of is theirs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def plain_jax():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
