"""Cells of the tables that the experiments write: a mean with its spread, a difference with its interval."""

from collections.abc import Sequence

import numpy as np

from saap_jax.evaluation.differences import paired_difference


def with_spread(values: Sequence[float] | np.ndarray) -> str:
    """Return the mean over seeds ± their sample standard deviation; of one seed, its value.

    >>> with_spread([1.0, 2.0, 3.0]), with_spread([1.0])
    ('2.0 ± 1.0', '1.0')
    """
    each = np.asarray(values)
    return f"{each.mean():.1f}" + (f" ± {each.std(ddof=1):.1f}" if len(each) > 1 else "")


def perplexity(losses: Sequence[Sequence[float]] | np.ndarray) -> str:
    """Return the perplexity over seeds of losses `[seeds, windows]`."""
    return with_spread(np.exp(np.mean(losses, axis=1)))


def in_percent(losses: np.ndarray, base: np.ndarray) -> str:
    """Return the difference of perplexity from a base in per cent, with the 95 % interval of `saap ab`.

    Both are `[seeds, windows]`.
    """
    value, low, high = paired_difference(losses, base).percent
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
