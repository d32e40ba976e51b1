"""Phi-3 stores query, key and value as rows of one matrix, and gate and up of another: split on load, joined on save.

Everything else in the library knows the separate matrices alone.
"""

from collections.abc import Sequence

import numpy as np

from saap_jax.llama.files.hf_layout import Checkpoint
from saap_jax.llama.files.write import Tensor
from saap_jax.llama.spec import LayerWidths

FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
"""Stored matrix of a layer -> the matrices whose rows it has, in this order."""


def split(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of fused matrices as one of separate ones, which are read as parts.

    Raises:
        ValueError: a fused matrix is missing or misshapen, or a separate one is there too.
    """
    spec, where = checkpoint.spec, checkpoint.where
    shapes, places = dict(checkpoint.shapes), {}
    for index, widths in enumerate(spec.layers):
        layer = f"model.layers.{index}."
        for whole, parts in FUSED.items():
            name, rows = f"{layer}{whole}", _rows(widths, spec.head_dim, parts)
            names = [f"{layer}{part}" for part in parts]
            expected = (sum(rows), spec.embed)
            if extra := [part for part in names if part in shapes]:
                raise ValueError(f"{where}: unknown tensors {', '.join(extra)}; expected their rows in {name}")
            if name not in shapes:
                raise ValueError(f"{where}: missing tensors {name}")
            if (found := shapes.pop(name)) != expected:
                raise ValueError(f"{where}: {name} has shape {list(found)}, expected {list(expected)}")
            start = 0
            for part, count in zip(names, rows, strict=True):
                shapes[part], places[part] = (count, spec.embed), (name, start)
                start += count

    def read_part(name: str, block: tuple[slice, ...]) -> np.ndarray:
        if name in places:
            (name, start), rows = places[name], block[0].indices(shapes[name][0])
            block = (slice(start + rows[0], start + rows[1]), *block[1:])
        return checkpoint.read(name)[block] if checkpoint.read_part is None else checkpoint.read_part(name, block)

    def read(name: str) -> np.ndarray:
        return read_part(name, (slice(None), slice(None))) if name in places else checkpoint.read(name)

    return checkpoint._replace(shapes=shapes, read=read, read_part=checkpoint.read_part and read_part)


def joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the separate matrices of each layer joined.

    Raises:
        ValueError: matrices of which some are quantised and others not.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    wholes = {parts[0]: (whole, parts) for whole, parts in FUSED.items()}
    others = {part for parts in FUSED.values() for part in parts[1:]}
    result = []
    for tensor in tensors:
        layer, rest = _layer_and_rest(tensor.name)
        if rest in wholes:
            whole, parts = wholes[rest]
            result.append(_joined(f"{layer}{whole}", [by_name[f"{layer}{part}"] for part in parts]))
        elif rest not in others:
            result.append(tensor)
    return result


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if len({part.dtype for part in parts}) > 1:
        kinds = ", ".join(f"{part.name} as {part.dtype or 'floats'}" for part in parts)
        raise ValueError(f"{name}: expected its matrices all in floats or all quantised, got {kinds}; dequantise them")
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    return Tensor(name, shape, lambda: np.concatenate([part.read() for part in parts]), parts[0].dtype)


def _layer_and_rest(name: str) -> tuple[str, str]:
    """Split `model.layers.3.mlp.up_proj.weight` behind the number; a tensor of no layer has nothing before."""
    if not name.startswith("model.layers."):
        return "", name
    end = name.index(".", len("model.layers.")) + 1
    return name[:end], name[end:]


def _rows(widths: LayerWidths, head_dim: int, parts: Sequence[str]) -> list[int]:
    heads = widths.kv_heads * head_dim
    return [heads * widths.q_per_kv, heads, heads] if len(parts) == 3 else [widths.mlp, widths.mlp]
