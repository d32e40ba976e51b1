"""Keep-sets that a run holds, `keeps.npz`: arrays `CANDIDATE/STRUCTURE`, `[layers, units]`, True where a unit stays.

Beside it `learning.npz`, which training that was killed goes on from.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.reading import DAMAGED
from saap_jax.subjects.base import Subject
from saap_jax.types import Keep


def read_keeps(run: RunDirectory, subject: Subject, ratios: Mapping[str, float]) -> dict[str, Keep]:
    """Return the keep-sets that a run holds of some candidates; those that it does not hold are left out.

    Args:
        ratios: the share of the prunable parameters that has to be gone, by the name of a candidate.

    Raises:
        ValueError: one has units that the model does not have, or removes less than it claims.
    """
    arrays, keeps, structures = run.load_arrays("keeps") if run.has("keeps.npz") else {}, {}, tuple(subject.existing)
    for name, ratio in ratios.items():
        keep = {part: arrays[f"{name}/{part}"] for part in structures if f"{name}/{part}" in arrays}
        if len(keep) < len(structures):
            continue
        where = f"{run.path / 'keeps.npz'}: the keep-set of {name}"
        try:
            if wrong := [kept.dtype for kept in keep.values() if kept.dtype != bool]:
                raise ValueError(f"expected true or false for each unit, got {wrong[0]}")
            subject.check_keep(keep)
        except ValueError as error:
            raise ValueError(f"{where} is not of this model ({error}); {DAMAGED}") from None
        if not (gone := subject.removed(keep) / subject.prunable) >= ratio * (1 - 1e-9):
            raise ValueError(f"{where} removes {gone:.4f} of the prunable parameters, less than {ratio:g}; {DAMAGED}")
        keeps[name] = keep
    return keeps


def save_keeps(run: RunDirectory, keeps: Mapping[str, Keep]) -> None:
    """Keep the keep-sets of candidates, by name."""
    run.save_arrays("keeps", {f"{name}/{part}": kept for name, keep in keeps.items() for part, kept in keep.items()})


class Training(NamedTuple):
    """What the training of one candidate's units has come to, in a run's `learning.npz`, which holds one of them."""

    run: RunDirectory
    candidate: str

    def load(self) -> dict[str, np.ndarray]:
        """Return its arrays; none where the file is absent, or of another candidate."""
        arrays = self.run.load_arrays("learning") if self.run.has("learning.npz") else {}
        prefix = f"{self.candidate}/"
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays in place of those that are there."""
        self.run.save_arrays("learning", {f"{self.candidate}/{name}": array for name, array in arrays.items()})
