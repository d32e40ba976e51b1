"""Structures of a model of ours that lie inside others: how they are asked for, and models of which they are units."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from saap_jax.config.search import SearchConfig
from saap_jax.llama import Llama
from saap_jax.llama.spec import Constants
from saap_jax.llama.ungroup import ungrouped
from saap_jax.llama.unmixed import unmixed
from saap_jax.types import EXPERT_CHANNELS, QUERY_HEADS, RESIDUAL, TIED, Keep, Limits, Nested

VIEWS: dict[str, Callable[[Llama], Llama]] = {QUERY_HEADS: ungrouped, EXPERT_CHANNELS: unmixed}
"""Structure of `TIED` -> what makes the model of the same outputs of which they are units."""


class SeenBy(NamedTuple):
    """From a keep-set of a model to one of the model whose units are those of a structure inside others."""

    name: str

    def __call__(self, keep: Keep) -> Keep:
        others = {other: kept for other, kept in keep.items() if other != self.name}
        return others | {TIED[self.name][0]: keep[self.name]}


def check_further(further: Collection[str], constants: Constants) -> None:
    """Raise ValueError for structures that a model of a family does not have."""
    if EXPERT_CHANNELS in further and not constants.traits.experts:
        raise ValueError(
            f"{EXPERT_CHANNELS}: expected a mixture of experts, got a {constants.family}, whose channels are units of "
            "mlp; leave it out of model.further, and search.expert_channels.share 0"
        )


def nested_of(search: SearchConfig, further: Collection[str], constants: Constants) -> dict[str, Nested]:
    """Return the structures that a model tells apart and that lie in others, in the order in which they go.

    Raises:
        ValueError: a share of the budget for structures that are not told apart, or that cannot go.
    """
    stream, heads, channels = search.residual, search.query_heads, search.expert_channels
    known = {
        RESIDUAL: Nested(None, stream.share, "search.residual", Limits(multiple_of=stream.multiple_of)),
        QUERY_HEADS: Nested("attention", heads.share, "search.query_heads", Limits(min_keep=heads.min_keep)),
        EXPERT_CHANNELS: Nested(
            "mlp",
            channels.share,
            "search.expert_channels",
            Limits(min_keep=channels.min_keep, multiple_of=channels.multiple_of),
        ),
    }
    for name, how in known.items():
        if how.share and name not in further:
            raise ValueError(
                f"{how.option}.share: expected a model that tells {name} apart, got one of "
                f"{' and '.join(('attention', 'mlp', *further))}; open it with further=({name!r},)"
            )
    if stream.share and constants.traits.post_norms:
        raise ValueError(
            f"search.residual.share: expected 0 for a {constants.family}, whose norms behind the sub-blocks average "
            f"over all channels that these write, got {stream.share:g}"
        )
    return {name: how for name, how in known.items() if name in further}
