"""Scores that judge by passes of their own over the examples, with units masked: no statistic and no gradient.

They stand among estimators, alone, in a fusion, or for one structure (`block_ablation/wanda`), and cost far more than
the one pass: `ablation` a part of a forward pass a unit, `block_ablation` one a sub-block, `perturbation` one a mask.
With `examples` each looks at the first so many of the examples only, in proportion cheaper.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import numpy as np

from saap_jax.checks import Seed, Share, at_least, check_positive
from saap_jax.estimation.ablation import Unit, changes_to_scores
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.registry import call_factory
from saap_jax.runtime.decisions import finite
from saap_jax.runtime.progress import Passes
from saap_jax.subjects.base import Examples, Subject, rows_of, run_losses
from saap_jax.syntax import read_call
from saap_jax.types import STRUCTURES, Keep, Scores

Examined = Annotated[int | None, at_least(1)]
"""How many of the examples are looked at, the first ones; None: all."""

Oracle = Callable[[Subject, Examples, Keep | None, Passes], Scores]
"""(subject, examples, units that are still there or None for all, how) -> `[groups, units]` a structure, NaN where no
unit is; larger = more important."""


def ablation(*, examples: Examined = None) -> Oracle:
    """Score a unit by the exact change of the loss when it goes by itself, see `estimation.ablation`."""
    few = _first(examples)

    def score(subject: Subject, examples: Examples, keep: Keep | None, passes: Passes) -> Scores:
        if keep is not None and any((units & ~keep[name]).any() for name, units in subject.existing.items()):
            raise ValueError("estimator 'ablation': is of the whole model, expected no rounds behind it")
        units: list[Unit] = []
        for name, each in subject.existing.items():
            units += [Unit(name, *map(int, place)) for place in np.argwhere(each)]
        changes = subject.ablate(
            few(subject, examples),
            units,
            batch_size=passes.batch_size,
            progress=passes.progress("remove single units"),
        )
        return changes_to_scores(changes, subject.existing)

    return score


def block_ablation(*, granularity: Literal["sub_block", "layer"] = "sub_block", examples: Examined = None) -> Oracle:
    """Score every unit by the change of the mean loss when its sub-block goes as a whole, or its layer.

    With `within(depth=True)` and rounds of less than a block's share, that is greedy removal of blocks: BlockPruner
    (arXiv:2406.10594) of sub-blocks, SLEB (arXiv:2402.09025) of layers.
    """
    few = _first(examples)

    def score(subject: Subject, examples: Examples, keep: Keep | None, passes: Passes) -> Scores:
        present = _present(subject, keep, "block_ablation")
        blocks = list(_blocks(present, granularity))
        keeps = []
        for block in blocks:
            keeps.append(present | {name: present[name] & ~units for name, units in block.items()})
        losses = mean_losses(subject, few(subject, examples), [present, *keeps], passes, "remove single blocks")
        base, *means = finite("losses, of the model and without a block, to score by", losses)
        scores: Scores = {name: np.full(present[name].shape, np.nan) for name in STRUCTURES}
        for block, mean in zip(blocks, means, strict=True):
            for name, units in block.items():
                scores[name] = np.where(units, mean - base, scores[name])
        return scores

    return score


def _blocks(present: Keep, granularity: Literal["sub_block", "layer"]) -> Iterator[Keep]:
    """Yield the units of each sub-block, or layer, that has some: masks of the structures that it is of."""
    layers = np.arange(len(present[STRUCTURES[0]]))[:, None]
    for layer in range(len(layers)):
        units = {}
        for name in STRUCTURES:
            if present[name][layer].any():
                units[name] = present[name] & (layers == layer)
        if granularity == "layer" and units:
            yield units
        elif granularity == "sub_block":
            for name, each in units.items():
                yield {name: each}


def perturbation(
    *,
    masks: Annotated[int, at_least(2)] = 256,
    share: Share = 0.1,
    ridge: Annotated[float, check_positive] = 1.0,
    seed: Seed = 0,
    examples: Examined = None,
) -> Oracle:
    """Score a unit by ridge regression of the mean loss on random masks, each without `share` of every layer's units.

    With X the masks (1 where a unit is gone), centred, and y the losses, β = Xᵀ (X Xᵀ + r t I)⁻¹ y, r = `ridge` and t
    the mean of the diagonal of X Xᵀ. There are far fewer masks than units, so β is a shrunken guess of each effect.

    Source: Bonsai (arXiv:2402.05406) section 3. Deviations: masks are drawn evenly, where Bonsai draws them by a prior
    from activations, and in one round unless `rounds` stand behind it.
    """
    few = _first(examples)

    def score(subject: Subject, examples: Examples, keep: Keep | None, passes: Passes) -> Scores:
        present = _present(subject, keep, "perturbation")
        random = np.random.default_rng(seed)
        keeps = [_masked(present, share, random) for _ in range(masks)]
        found = mean_losses(subject, few(subject, examples), keeps, passes, "mask units at random")
        losses = np.array(finite("losses under masks, to score by", found))

        def row(keep: Keep) -> np.ndarray:
            return np.concatenate([keep[name][present[name]] for name in present])

        # X, one row a mask: 1 where a unit is gone.
        gone = ~np.stack([row(each) for each in keeps])
        effect = _ridge(gone.astype(np.float64), losses, ridge)
        # Lay the effects, all structures in one row, out as `[layers, units]` again.
        scores: Scores = {name: np.full(units.shape, np.nan) for name, units in present.items()}
        ends = np.cumsum([present[name].sum() for name in scores])[:-1]
        for (name, values), part in zip(scores.items(), np.split(effect, ends), strict=True):
            values[present[name]] = part
        return scores

    return score


ORACLES: dict[str, Callable[..., Oracle]] = {
    "ablation": ablation,
    "block_ablation": block_ablation,
    "perturbation": perturbation,
}


def is_oracle(text: str) -> bool:
    """Say whether a name, with hyper-parameters in brackets if any, is that of an oracle.

    >>> is_oracle("block_ablation(granularity='layer')"), is_oracle("wanda")
    (True, False)
    """
    call = read_call(text)
    return call is not None and not call.file and call.name in ORACLES


def make_oracle(text: str) -> Oracle:
    """Make an oracle from its name, with hyper-parameters in brackets if any.

    Raises:
        ValueError: an unknown hyper-parameter, or a value that is none of it.
    """
    return call_factory(text, ORACLES)


def constant(scores: Scores, existing: Keep) -> Estimator:
    """Make an estimator of scores known already: 0 of units without a score, NaN where there is none."""
    filled = {
        name: np.where(units, np.nan_to_num(np.asarray(scores.get(name, 0), np.float64)), np.nan)
        for name, units in existing.items()
    }
    return Estimator(frozenset(), lambda statistics, weights: dict(filled))


def _first(count: int | None) -> Callable[[Subject, Examples], Examples]:
    """Make a function that takes the first so many of the examples, or all where there are fewer or None is said."""
    return lambda subject, examples: rows_of(examples, slice(count))


def _present(subject: Subject, keep: Keep | None, name: str) -> Keep:
    if not set(STRUCTURES) <= subject.existing.keys():
        raise ValueError(f"estimator {name!r}: is of attention and MLP of layers, which a traced model does not have")
    if keep is None:
        return dict(subject.existing)
    return {each: keep[each] for each in subject.existing}


def _masked(present: Keep, share: float, random: np.random.Generator) -> Keep:
    """Return a keep-set without a random share of the units of each layer, one at least where there are two."""
    keep = {name: units.copy() for name, units in present.items()}
    for row in itertools.chain.from_iterable(keep.values()):
        there = np.flatnonzero(row)
        # One unit at least goes, so that each layer has an effect, and one at least stays.
        count = min(max(round(share * len(there)), 1), len(there) - 1)
        # Numbers are drawn even if none goes: masks of other layers do not depend on this one.
        row[random.permutation(there)[: max(count, 0)]] = False
    return keep


def mean_losses(subject: Subject, examples: Examples, keeps: list[Keep], passes: Passes, doing: str) -> list[float]:
    """Compute the mean loss of each keep-set, by which something is chosen.

    Raises:
        ValueError: one is not finite, and neither is that of the model with all its units, so that the input is at
            fault and no keep-set.
    """
    progress = passes.progress(doing)
    size = passes.batch_size
    groups = subject.losses(examples, keeps, batch_size=size, at_once=2, progress=progress)
    means = {}
    for group in groups:
        means |= {number: losses.mean for number, losses in group.items()}
    found = [means[number] for number in range(len(keeps))]
    if not np.isfinite(found).all():
        finite("losses of the model, to choose by", run_losses(subject, examples, subject.existing, size).means)
    return found


def _ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Return Xᵀ (X Xᵀ + r t I)⁻¹ y of centred X and y; t is the mean of the diagonal."""
    x = x - x.mean(axis=0)
    y = y - y.mean()
    # The dual form: a system of as many equations as masks, which are far fewer than units.
    product = x @ x.T
    scale = np.trace(product) / len(product)
    if not scale > 0:
        return np.zeros(x.shape[1])
    return x.T @ np.linalg.solve(product + ridge * scale * np.eye(len(product)), y)
