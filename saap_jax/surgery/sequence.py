"""Choosing units from the first layer to the last, each on the activations of the model as pruned so far.

How many units of a layer and structure stay is known; which, is chosen behind the layers that have been pruned and
compensated already, by a formula on the second moments of what enters the output matrix there, G = Σ â âᵀ:

    wanda       Σ_c ‖W_c‖₁ · √G_cc over the coordinates c of a unit (arXiv:2306.11695; FASP, arXiv:2501.09412)
    obs         the optimal brain surgeon's greedy order (SlimGPT, arXiv:2412.18110), see `estimation.reconstruction`
    obs_swaps   the same, then swaps while the error of the output falls (OSSCAR, arXiv:2403.12983)
    leverage    Σ_c [G (G + λ I)⁻¹]_cc (MoDeGPT, arXiv:2408.09632)

These methods prune so; scores from one pass over the unpruned model do not see what the layers before have lost.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Batch
from saap_jax.estimation.reconstruction import greedy_costs, leverages, swapped
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units
from saap_jax.runtime.decisions import finite
from saap_jax.surgery.compensation import Compensated, SubBlock, corrected_in_turn, gathered
from saap_jax.surgery.corrections import Normal, Walk
from saap_jax.surgery.cut import check_keep
from saap_jax.types import Keep

DAMPING = 0.01
BLOCK = 16
"""Of the moments, relative to the mean of their diagonal, and coordinates that the surgeon takes at once."""


def _wanda(weight: Array, moment: Array, ridge: Array, kept: Array) -> Float[Array, "units"]:
    size = jnp.sqrt(jnp.diag(moment)).reshape(weight.shape[:2])
    return jnp.sum(jnp.sum(jnp.abs(weight), axis=2) * size, axis=1)


def _swaps(weight: Array, moment: Array, ridge: Array, kept: Array) -> Float[Array, "units"]:
    order = jnp.argsort(-greedy_costs(weight, moment, ridge, block=BLOCK), stable=True)
    start = jnp.zeros(len(weight), bool).at[order].set(jnp.arange(len(weight), dtype=kept.dtype) < kept)
    return swapped(weight, moment, ridge, start).astype(weight.dtype)


RULES: dict[str, Callable[[Array, Array, Array, Array], Float[Array, "units"]]] = {
    "wanda": _wanda,
    "obs": lambda weight, moment, ridge, kept: greedy_costs(weight, moment, ridge, block=BLOCK),
    "obs_swaps": _swaps,
    "leverage": lambda weight, moment, ridge, kept: leverages(weight, moment, ridge),
}
"""Name -> (matrix [units, coordinates, embed], mean of â âᵀ, λ, how many units stay) -> scores of units; larger = more
important."""


def chosen_in_sequence(
    model: Llama,
    keep: Keep,
    batches: Sequence[Batch],
    rule: str,
    walk: Walk = Walk(),
    *,
    dense: Llama | None = None,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> tuple[Keep, Compensated | None]:
    """Choose as many units of each layer and structure, those of the highest scores where they are.

    Costs about as much as compensation of one keep-set, which is done on the way: the model that came of it is given
    too, None where `walk` has no repair.

    Args:
        keep: `[layers, units]` of attention and MLP; how many are kept of each layer.
        batches: (tokens, mask) pairs of one shape, padding on the right.
        rule: a name of `RULES`.
        walk: how each sub-block is corrected before the next is looked at.
        dense: the unpruned model, where the model was repaired before.

    Raises:
        ValueError: a keep-set of another model, or experts.
    """
    check_keep(keep, model.segments)
    if model.constants.traits.experts:
        raise ValueError(
            "layerwise: expected a model without experts, whose output matrices are never corrected, got a "
            f"{model.constants.family}"
        )
    existing = existing_units(model.segments)
    new = {name: units.copy() for name, units in keep.items()}

    def choose(at: SubBlock, sums: Normal) -> Bool[np.ndarray, "_"]:
        units = int(existing[at.structure][at.layer].sum())
        row = new[at.structure][at.layer]
        kept = int(row.sum())
        scores = np.asarray(_scores(at.old.weight, sums.gram, sums.weight, jnp.int32(kept), rule=rule, units=units))
        # Units that an earlier repair took out write nothing, whatever their moments: they come last.
        writes = np.asarray(at.old.weight != 0).reshape(units, -1).any(axis=1)
        finite(f"scores of {at.structure} in layer {at.layer}, to choose by", scores[writes])
        first = np.argsort(-np.where(writes, scores, -np.inf), kind="stable")[:kept]
        row[:] = np.isin(np.arange(len(row)), first)
        # One mark for each coordinate of a unit, as rows of the output matrix are counted.
        return np.repeat(row[:units], len(at.kept) // units)

    turns = corrected_in_turn(model, keep, batches, walk, dense=dense, choose=choose, progress=progress)
    if walk.repair is not None:
        return new, gathered(model, turns, walk.repair)
    # `choose` writes into `new` while the walk goes on; what it yields is not needed.
    for _ in turns:
        pass
    return new, None


@functools.partial(jax.jit, static_argnames=("rule", "units"))
def _scores(
    weight: Float[Array, "coordinates embed"],
    gram: Float[Array, "coordinates coordinates"],
    total: Float[Array, ""],
    kept: Int[Array, ""],
    *,
    rule: str,
    units: int,
) -> Float[Array, "_"]:
    """Score the units of a sub-block by a rule."""
    moment = gram / total
    parts = weight.astype(gram.dtype).reshape(units, len(weight) // units, weight.shape[1])
    with jax.default_matmul_precision("highest"):
        return RULES[rule](parts, moment, DAMPING * jnp.mean(jnp.diag(moment)), kept)
