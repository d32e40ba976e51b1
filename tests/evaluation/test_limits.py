"""Limits: what is just within holds, what is just beyond breaks, and what is not finite never holds."""

import math

import numpy as np
import pytest

from saap_jax.config.checks import Bound
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.limits import check_bytes, check_difference, check_seconds


def shifted(percent: float, windows: int = 12):
    b = np.random.default_rng(0).normal(4, 1, (1, windows))
    return paired_difference(b + math.log1p(percent / 100), b, resamples=200)


@pytest.mark.parametrize(
    ("percent", "limit", "passed"), [(2.0, 1.0, False), (2.0, 2.0, True), (2.0, 1.999, False), (-3.0, 0.0, True)]
)
def test_perplexity(percent, limit, passed):
    check = check_difference("ppl@16 a", shifted(percent), limit)
    assert check.passed == passed
    shown = f"{percent:+.1f}".replace("-", "−")
    assert check.measured == f"{shown} % ({shown} to {shown} %)"
    assert check.limit == f"+{limit:g} %"


def test_identical_models_keep_a_limit_of_0():
    assert check_difference("m", shifted(0.0), 0.0)[3:] == ("0 %", True)
    assert check_difference("m", shifted(1e-4), 0.0)[3:] == ("0 % up to rounding", True)
    assert not check_difference("m", shifted(0.01), 0.0).passed


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["model", "baseline", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_breaks_every_limit(bad, which):
    a, b = np.zeros((2, 1, 4))
    for place in which:
        (a, b)[place][0, 1] = bad
    check = check_difference("m", paired_difference(a, b, resamples=10), 1e9)
    assert not check.passed
    assert "not finite" in check.measured


def test_bytes_and_seconds():
    assert check_bytes("max_size", "weights", Bound(80.0, "percent"), 80, 100).passed
    assert not check_bytes("max_size", "weights", Bound(80.0, "percent"), 81, 100).passed
    assert check_bytes("max_size", "weights", Bound(300.0 * 2**20, "amount"), 300 * 2**20, 1).passed
    check = check_bytes("max_size", "weights", Bound(300.0 * 2**20, "amount"), 300 * 2**20 + 1, 600 * 2**20)
    assert not check.passed
    assert (check.limit, check.measured) == ("300.0 MiB", "300.0 MiB, 50.0 % of 600.0 MiB")
    assert check_seconds(105.0, 1.05, 1.0).passed
    check = check_seconds(105.0, 1.06, 1.0)
    assert not check.passed
    assert check.measured == "1,060.0 ms, 106.0 % of 1,000.0 ms"
