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
| `routes`   | e      | experts of a router whose units are channels: see `unmixed`   |
| `vocab`    | v      | tokens of the vocabulary                                      |
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

PRUNABLE_AXES: dict[str, str] = {"kv_heads": "attention", "mlp": "mlp", "experts": "mlp"}
"""Logical axis whose parameters within a layer are one coupled structure -> name of that structure.

A model has channels (`mlp`) or experts: a unit of the MLP is one of these."""

STRUCTURES: tuple[str, ...] = tuple(dict.fromkeys(PRUNABLE_AXES.values()))
"""Names of the structures, in the order that breaks ties everywhere."""

QUERY_HEADS = "query_heads"
"""Key of the query heads, `[layers, heads]`, in gates and keep-sets that tell the query heads of a KV head apart.

Head k · q_per_kv + g of a layer is query head g of KV head k: the numbers of Hugging Face. Absent: all query heads of a
kept KV head stay.
"""

EXPERT_CHANNELS = "expert_channels"
"""Key of the channels inside experts, `[layers, channels]`, in gates and keep-sets that tell them apart.

Channel e · c + i of a layer is channel i of expert e, where each expert has c. Absent: all channels of a kept expert
stay. A gate of 0 leaves the expert in the router's choice, without what the channel adds."""

TIED: dict[str, tuple[str, str]] = {QUERY_HEADS: ("attention", "q_per_kv"), EXPERT_CHANNELS: ("mlp", "channels")}
"""Structures whose units lie inside of those of another, as many in each unit of a layer, one holder's after the
other's -> that structure, and the axis of parameters that they lie along, right behind that structure's own."""

RESIDUAL = "embed"
"""Key of the channels of the residual stream, one structure of the whole model, in gates and keep-sets: `[1, embed]`.

Absent: all of them stay. A gate multiplies its channel wherever the stream is written: by the embedding and by each
sub-block."""

# `_units` binds to nothing: the structures have different numbers of units
Gates = dict[str, Float[Array, "... _layers _units"]]
"""Multiplier on each unit's activation: 1 keeps it, 0 removes it. A leading batch axis gives each example its own.

An entry `QUERY_HEADS`, if there is one, multiplies the output of each query head beside the gate of its KV head, an
entry `EXPERT_CHANNELS` the activation of each channel of an expert; an entry `RESIDUAL` multiplies the channels of the
residual stream, `[*batch, 1, embed]`."""

LayerGates = dict[str, Float[Array, "... _units"]]
"""Gates as a scan over layers takes them: `[layers, *batch, units]`, and `[*batch, units]` inside it."""

Scores = dict[str, Float[Array | np.ndarray, "_layers _units"]]
"""Importance of each unit, larger = more important; NaN where a layer has no such unit."""

Keep = dict[str, Bool[np.ndarray, "_layers _units"]]
"""True where a unit stays; False where it is removed or where a layer has no such unit.

An entry of `TIED`, if there is one, says which of its units stay, such as query heads: of each kept KV head of a layer
the same number, one or more, and none of the others; an entry `RESIDUAL`, which channels of the stream stay."""

Objective = Literal["loss", "sampled", "margin"]
"""What estimators differentiate; see `estimation.objectives`."""

Bos = Literal["auto", "always", "never"]
"""Whether windows of text begin with the tokenizer's beginning of text: where it puts one in front of every text."""

Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: nothing, all but the matrix products, or everything in a layer."""


AttentionPath = Literal["auto", "plain", "blocks", "splash"]
"""How attention of whole rows is computed: with all scores in memory (`plain`), with those of some queries at a time
(`blocks`), with none (`splash`, on TPU), or as the rows' length and the device suggest; see `llama.attention`."""


class Limits(NamedTuple):
    """How far a structure may shrink, and to which widths, each of its copies alike."""

    min_keep: int = 1
    """Units that each copy keeps at least."""
    max_ratio: float = 1.0
    """Largest share of the units that may go."""
    multiple_of: int = 1
    """What the width is a multiple of, if any unit goes."""


_WORDS = {
    "attention": ("query heads", "a KV head", "KV heads"),
    "mlp": ("channels", "an expert", "experts"),
    None: ("channels of the residual stream", "the model", "models"),
}
"""`Nested.words` by the structure that holds the units."""


class Nested(NamedTuple):
    """A structure whose units are parts of the units of others. It goes first, by a share of the budget of its own."""

    inside: str | None
    """The structure of which each unit holds as many units of this one, which are tied: of all that stay in a layer
    the same number goes. None: a unit is a slice of all units of all other structures."""
    share: float
    """Share of what is removed that comes from it."""
    option: str
    """Configuration of the search that says so."""
    limits: Limits = Limits()
    """Of each unit that holds some; or of the whole model."""

    @property
    def words(self) -> tuple[str, str, str]:
        """What refusals call the units, what one of them lies inside of, and several of that."""
        return _WORDS[self.inside]


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
