"""What pruning cost: perplexity of the unpruned and the pruned model on the same windows, and how fast both are."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.prune import PruneConfig
from saap_jax.data import check_disjoint, parse_scenario
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.runs.origin import figures_of
from saap_jax.runs.records import Measured
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.words import signed
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import WindowLosses

DENSE, PRUNED = "dense", "pruned"
REPEATS = 3
"""Forward passes of each model that are timed."""


class Judged(NamedTuple):
    """Both models on the same text."""

    models: dict[str, Measured]
    """Perplexity and losses by metric, of `dense` and `pruned`."""
    seconds: tuple[float, float]
    """Of a forward pass, before and after."""
    tokens: int
    """Of that pass."""


def texts_of(config: PruneConfig, subject: Subject, calibrated_on: tuple[str, ...]) -> dict[str, Examples]:
    """Return what both models are judged on by metric; nothing where that is not asked for, or of a traced model.

    Raises:
        ValueError: a text that the calibration text is part of.
    """
    if not config.judge or config.model.traced:
        return {}
    sources = [parse_scenario(text).source for text in calibrated_on]
    check_disjoint(sources, [config.evaluation.in_domain, config.evaluation.out_of_domain])
    return subject.texts(config.evaluation)


def judge(subject: Subject, cut: Any, texts: Mapping[str, Examples], rows: int, track: Track = quiet) -> Judged | None:
    """Measure the unpruned and the pruned model on texts, `rows` windows at once; None where there is no text."""
    if not texts:
        return None
    whole = subject.whole()
    with step(track, "judge the unpruned and the pruned model"):
        models = {
            name: _measured({metric: model.losses(text, rows) for metric, text in texts.items()})
            for name, model in ((DENSE, whole), (PRUNED, cut))
        }
        text = next(iter(texts.values()))
        before, after = subject.seconds([whole, cut], text, rows, repeats=REPEATS)
    return Judged(models, (before, after), math.prod(subject.shape(text, rows)))


def _measured(losses: Mapping[str, WindowLosses]) -> Measured:
    return {
        "ppl": {name: scale_of(name).value(each.mean) for name, each in losses.items()},
        "losses": {name: each.means.tolist() for name, each in losses.items()},
    }


def judged_rows(judged: Judged) -> list[tuple[str, str]]:
    """Return what was measured as rows of text: each perplexity with its interval, and the change with its own."""
    found = []
    figures = {(each["model"], each["metric"]): each for each in figures_of(judged.models)}
    for metric in judged.models[DENSE]["ppl"]:
        said = []
        for name in (DENSE, PRUNED):
            if (figure := figures.get((name, metric))) is None:
                said.append("not finite")
                continue
            scale = scale_of(metric)
            ends = " to ".join(format_figure(figure[end], scale) for end in ("low", "high") if end in figure)
            said.append(format_figure(figure["value"], scale) + f" ({ends})" * bool(ends))
        found.append((metric, f"{said[0]} -> {said[1]}"))
        losses = (np.array([judged.models[name]["losses"][metric]]) for name in (PRUNED, DENSE))
        value, low, high = paired_difference(*losses, scale=scale_of(metric)).percent
        if not math.isnan(low):
            found.append(("", f"{signed(value, 1)} % ({signed(low, 1)} to {signed(high, 1)}, 95 % interval)"))
    before, after = judged.seconds
    speeds = "{:,.0f} -> {:,.0f}".format(*(judged.tokens / each for each in judged.seconds))
    found.append(
        (f"tokens a second, forward pass of {judged.tokens:,}", f"{speeds} ({signed(100 * (before / after - 1), 1)}%)")
    )
    return found
