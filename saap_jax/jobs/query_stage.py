"""Query heads first, then everything else: how a share of a budget comes from query heads whose KV heads stay.

    ungroup -> observe and score query heads -> search -> cut: a model with fewer query heads in some layers
    -> the usual search on that model, for what is left of the budget

The second search sees the smaller attention units as they now cost, so no parameter is counted twice, and it starts
from scores of the model without the query heads that went.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from saap_jax.config.method import FusionConfig, QueryHeadsConfig, SearchConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.data import Windows
from saap_jax.discovery import query_head_parameters
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_query_heads, existing_units, heads_of
from saap_jax.llama.ungroup import ungrouped
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.budget import SLACK
from saap_jax.selection.calibrate import calibrate, structure_parts
from saap_jax.selection.query_heads import check_target, search_query_heads
from saap_jax.selection.search import Selection, skipped_layers
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from saap_jax.types import QUERY_HEADS, Keep, Remat


class QueryStage(NamedTuple):
    """What the first search removed, and what is left to remove."""

    subject: LlamaSubject
    """The model without the query heads that went; its attention units and channels are those of the given one."""
    keep: Keep
    """Of the given model: all attention units and channels, and which query heads stay."""
    rest: float
    """Share of the prunable parameters of `subject` that is still to be removed."""


def remove_query_heads(
    subject: LlamaSubject,
    scenarios: Mapping[str, Windows],
    estimator: str,
    ratio: float,
    config: SearchConfig,
    options: QueryHeadsConfig,
    *,
    fusion: FusionConfig | None = None,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> QueryStage:
    """Remove query heads that make up `options.share` of what `ratio` asks for, KV heads and channels untouched.

    The query heads are scored as the attention units of `ungrouped(model)`, by what `estimator` scores attention with.

    Raises:
        ValueError: as `search_query_heads`.
    """
    model, whole = subject.model, subject.prunable
    target = math.ceil(ratio * whole * (1 - SLACK))
    due = math.ceil(options.share * target * (1 - SLACK))
    widths, each = model.spec.layers, query_head_parameters(model)
    check_target(widths, skipped_layers(config.skip_layers, len(widths)), each, due, options)
    fusion = fusion or FusionConfig()
    part = structure_parts(estimator, fusion)["attention"]
    calibrated = calibrate(
        subject.with_model(ungrouped(model)),
        scenarios,
        [part],
        fusion=fusion,
        stability=ALLOCATIONS[config.allocation].stability,
        batch_size=batch_size,
        remat=remat,
        track=track,
    )
    scores = calibrated.scores(part, config.scenario_reduction)["attention"]
    stability = calibrated.indicator(part, config.stability_over) if ALLOCATIONS[config.allocation].stability else None
    indicator = None if stability is None else stability["attention"]
    heads = search_query_heads(scores, widths, each, due, config, options, indicator)
    keep = existing_units(model.runs) | {QUERY_HEADS: heads}
    smaller = subject.with_model(cut(model, keep))
    return QueryStage(smaller, keep, max(target - (whole - smaller.prunable), 0) / smaller.prunable)


def together(subject: LlamaSubject, first: QueryStage, rest: Selection, ratio: float) -> Selection:
    """Return both searches as one, of the given subject: `first` of it, and `rest` of `first.subject`."""
    removed, widths = subject.prunable - first.subject.prunable + rest.removed, subject.model.spec.layers
    heads = first.keep[QUERY_HEADS] & heads_of(rest.keep["attention"], widths, first.keep[QUERY_HEADS].shape)
    return Selection(rest.keep | {QUERY_HEADS: heads}, ratio, removed / subject.prunable, removed)


def count_query_heads(model: Llama) -> int:
    """Count the query heads of all layers."""
    return int(existing_query_heads(model.runs).sum())
