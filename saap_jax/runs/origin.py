"""How a model came about: `saap.json` in its directory, to which each command that makes a model of it adds a step.

Model cards are made of it, see `report.card`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Required, TypedDict

import numpy as np

from saap_jax.errors import reading
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.scales import scale_of
from saap_jax.records import Measured, WrittenText
from saap_jax.runtime.files import decoded

FILE = "saap.json"

SCHEMA = 1
"""Version of the file, stored as `schema`."""

_SAME = 1e-3
"""How far a figure may be, relative to it, from that of the mean of its losses."""

Loader = Literal["transformers", "remote_code", "saap_jax", "traced", "maxtext"]
"""What loads a model: transformers, it with the code beside the model, we alone, we beside a factory, MaxText."""


class Base(TypedDict, total=False):
    """The model that the first step was given."""

    name: Required[str]
    """What the user calls it."""
    repository: str
    """Of the hub; absent: unknown."""
    license: str
    """As the hub calls it; absent: unknown."""
    license_name: str
    license_link: str


class Measurement(TypedDict, total=False):
    """What a model measures on a text."""

    metric: Required[str]
    model: Required[str]
    """`dense`, `pruned` or `recovered`."""
    value: Required[float]
    low: float
    """The lower end of the 95 % interval; absent: there is none."""
    high: float
    windows: int
    """That the interval is of."""


class OriginStep(TypedDict, total=False):
    """A command that made a model of another one."""

    kind: Required[Literal["prune", "compare", "recover", "export"]]
    command: Required[str]
    model: Required[str]
    """What it was given."""
    parameters: Required[tuple[int, int]]
    """Before and after."""
    ratio: tuple[float, float]
    """Of the prunable parameters: asked, and removed."""
    facts: Required[dict[str, str]]
    """What was done, in words."""
    figures: list[Measurement]
    written: list[WrittenText]
    """What both models write after the same prompts."""
    versions: dict[str, str | None]


class Origin(TypedDict):
    """`saap.json`."""

    schema: int
    base: Base
    loader: Loader
    steps: list[OriginStep]


def read_origin(directory: Path) -> Origin | None:
    """Read how the model of a directory came about; None where it does not say.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    with reading(path, f"how the model came about (schema {SCHEMA}); remove the file to go on without it"):
        content = decoded(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!s:.60}")
        return Origin(schema=SCHEMA, base=content["base"], loader=content["loader"], steps=content["steps"])


def figures_of(models: Mapping[str, Measured], articles: Mapping[str, Sequence[int]]) -> list[Measurement]:
    """List the finite figures that were measured of models, by what they are called, with their 95 % intervals.

    The interval is that of `evidence`, of the windows whose losses are on record; there is none of fewer than `FEWEST`,
    nor where the figure is not that of these windows, as in a race.

    Args:
        articles: the number of the article of each window by metric, see `by_article`; nothing where it is not known.
    """
    figures: list[Measurement] = []
    for model, measured in models.items():
        for metric, value in measured.get("ppl", {}).items():
            if not math.isfinite(value):
                continue
            figure: Measurement = {"metric": metric, "model": model, "value": float(value)}
            figures.append(figure)
            scale = scale_of(metric)
            losses = np.asarray(measured.get("losses", {}).get(metric, ()), np.float64)
            if losses.size and math.isclose(scale.value(float(losses.mean())), value, rel_tol=_SAME):
                figure["windows"] = losses.size
                _, low, high, *_ = paired_difference(
                    losses[None], np.zeros((1, losses.size)), articles=articles.get(metric, ())
                )
                if not math.isnan(low):
                    figure.update(low=scale.value(low), high=scale.value(high))
    return figures
