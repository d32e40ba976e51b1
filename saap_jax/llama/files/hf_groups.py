"""Matrices that lie side by side in a checkpoint, or that it keeps apart, where the model has it the other way round.

Phi-3 stores query, key and value as rows of one matrix, and gate and up of another. Mixtures store a matrix an expert,
where the model has one of all experts of a layer: rows of gate and up, columns of down. Both are one thing: two lists
of matrices that are the same once each is joined along an axis.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from saap_jax.llama.files.families import FAMILIES
from saap_jax.llama.files.hf_layout import Checkpoint
from saap_jax.llama.files.write import Tensor
from saap_jax.llama.spec import LlamaSpec

_FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


class Group(NamedTuple):
    """Matrices of a layer: joined along `axis`, those of `ours` are those of `stored`."""

    axis: int
    ours: dict[str, int]
    """Name -> size along the axis."""
    stored: dict[str, int]
    across: int
    """Size along the other axis."""

    def shape(self, size: int) -> tuple[int, int]:
        """Return the shape of a member of a size along the axis."""
        return (self.across, size) if self.axis else (size, self.across)


def groups_of(spec: LlamaSpec, model_type: str) -> list[Group]:
    """List what a Hugging Face checkpoint of a `model_type` groups otherwise; one per layer fuses nothing."""
    groups = fused_groups(spec) if model_type in FAMILIES and FAMILIES[model_type].fused else []
    if (mixture := spec.constants.traits.mixture) is None:
        return groups
    for layer, widths in enumerate(spec.layers):
        below, each = f"model.layers.{layer}.{mixture.experts}", widths.channels or 0
        for part, axis in zip(mixture.parts, mixture.sides.values(), strict=True):
            apart = {f"{below}.{number}.{part}.weight": each for number in range(widths.mlp)}
            groups.append(Group(axis, {f"{below}.{part}.weight": widths.mlp * each}, apart, spec.embed))
    return groups


def fused_groups(spec: LlamaSpec) -> list[Group]:
    """List the fused matrices of Phi-3, as Hugging Face and GGUF have them."""
    groups = []
    for layer, widths in enumerate(spec.layers):
        heads = widths.kv_heads * spec.head_dim
        for whole, parts in _FUSED.items():
            sizes = (heads * widths.q_per_kv, heads, heads) if len(parts) == 3 else (widths.mlp, widths.mlp)
            block = f"model.layers.{layer}.{whole.partition('.')[0]}."
            ours = {f"{block}{part}.weight": size for part, size in zip(parts, sizes, strict=True)}
            groups.append(Group(0, ours, {f"model.layers.{layer}.{whole}.weight": sum(sizes)}, spec.embed))
    return groups


def regrouped(checkpoint: Checkpoint, groups: Iterable[Group]) -> Checkpoint:
    """View a checkpoint as one with our matrices; parts of fused ones are read as parts.

    Raises:
        ValueError: a stored matrix is missing or misshapen, or one of ours is there too.
    """
    where, shapes = checkpoint.where, dict(checkpoint.shapes)
    owners: dict[str, tuple[Group, int]] = {}
    for group in groups:
        start = 0
        if extra := [name for name in group.ours if name in shapes]:
            raise ValueError(
                f"{where}: unknown tensors {', '.join(extra)}; expected their rows in {', '.join(group.stored)}"
            )
        for name, size in group.stored.items():
            if name not in shapes:
                raise ValueError(f"{where}: missing tensors {name}")
            if (found := shapes.pop(name)) != group.shape(size):
                raise ValueError(f"{where}: {name} has shape {list(found)}, expected {list(group.shape(size))}")
        for name, size in group.ours.items():
            shapes[name], owners[name] = group.shape(size), (group, start)
            start += size

    def read_part(name: str, block: tuple[slice, ...]) -> np.ndarray:
        if name in owners:
            group, start = owners[name]
            if len(group.stored) != 1:
                return read(name)[block]
            name, ours = next(iter(group.stored)), block[group.axis].indices(group.ours[name])
            inner = slice(start + ours[0], start + ours[1])
            block = (block[0], inner) if group.axis else (inner, block[1])
        return checkpoint.read(name)[block] if checkpoint.read_part is None else checkpoint.read_part(name, block)

    def read(name: str) -> np.ndarray:
        if name not in owners:
            return checkpoint.read(name)
        group, _ = owners[name]
        if len(group.stored) == 1:
            return read_part(name, (slice(None), slice(None)))
        parts = [checkpoint.read(each) for each in group.stored]
        return np.concatenate(parts, axis=group.axis) if parts else np.zeros(shapes[name], np.float32)

    return checkpoint._replace(shapes=shapes, read=read, read_part=checkpoint.read_part and read_part)


def as_stored(tensors: Sequence[Tensor], groups: Iterable[Group]) -> list[Tensor]:
    """Group tensors as a checkpoint has them, each group in the place of its first matrix.

    Raises:
        ValueError: matrices of a group of which some are quantised and others not.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    groups = [group for group in groups if group.ours.keys() <= by_name.keys()]
    firsts = {next(iter(group.ours)): group for group in groups}
    others = {name for group in groups for name in group.ours} - firsts.keys()
    made = []
    for tensor in tensors:
        if (group := firsts.get(tensor.name)) is not None:
            made += _stored(group, [by_name[name] for name in group.ours])
        elif tensor.name not in others:
            made.append(tensor)
    return made


def _stored(group: Group, ours: list[Tensor]) -> list[Tensor]:
    """Make the stored tensors of a group from all of ours, which are read once for all of them."""
    axis = group.axis
    if len({part.dtype for part in ours}) > 1:
        kinds = ", ".join(f"{part.name} as {part.dtype or 'floats'}" for part in ours)
        raise ValueError(
            f"{', '.join(group.stored)}: expected its matrices all in floats or all quantised, got {kinds}; dequantise "
            "them"
        )
    size = sum(part.shape[axis] for part in ours) // max(len(group.stored), 1)
    shape = (ours[0].shape[0], size) if axis else (size, ours[0].shape[1])
    kept: list[np.ndarray] = []  # those of experts are written one behind the other

    def part(number: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            whole = kept.pop() if kept else np.concatenate([each.read() for each in ours], axis=axis)
            if number + 1 < len(group.stored):
                kept.append(whole)
            return whole[(slice(None),) * axis + (slice(number * size, (number + 1) * size),)]

        return read

    return [Tensor(name, shape, part(number), ours[0].dtype) for number, name in enumerate(group.stored)]
