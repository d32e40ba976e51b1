"""Stage 2c, query heads: which of them go while their KV head stays. Sees scores and costs, no model.

A layer of the model has one number of query heads for all its KV heads, so they go in *blocks*: one query head of each
KV head of a layer, the lowest score that is left in each. A block costs kv_heads · 2 · head_dim · embed parameters (and
kv_heads · head_dim where queries have a bias); key and value stay. Its key is the mean priority (score, or
score · e^(λ · ASI) with `adaptive`) of its query heads, and all blocks of all layers are one ranking, for `uniform`
too: a block is a large part of a layer, and the same share of every layer could not be met. `search` does the ranking,
with blocks as units.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from saap_jax.config.method import PerStructure, QueryHeadsConfig, SearchConfig
from saap_jax.llama.spec import LayerWidths
from saap_jax.selection.search import priorities, search, skipped_layers


def search_query_heads(
    scores: Float[Array | np.ndarray, "layers heads"],
    widths: Sequence[LayerWidths],
    parameters: int,
    target: int,
    config: SearchConfig,
    options: QueryHeadsConfig,
    stability: Float[Array | np.ndarray, "layers heads"] | None = None,
) -> Bool[np.ndarray, "layers heads"]:
    """Return which query heads stay so that at least `target` parameters go, by less than one block more.

    Args:
        scores: importance of each query head, in the order of `QUERY_HEADS`; not read where a layer has no such head.
        widths: sizes of each layer.
        parameters: of one query head, in query (with its bias) and output.
        target: parameters to remove.
        config: `skip_layers`, `normalize`, `solver`; `stability_weight` with `adaptive`.
        options: `min_keep`.
        stability: the indicator ASI of each query head; read by `adaptive` with a `stability_weight`.

    Raises:
        ValueError: no KV head can lose a query head, the target cannot be met, a score is not finite, or the scores
            do not tell the query heads of a KV head apart.
    """
    skipped = skipped_layers(config.skip_layers, len(widths))
    check_target(widths, skipped, parameters, target, options)
    ranked = _ranked(np.asarray(scores), widths, parameters, config, stability)
    groups = [ranked[layer, : w.kv_heads * w.q_per_kv].reshape(-1, w.q_per_kv) for layer, w in enumerate(widths)]
    if all((group == group[:, :1]).all() for group in groups):
        raise ValueError(
            "query_heads.share: expected scores that tell the query heads of a KV head apart, got equal ones; "
            "use an estimator of units, such as gate_fisher"
        )
    means = np.full((len(widths), max(w.q_per_kv for w in widths)), np.nan)
    for layer, group in enumerate(groups):
        if len(group):
            means[layer, : group.shape[1]] = np.sort(group, axis=1).mean(axis=0)
    blocks = SearchConfig(
        allocation="global",
        rank_by="score",
        min_keep=PerStructure(attention=options.min_keep, mlp=0),
        skip_layers=config.skip_layers,
        solver=config.solver,
    )
    cost = np.array([w.kv_heads * parameters for w in widths], np.int64)
    existing = _attention_only(np.isfinite(means))
    costs = {"attention": cost, "mlp": np.zeros_like(cost)}
    whole = int((existing["attention"].sum(axis=1) * cost).sum())
    left = search(_attention_only(means), costs, existing, target / whole, blocks).keep["attention"].sum(axis=1)
    return _lowest_removed(groups, left, ranked.shape)


def check_target(
    widths: Sequence[LayerWidths],
    skipped: Bool[np.ndarray, "layers"],
    parameters: int,
    target: int,
    options: QueryHeadsConfig,
) -> None:
    """Raise ValueError where query heads cannot make up `target` parameters."""
    if all(w.q_per_kv == 1 for w in widths if w.kv_heads):
        raise ValueError(
            "query_heads.share: expected KV heads with two query heads or more, got a model with one each: there, "
            "attention units are query heads; leave it 0"
        )
    free = [max(w.q_per_kv - options.min_keep, 0) * w.kv_heads for w in widths]
    most = int(np.asarray(free)[~skipped].sum()) * parameters
    if target > most:
        raise ValueError(
            f"query_heads.share: expected at most {most:,} parameters from query heads, as query_heads.min_keep and "
            f"search.skip_layers allow, got {target:,}; lower it or the ratio, or relax those"
        )


def _ranked(
    scores: Float[np.ndarray, "layers heads"],
    widths: Sequence[LayerWidths],
    parameters: int,
    config: SearchConfig,
    stability: Float[Array | np.ndarray, "layers heads"] | None,
) -> Float[np.ndarray, "layers heads"]:
    """Return what query heads are ranked by, NaN where there is none."""
    heads = np.array([w.kv_heads * w.q_per_kv for w in widths])
    existing = np.arange(scores.shape[1]) < heads[:, None]
    cost = np.full(len(widths), parameters, np.int64)
    ranked = priorities(
        _attention_only(scores),
        {"attention": cost, "mlp": cost},
        _attention_only(existing),
        config,
        None if stability is None else _attention_only(np.asarray(stability)),
        None,
    )
    return np.asarray(ranked["attention"])


def _attention_only(values: np.ndarray) -> dict[str, Any]:
    """Return a tree of both structures for the search, without channels."""
    return {"attention": values, "mlp": np.zeros((len(values), 0), values.dtype)}


def _lowest_removed(
    groups: Sequence[Float[np.ndarray, "_kv_heads _q_per_kv"]], left: np.ndarray, shape: tuple[int, ...]
) -> Bool[np.ndarray, "layers heads"]:
    """Keep the `left[layer]` highest query heads of each KV head; of equals, the lower number goes first."""
    keep = np.zeros(shape, bool)
    for layer, group in enumerate(groups):
        kept = np.ones(group.shape, bool)
        if len(group):
            gone = np.argsort(group, axis=1, kind="stable")[:, : group.shape[1] - left[layer]]
            np.put_along_axis(kept, gone, False, axis=1)
        keep[layer, : group.size] = kept.ravel()
    return keep
