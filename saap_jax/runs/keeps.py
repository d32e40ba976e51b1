"""Keep-sets that a run holds, `keeps.npz`: arrays `CANDIDATE/STRUCTURE`, `[layers, units]`, True where a unit stays."""

from collections.abc import Mapping

from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.llama import Llama
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.reading import DAMAGED
from saap_jax.surgery.counting import kept_parameters
from saap_jax.surgery.cut import check_keep
from saap_jax.types import STRUCTURES, Keep


def read_keeps(run: RunDirectory, model: Llama, ratios: Mapping[str, float]) -> dict[str, Keep]:
    """Return the keep-sets that a run holds of some candidates; those that it does not hold are left out.

    Args:
        ratios: the share of the prunable parameters that has to be gone, by the name of a candidate.

    Raises:
        ValueError: one has units that the model does not have, or removes less than it claims.
    """
    arrays, keeps = run.load_arrays("keeps") if run.has("keeps.npz") else {}, {}
    total, prunable = count_parameters(model), prunable_parameters(discover(model))
    for name, ratio in ratios.items():
        keep = {each: arrays[f"{name}/{each}"] for each in STRUCTURES if f"{name}/{each}" in arrays}
        if len(keep) < len(STRUCTURES):
            continue
        where = f"{run.path / 'keeps.npz'}: the keep-set of {name}"
        try:
            if any(kept.dtype != bool for kept in keep.values()):
                raise ValueError(f"expected true or false for each unit, got {keep[STRUCTURES[0]].dtype}")
            check_keep(keep, model.runs)
        except ValueError as error:
            raise ValueError(f"{where} is not of this model ({error}); {DAMAGED}") from None
        if not (gone := (total - kept_parameters(model, keep)) / prunable) >= ratio * (1 - 1e-9):
            raise ValueError(f"{where} removes {gone:.4f} of the prunable parameters, less than {ratio:g}; {DAMAGED}")
        keeps[name] = keep
    return keeps


def save_keeps(run: RunDirectory, keeps: Mapping[str, Keep]) -> None:
    """Keep the keep-sets of candidates, by name."""
    run.save_arrays("keeps", {f"{name}/{part}": kept for name, keep in keeps.items() for part, kept in keep.items()})
