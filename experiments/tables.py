"""Tables that the experiments write: cells, and their place on the page of studies."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saap_jax.evaluation.differences import paired_difference

STUDIES = Path(__file__).parent.parent / "docs" / "studies.md"


def markers(name: str) -> tuple[str, str]:
    """Return the lines between which the tables of an experiment stand on a page.

    >>> markers("choices")
    ('<!-- choices: made by experiments/choices.py report -->', '<!-- /choices -->')
    """
    return f"<!-- {name}: made by experiments/{name}.py report -->", f"<!-- /{name} -->"


def write_block(name: str, lines: Sequence[str], page: Path = STUDIES) -> None:
    """Write the tables of an experiment between its markers on a page.

    Raises:
        SystemExit: the page does not have them.
    """
    begin, end = markers(name)
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page}: expected {begin} and {end}, found them not; add them where the tables belong")
    text = "\n".join(lines).strip("\n")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


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
