"""What pruning cost: perplexity and speed of both models on the same windows, and what they write after some words."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.jobs import PruneConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.data.sources import check_disjoint
from saap_jax.data.windows import parse_scenario
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama
from saap_jax.records import Measured, WrittenText
from saap_jax.report.formats import format_times
from saap_jax.runs.origin import figures_of
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.words import signed
from saap_jax.steps.base import State
from saap_jax.subjects.base import Examples, Subject, articles_of, rows_of, tokens_at_once
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.types import WindowLosses
from saap_jax.wings import wing

DENSE = "dense"
PRUNED = "pruned"
TURNS = 3
"""The fewest turns that both models take; one warms up, the others are timed."""


class Judged(NamedTuple):
    """Both models on the same text."""

    models: dict[str, Measured]
    """Perplexity and losses by metric, of `dense` and `pruned`."""
    seconds: tuple[list[float], list[float]]
    """Of forward passes in the same rounds, before and after."""
    tokens: int
    """Of that pass."""
    articles: Mapping[str, list[int]]
    """The number of the article of each window, by metric."""


def texts_of(config: PruneConfig, subject: Subject, calibrated_on: tuple[str, ...]) -> dict[str, Examples]:
    """Choose the examples that both models are judged on, by metric; none where not asked for.

    Raises:
        ValueError: a text that the calibration text is part of.
    """
    if not config.judge:
        return {}
    if not config.model.traced:
        sources = [parse_scenario(text).source for text in calibrated_on]
        check_disjoint(sources, [config.evaluation.in_domain, config.evaluation.out_of_domain])
    return subject.texts(config.evaluation)


def judge(
    config: EvaluationConfig, subject: Subject, cut: Any, texts: Mapping[str, Examples], track: Track = quiet
) -> Judged | None:
    """Measure the unpruned and the pruned model on the texts of a configuration; None where there is none, and of a
    traced model, whose losses are checked instead."""
    if not texts or not isinstance(subject, LlamaSubject):
        return None
    whole = subject.cut(subject.existing)
    rows = config.batch_size
    with step(track, "judge the unpruned and the pruned model"):
        (first, text), *others = texts.items()
        both, seconds = in_turns(subject, whole, cut, text, rows)
        models: dict[str, Measured] = {}
        for name, model, judged in zip((DENSE, PRUNED), (whole, cut), both, strict=True):
            losses = {first: judged} | {metric: model.losses(text, rows) for metric, text in others}
            models[name] = {
                "ppl": {metric: scale_of(metric).value(each.mean) for metric, each in losses.items()},
                "losses": {metric: each.means.tolist() for metric, each in losses.items()},
            }
    return Judged(models, seconds, tokens_at_once(subject, text, rows), articles_of(subject, config))


def in_turns(
    subject: Subject, whole: Any, cut: Any, text: Examples, rows: int, most: int | None = None
) -> tuple[tuple[WindowLosses, WindowLosses], tuple[list[float], list[float]]]:
    """Evaluate the unpruned and the cut model in turns, `rows` windows at once; take the seconds of turns of both.

    The first turn, which compiles, is not timed, nor is one of fewer windows, which is another program; where there are
    fewer than three others, windows come again.

    Args:
        most: turns of the unpruned model; None: all.
    """
    count = subject.size(text).rows
    parts = [rows_of(text, slice(first, first + rows)) for first in range(0, count, rows)]
    timed = max(alike := max(1, count // rows), TURNS)
    found: list[list[WindowLosses]] = [[], []]
    taken: list[list[float]] = [[], []]
    for turn, part in enumerate([*parts[:alike], *parts[:1] * (timed - alike), *parts[alike:]]):
        for place, model in enumerate((whole, cut)):
            if place or most is None or turn < most:
                start = time.perf_counter()
                losses = model.losses(part, rows)
                if 0 < turn < (most or timed):
                    taken[place] += [time.perf_counter() - start]
                found[place] += [] if alike <= turn < timed else [losses]
    dense, pruned = (WindowLosses(*map(np.concatenate, zip(*each, strict=True))) for each in found)
    before, after = taken
    return (dense, pruned), (before, after)


def judged_rows(judged: Judged) -> list[tuple[str, str]]:
    """Write what was measured as rows: each perplexity with its interval, and the change with its own."""
    found = []
    figures = {(each["model"], each["metric"]): each for each in figures_of(judged.models, judged.articles)}
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
        articles = judged.articles.get(metric, ())
        value, low, high = paired_difference(*losses, scale=scale_of(metric), articles=articles).percent
        if not math.isnan(low):
            found.append(("", f"{signed(value, 1)} % ({signed(low, 1)} to {signed(high, 1)} %, 95 % interval)"))
    before, after, change = format_times(*judged.seconds)
    return [*found, (f"forward pass of {judged.tokens:,} tokens, ms", f"{before} -> {after}, {change}")]


# --- what models write, for people to read beside the figures ---------------------------------------

PROMPTS = ("The capital of France is", "Once upon a time, a little dog", "To bake bread, first")

NEW_TOKENS = 64
"""Of `saap prune` and `saap recover`; `saap compare` has an option."""


def written_by(subject: Subject, cut: Any, state: State | None, most: int, track: Track) -> list[WrittenText]:
    """Let the unpruned and the cut model write; nothing of a traced model, or on several devices.

    Where its state is at hand, the pruned one is masked instead, so that it has the programs of the other; but from
    experts that are only masked, tokens would not be routed to others.
    """
    if not isinstance(subject, LlamaSubject) or subject.layout or not most:
        return []
    if state and isinstance(state.subject, LlamaSubject) and not subject.model.constants.traits.experts:
        cut = state.subject.folded({name: kept.astype(np.float64) for name, kept in state.keep.items()})
    return written({DENSE: subject.model, PRUNED: cut.model}, subject.words, most, track)


def written(models: Mapping[str, Llama], tokenizer: Tokenizer, most: int, track: Track) -> list[WrittenText]:
    """Continue each of `PROMPTS` by each model, the likeliest token each time.

    Args:
        models: by what they are called.
        most: new tokens; fewer where the models have no more positions. Nothing is written where they have none, or
            where the tokenizer knows no token of a prompt.
    """
    lengths = [len(tokenizer.encode(prompt, verbose=False)) for prompt in PROMPTS]
    most = min([most, *(model.constants.positions - max(lengths) for model in models.values())])
    if most < 1 or not models or not all(lengths):
        return []
    found: list[WrittenText] = [{"prompt": prompt, "texts": dict.fromkeys(models, "")} for prompt in PROMPTS]
    with step(track, "let the models write"):
        for name, model in models.items():
            for row, piece in wing("writer").stream_texts(model, tokenizer, PROMPTS, max_new_tokens=most):
                found[row]["texts"][name] += piece
    return found
