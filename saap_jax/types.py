"""Names that the whole library shares: axes, structures and the trees that are indexed by them.

Axis glossary (logical axis, einsum letter):

| axis       | letter | meaning                                                       |
|------------|--------|---------------------------------------------------------------|
| `batch`    | b      | examples of one microbatch                                    |
| `seq`      | t (s)  | token positions (s where a second one is needed: the keys)    |
| `embed`    | d      | width of the residual stream                                  |
| `layers`   | l      | decoder layers; leading axis of a segment's parameters        |
| `kv_heads` | k      | attention units: one key/value head with its query heads      |
| `q_per_kv` | g      | query heads that read one key/value head                      |
| `head_dim` | h      | width of one head                                             |
| `mlp`      | f      | channels of the feed-forward block                            |
| `experts`  | e      | experts of a mixture: there they are the units of the MLP     |
| `channels` | c      | channels of one expert                                        |
| `vocab`    | v      | tokens of the vocabulary                                      |
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from jaxtyping import Array
else:
    Array = Any  # of any library: to ask for jax's imports jax, which configurations and reports do without

PRUNABLE_AXES: dict[str, str] = {"kv_heads": "attention", "mlp": "mlp", "experts": "mlp"}
"""Logical axis whose parameters within a layer are one coupled structure -> name of that structure.

A model has channels (`mlp`) or experts: a unit of the MLP is one of these."""

STRUCTURES: tuple[str, ...] = tuple(dict.fromkeys(PRUNABLE_AXES.values()))
"""Names of the structures, in the order that breaks ties everywhere."""

# `_units` binds to nothing: the structures have different numbers of units
Gates = dict[str, Float[Array, "... _layers _units"]]
"""Multiplier on each unit's activation: 1 keeps it, 0 removes it. A leading batch axis gives each example its own."""

LayerGates = dict[str, Float[Array, "... _units"]]
"""Gates as a scan over layers takes them: `[layers, *batch, units]`, and `[*batch, units]` inside it."""

Scores = dict[str, Float[Array | np.ndarray, "_layers _units"]]
"""Importance of each unit, larger = more important; NaN where a layer has no such unit."""

Keep = dict[str, Bool[np.ndarray, "_layers _units"]]
"""True where a unit stays; False where it is removed or where a layer has no such unit."""

Objective = Literal["loss", "sampled", "margin"]
"""What estimators differentiate; see `estimation.objectives`."""

Bos = Literal["auto", "always", "never"]
"""Whether windows of text begin with the tokenizer's beginning of text: where it puts one in front of every text."""

Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: nothing, all but the matrix products, or everything in a layer."""


AttentionPath = Literal["auto", "plain", "blocks"]
"""How attention of whole rows is computed: with all scores in memory (`plain`), with those of some queries at a time
(`blocks`), or as the rows' length suggests; see `llama.attention`."""


HELD_OUT = 4
"""Every fourth microbatch of calibration text is held out: it judges what was made from the others; then all count."""


class Limits(NamedTuple):
    """How far a structure may shrink, and to which widths, each of its copies alike."""

    min_keep: int = 1
    """Units that each copy keeps at least."""
    max_ratio: float = 1.0
    """Largest share of the units that may go."""
    multiple_of: int = 1
    """What the width is a multiple of, if any unit goes."""


class WindowLosses(NamedTuple):
    """Summed loss of each window or example (float64; of text in nats), and how many tokens it predicts."""

    sums: Float[np.ndarray, "windows"]
    counts: Int[np.ndarray, "windows"]

    @property
    def means(self) -> Float[np.ndarray, "windows"]:
        """Mean loss of each window."""
        return self.sums / self.counts

    @property
    def mean(self) -> float:
        """Mean loss over all tokens of all windows."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def perplexity(self) -> float:
        """exp(mean token loss over all windows)."""
        return float(np.exp(self.sums.sum() / self.counts.sum()))
