"""A second, plain implementation of pruning layer by layer: what enters a sub-block behind those that were pruned."""

import numpy as np

from saap_jax.llama.segments import existing_units
from saap_jax.surgery.compensation import compensate
from saap_jax.types import STRUCTURES
from tests.helpers import changed, layers_of, reference


def entering(model, keep, layer: int, structure: str, tokens, batches, repair) -> np.ndarray:
    """Return what enters an output matrix where all in front of it is pruned and corrected, by the other model.

    Args:
        tokens: rows of tokens, without padding.
        batches: the same, as the correction reads them.
        repair: how; None: not at all.

    Returns:
        `[tokens, units, coordinates]`.
    """
    part = {name: units.copy() for name, units in existing_units(model.segments).items()}
    for at in range(layer + 1):
        for name in STRUCTURES if at < layer else STRUCTURES[: STRUCTURES.index(structure)]:
            part[name][at] = keep[name][at]
    corrected = model if repair is None else compensate(model, part, batches, repair).model

    def zeroed(name: str):
        def zero(value):
            rows = part[name]
            return value * rows.reshape(*rows.shape, *[1] * (value.ndim - 2)).astype(value.dtype)

        return zero

    without = changed(corrected, "segments/0/attention/output", zeroed("attention"))
    without = changed(without, "segments/0/mlp/down", zeroed("mlp"))
    seen = np.concatenate([reference(without, row)[1][layer][structure] for row in tokens])
    return seen.reshape(len(seen), seen.shape[1], -1)


PATHS = {"attention": "attention/output", "mlp": "mlp/down"}


def matrices(model) -> dict[str, np.ndarray]:
    """Return the output matrices of all layers, `[layers, coordinates, embed]` a structure."""
    layers = layers_of(model)
    return {name: np.stack([layer[path].reshape(-1, layer[path].shape[-1]) for layer in layers])
            for name, path in PATHS.items()}  # fmt: skip


def streams(model, row) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Return the activations of each layer, and the residual stream before the first sub-block and behind each.

    Of a model without norms behind sub-blocks.
    """
    seen = reference(model, row)[1]
    stream = [np.asarray(model.embedding[...], np.float64)[row]]
    for layer, active in zip(layers_of(model), seen, strict=True):
        for name, path in PATHS.items():
            matrix = layer[path].reshape(-1, stream[0].shape[1])
            stream.append(stream[-1] + active[name].reshape(len(row), -1) @ matrix)
    return seen, stream


def refitted_by_hand(
    model, keep, tokens, damping: float | None, ridge: str = "coordinate", *, blend: float = 0.0, scaled: bool = False
) -> dict[str, np.ndarray]:
    """Return output matrices W'[K] = W[K] + (G_KK + δ D)⁻¹ (Σ w â Tᵀ - G W) of each sub-block in turn.

    Activations â are those of the other implementation, on the stream as pruned so far, and G = Σ w â âᵀ.

    Args:
        tokens: rows of real tokens, of any lengths.
        damping: δ; None: 8 times the kept coordinates over the tokens.
        ridge: D, the diagonal of G_KK or its mean.
        blend: β of T = (1 - β) â W + β (unpruned stream behind the sub-block - pruned one in front of it).
        scaled: w = 1 / (mean x² + ε) of the unpruned stream x behind the sub-block; else 1.
    """
    made = {name: each.copy() for name, each in matrices(model).items()}
    now = model
    for layer in range(len(keep["mlp"])):
        for name, path in PATHS.items():
            place = 2 * layer + (name == "mlp")
            walks = [(*streams(now, row), streams(model, row)[1]) for row in tokens]
            active = np.concatenate([seen[layer][name].reshape(len(front[0]), -1) for seen, front, _ in walks])
            lacking = np.concatenate([dense[place + 1] - front[place] for _, front, dense in walks])
            behind = np.concatenate([dense[place + 1] for _, _, dense in walks])
            weight = matrices(model)[name][layer]
            target = active @ weight
            if blend:
                target = (1 - blend) * target + blend * lacking
            counts = 1 / (np.mean(behind**2, axis=1) + model.constants.norm_eps) if scaled else np.ones(len(active))
            kept = np.repeat(keep[name][layer], len(weight) // keep[name].shape[1])
            weighted = active[:, kept] * counts[:, None]
            among, cross = weighted.T @ active[:, kept], weighted.T @ target
            energy = np.diag(among)
            delta = 8 * kept.sum() / len(active) if damping is None else damping
            system = among + delta * np.diag(energy if ridge == "coordinate" else np.full(len(energy), energy.mean()))
            new = np.zeros_like(weight)
            new[kept] = weight[kept] + np.linalg.solve(system, cross - among @ weight[kept])
            made[name][layer] = new
            now = changed(now, f"segments/0/{path}", lambda value, at=layer, new=new: value.at[at].set(
                new.reshape(value.shape[1:])))  # fmt: skip
    return made


def surgeon_order(weight, active, block: int) -> list[int]:
    """Optimal brain surgeon by the book, `weight` [units, coordinates, embed]: the cheapest go, the rest is refitted.

    The inverse is made anew for those that are left each time, where the library downdates one.
    """
    units, coordinates, _ = weight.shape
    rows = active.reshape(len(active), -1)
    product = rows.T @ rows / len(rows)
    system = product + 0.01 * np.mean(np.diag(product)) * np.eye(len(product))
    flat, left, order = weight.reshape(len(system), -1).copy(), list(range(units)), []
    at = {unit: list(range(unit * coordinates, (unit + 1) * coordinates)) for unit in range(units)}
    while left:
        there = [row for unit in left for row in at[unit]]
        inverse = np.linalg.inv(system[np.ix_(there, there)])
        place = {unit: [there.index(row) for row in at[unit]] for unit in left}
        costs = {
            unit: np.trace(flat[at[unit]].T @ np.linalg.inv(inverse[np.ix_(place[unit], place[unit])]) @ flat[at[unit]])
            for unit in left
        }
        now = sorted(left, key=costs.get)[: max(block // coordinates, 1)]
        gone = [row for unit in now for row in place[unit]]
        lost = flat[[there[row] for row in gone]]
        flat[there] -= inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], lost)
        order, left = order + now, [unit for unit in left if unit not in now]
    return order


def swapped_by_hand(weight, moment, ridge: float, kept: set[int]) -> set[int]:
    """OSSCAR's search: out goes what costs least, in comes what wins most, while the error falls; all fitted anew.

    The error of each set is ½ tr((W - W')ᵀ H (W - W')) with W' solved for, where the library sweeps one matrix.
    """
    units, coordinates, embed = weight.shape
    flat, system = weight.reshape(-1, embed), moment + ridge * np.eye(len(moment))

    def error(stay: set[int]) -> float:
        rows = np.repeat(np.isin(np.arange(units), sorted(stay)), coordinates)
        new = np.zeros_like(flat)
        new[rows] = np.linalg.solve(system[np.ix_(rows, rows)], system[rows] @ flat)
        return 0.5 * float(np.sum((flat - new) * (system @ (flat - new))))

    while kept and len(kept) < units:
        out = min(sorted(kept), key=lambda unit: error(kept - {unit}))
        left = kept - {out}
        into = min(sorted(set(range(units)) - kept), key=lambda unit: error(left | {unit}))
        if error(left) - error(left | {into}) <= (error(left) - error(kept)) * (1 + 1e-4):
            break
        kept = left | {into}
    return kept
