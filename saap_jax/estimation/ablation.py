"""The oracle that estimators are judged by: the exact change of the loss when one unit goes.

It needs text and a model, not statistics, so it is a runner and no `Estimator`. The change is negative where the model
is better without the unit; absolute values would hide that.

The residual stream before every layer is kept from one dense pass (`layers x tokens x embed` numbers in host memory:
283 MB for 4096 tokens of a 135 M model in float32, 1.1 GB for those of a 7 B model in bfloat16). What a unit writes is
subtracted behind its own layer, and only the layers from there on run again, several units as one batch. That suffix
is one compiled program: the first layer to run is an input of it.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.checks import at_least
from saap_jax.estimation.base import Batch
from saap_jax.llama.attention import apart_of, sight_of
from saap_jax.llama.loss import summed_losses
from saap_jax.llama.model import DecoderLayer, Llama, decode, feed, post_normed, rms_norm, written_by
from saap_jax.llama.passes import layer_of, run_layers
from saap_jax.llama.product import added
from saap_jax.llama.segments import existing_units, segment_bounds
from saap_jax.llama.spec import Constants
from saap_jax.runtime.decisions import UndecidedError
from saap_jax.types import Keep, Scores


class Unit(NamedTuple):
    """One attention unit or MLP channel of one layer."""

    structure: str
    layer: int
    number: int
    """Index within the layer."""


Group = tuple[Unit, ...]
"""Units of one structure and layer that are removed, each by itself, in one batch; the last one fills it up."""

Prefix = tuple[Batch, Float[np.ndarray, "layers batch seq embed"], float]
"""What a dense pass over a microbatch leaves in host memory: the stream before each layer, the summed loss in nats."""


def sample_units(existing: Keep, channels_per_layer: int, seed: int = 0) -> list[Unit]:
    """Draw all attention units and `channels_per_layer` MLP channels of each layer (all, if it has fewer).

    Of a traced model, as many units of each copy of each structure.

    Channels are the first of a random order that depends on the seed and the layer alone: a larger sample contains
    the smaller one, so that earlier results count. The order of the list is by layer.
    """
    at_least(0)("channels_per_layer", channels_per_layer)
    units: list[Unit] = []
    for layer in range(max(len(each) for each in existing.values())):
        for name, each in existing.items():
            if layer < len(each):
                numbers = np.flatnonzero(each[layer])
            else:
                numbers = np.zeros(0, int)
            if name != "attention":
                numbers = np.sort(np.random.default_rng([seed, layer]).permutation(numbers)[:channels_per_layer])
            units += [Unit(name, layer, int(index)) for index in numbers]
    return units


def ablate(
    model: Llama,
    batches: Iterable[Batch],
    units: Sequence[Unit],
    *,
    done: Mapping[Unit, float] | None = None,
    save: Callable[[list[tuple[Unit, float]]], None] | None = None,
    at_once: int = 4,
    progress: Callable[[Sequence[Group]], Iterator[Group]] = iter,
) -> dict[Unit, float]:
    """Compute L(g_u = 0) - L(g = 1) of each unit, in nats a token, over all real tokens of the batches.

    L is the mean next-token loss of the model with the gate g_u on the unit's activation. Positive: the unit helps.
    In float32, changes below about 2e-6 are rounding (measured on a 135 M model).

    Args:
        batches: (tokens, mask) pairs, all of one shape; rows without real tokens are padding.
        done: results of an earlier call on the same model and text; these units are not computed again.
        save: gets the results of each batch of units as soon as they are there, to append them to a file (see
            `changes_to_lines`).
        at_once: units in one batch; changes speed and memory, not the result.
        progress: wraps the batches of units, to show progress.

    Raises:
        ValueError: no token to predict, a unit that the model does not have, or a loss that is not finite.
    """
    at_least(1)("at_once", at_once)
    existing = existing_units(model.segments)
    for name, layer, number in units:
        known = existing.get(name, np.zeros((0, 0), bool))
        if not (0 <= layer < known.shape[0] and 0 <= number < known.shape[1] and known[layer, number]):
            raise ValueError(
                f"ablation: {Unit(name, layer, number)} does not exist in this model of {len(model.spec.layers)} "
                "layers; choose units with `sample_units(existing_units(model.segments), …)`"
            )
    results = {}
    if done:
        results = {unit: done[unit] for unit in units if unit in done}
    groups = _groups([unit for unit in dict.fromkeys(units) if unit not in results], at_once)
    batches = list(batches)
    tokens = sum(int(mask[:, 1:].sum()) for _, mask in batches)
    if tokens == 0:
        raise ValueError("ablation: expected at least one example with two tokens, got none")
    prefixes = [prefix_of(model, batch) for batch in batches if groups]
    for group in progress(groups) if groups else ():
        new = dict(zip(group, (changes_of(model, prefixes, group) / tokens).tolist(), strict=True))
        results |= new
        if save is not None:
            save(list(new.items()))
    return {unit: results[unit] for unit in dict.fromkeys(units)}


def changes_to_scores(changes: Mapping[Unit, float], existing: Keep) -> Scores:
    """Lay the changes out as `[layers, units]` a structure, NaN where a unit was not sampled or does not exist."""
    scores = {name: np.full(units.shape, np.nan) for name, units in existing.items()}
    for unit, change in changes.items():
        scores[unit.structure][unit.layer, unit.number] = change
    return dict(scores)


def changes_to_lines(changes: Iterable[tuple[Unit, float]]) -> str:
    """Write results as JSON lines to append to a file, the last one without its end."""
    return "\n".join(json.dumps([*unit, change]) for unit, change in changes)


def changes_from_lines(text: str) -> dict[Unit, float]:
    """Read what `changes_to_lines` wrote, an unfinished last line left out.

    >>> changes_from_lines(changes_to_lines([(Unit("mlp", 2, 7), -0.25)]) + '\\n["mlp", 2, 9, 0.1')
    {Unit(structure='mlp', layer=2, number=7): -0.25}

    Raises:
        ValueError: a line that is none of it.
    """
    *lines, _ = text.split("\n")
    values = [json.loads(line) for line in lines]
    return {Unit(structure, layer, number): float(change) for structure, layer, number, change in values}


@jax.jit
def prefix_step(
    model: Llama, tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"]
) -> tuple[Float[Array, "layers batch seq embed"], Float[Array, "batch"]]:
    """Run the model, for the residual stream before each layer and each example's summed loss."""
    hidden, observed = model.hidden(tokens, observe=lambda point, x: x if point == "attention_in" else None)
    states = jnp.concatenate([segment["attention_in"] for segment in observed])
    return states, summed_losses(model, hidden[None], tokens, mask)[0]


@functools.partial(jax.jit, static_argnames=("structure", "constants"))
def remove_step(
    segment: DecoderLayer,
    layer: Int[Array, ""],
    x: Float[Array, "batch seq embed"],
    units: Int[Array, "units"],
    apart: Bool[Array, ""] | None = None,
    *,
    structure: Literal["attention", "mlp"],
    constants: Constants,
) -> Float[Array, "units batch seq embed"]:
    """Make the residual stream behind a layer of a segment, once without each unit; `x` is the one before it.

    A sub-block's output is a sum over its units, so that z(g_u = 0) = z(g = 1) - a_u W_out[u]: the layer runs once,
    and what each unit writes is subtracted (before a norm behind the sub-block; behind an attention unit, the MLP runs
    again).
    """
    parameters = layer_of(segment, layer)
    attention = parameters.attention
    mlp = parameters.mlp
    sight = sight_of(x.shape[1], attention.query.shape[-1], constants).of(apart)
    _, seen = decode(parameters, x, None, sight, constants, observe=lambda point, activation: activation)

    def behind(rest: Float[Array, "units batch seq embed"], bias: Any, norm: Any, before: Array) -> Array:
        """Put what is left of a sub-block's output behind its norm, if there is one, and into the stream."""
        left = post_normed(added(_flat(rest), bias), norm, constants)
        return before[None] + left.reshape(rest.shape)

    if structure == "mlp" and mlp.router is not None:  # what was routed to an expert goes to the others
        without = 1 - jax.nn.one_hot(units, mlp.down.shape[0], dtype=x.dtype)
        normed = rms_norm(seen["mlp_in"], parameters.mlp_norm[...], constants)
        rest = jax.lax.map(lambda gates: written_by(mlp, feed(mlp, normed, constants, gates)), without)
        return behind(rest, None, parameters.mlp_post_norm, seen["mlp_in"])
    if structure == "mlp":
        active = seen["mlp"].reshape(*x.shape[:2], -1)
        down = mlp.down[...].reshape(-1, x.shape[-1])
        each = jnp.einsum("btf,fd->fbtd", active[..., units], down[units])
        if parameters.mlp_post_norm is None:
            return seen["mlp_out"][None] - each
        rest = jnp.einsum("btf,fd->btd", active, down)[None] - each
        return behind(rest, mlp.down_bias, parameters.mlp_post_norm, seen["mlp_in"])
    each = jnp.einsum("btkgh,kghd->kbtd", seen["attention"][:, :, units], attention.output[...][units])
    if parameters.attention_post_norm is None:
        y = seen["attention_out"][None] - each
    else:
        rest = jnp.einsum("btkgh,kghd->btd", seen["attention"], attention.output[...])[None] - each
        y = behind(rest, attention.output_bias, parameters.attention_post_norm, x)
    y = _flat(y)
    written = written_by(mlp, feed(mlp, rms_norm(y, parameters.mlp_norm[...], constants), constants))
    return (y + post_normed(written, parameters.mlp_post_norm, constants)).reshape(each.shape)


@jax.jit
def suffix_step(
    model: Llama,
    states: Float[Array, "units batch seq embed"],
    start: Int[Array, ""],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "units batch"]:
    """Run the layers from `start` on and return each example's summed loss, for each of several residual streams.

    `start` is an input, so the cost is that of the remaining layers, and no layer compiles anew.
    """
    x = run_layers(model, _flat(states), start, len(model.spec.layers))
    hidden = model.final(x)
    return summed_losses(model, hidden.reshape(states.shape), tokens, mask)


def prefix_of(model: Llama, batch: Batch) -> Prefix:
    """Run the dense model on a microbatch."""
    states, losses = prefix_step(model, *map(jnp.asarray, batch))
    loss = float(np.asarray(losses, np.float64).sum())
    if not np.isfinite(loss):
        raise UndecidedError(f"expected finite losses to score by, the loss of the whole model is {loss}")
    return batch, np.asarray(states), loss


def changes_of(model: Llama, prefixes: Sequence[Prefix], group: Group) -> Float[np.ndarray, "units"]:
    """Compute the change of the summed loss over all batches for each unit of the group."""
    structure, layer, _ = group[0]
    every = segment_bounds(model.segments)
    number, bounds = next((i, b) for i, b in enumerate(every) if layer < b.stop)
    apart = apart_of(model.constants, every)[number]
    indices = jnp.asarray([unit.number for unit in group], jnp.int32)
    total = np.zeros(len(group))
    for (tokens, mask), states, dense in prefixes:
        x = remove_step(
            model.segments[number],
            jnp.asarray(layer - bounds.start, jnp.int32),
            jnp.asarray(states[layer]),
            indices,
            None if apart is None else jnp.asarray(apart[layer - bounds.start]),
            structure=structure,
            constants=model.constants,
        )
        losses = suffix_step(model, x, jnp.asarray(layer + 1, jnp.int32), jnp.asarray(tokens), jnp.asarray(mask))
        total += np.asarray(losses, np.float64).sum(axis=1) - dense
    if len(wrong := np.flatnonzero(~np.isfinite(total))):
        raise UndecidedError(f"expected finite losses to score by, the loss without {group[wrong[0]]} is not finite")
    return total


def _groups(units: Sequence[Unit], at_once: int) -> list[Group]:
    """Group units by layer and structure into batches of one size a structure, so that few programs serve them all."""
    places: dict[tuple[int, str], list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.layer, unit.structure, unit.number)):
        places.setdefault((unit.layer, unit.structure), []).append(unit)
    groups = []
    for (_, structure), members in places.items():
        most = max(len(others) for (_, name), others in places.items() if name == structure)
        size = -(-most // -(-most // at_once))  # the fullest layer in equal batches of at most `at_once`
        for some in (members[i : i + size] for i in range(0, len(members), size)):
            groups.append((*some, *some[-1:] * (size - len(some))))
    return groups


def _flat(states: Float[Array, "units batch seq embed"]) -> Float[Array, "examples seq embed"]:
    return states.reshape(-1, *states.shape[2:])
