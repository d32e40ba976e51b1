"""Write a model directory: Hugging Face names and layout, per-layer widths where layers differ, never half a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saap_jax.llama.files.hf_config import config_from_spec, quantization_to_config
from saap_jax.llama.files.hf_groups import as_stored, groups_of
from saap_jax.llama.files.write import (
    CODES,
    model_tensors,
    new_output,
    write_further,
    write_json,
    write_tensors,
    write_tokenizer,
)
from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import quantization_of
from saap_jax.llama.segments import segment_bounds
from saap_jax.runtime.mesh import taken_in
from saap_jax.runtime.processes import is_primary
from saap_jax.runtime.remote import check_local
from saap_jax.types import STRUCTURES, Keep


@taken_in
def save_model(
    model: Llama,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    keep: Keep | None = None,
    dtype: Any = None,
    further: Mapping[str, dict[str, Any] | str] | None = None,
) -> Path:
    """Write `model.safetensors`, `config.json`, tokenizer files and `keep.json` to a new directory; return its path.

    `dtype` converts the parameters (None keeps theirs); arrays of quantised matrices stay as they are. `keep`,
    `[layers, units]` a structure, says which units of the original model are left; it must agree with the widths of
    `model`. `further` are JSON objects and texts by file name. Everything goes to a hidden sibling directory that is
    renamed at the end, so nothing incomplete appears under the final name. One tensor at a time is held beside the
    model, also of one that is spread over devices. Of several processes of a job, all have to call this, and the first
    one writes.

    Raises `FileExistsError` if `directory` exists, `ValueError` for a `keep` of another model or adapters that are not
    merged, `OSError` if the disk is full; in each case nothing is left behind.
    """
    if keep is not None:
        check_widths(keep, model)
    stored_dtype = jnp.dtype(model.embedding.dtype if dtype is None else dtype)
    if stored_dtype.name not in CODES:
        raise ValueError(f"dtype: expected {', '.join(CODES)}, got {dtype!r}")
    config, target = _config(model, stored_dtype.name), check_local("directory", directory).expanduser()
    with new_output(target, "the model") as place:
        tensors = as_stored(model_tensors(model), groups_of(model.spec, config["model_type"]))
        write_tensors(tensors, place / "model.safetensors", stored_dtype)
        if is_primary():
            write_json(config, place / "config.json")
            if keep is not None:
                write_json(_keep_record(keep), place / "keep.json")
            write_further(further or {}, place)
            if tokenizer is not None:
                write_tokenizer(tokenizer, place)
    return target


def _config(model: Llama, dtype: str) -> dict[str, Any]:
    """Return the `config.json`; of a quantised model one that other readers refuse, as they would misread it."""
    if (quantization := quantization_of(model)) is None:
        return config_from_spec(model.spec, dtype)
    return config_from_spec(model.spec, dtype, per_layer=True) | quantization_to_config(quantization)


def check_widths(keep: Keep, model: Llama) -> None:
    """Raise ValueError unless a model has as many units in each layer as `keep` says were kept."""
    for name in STRUCTURES:
        widths = [at.units[name] for at in segment_bounds(model.segments) for _ in range(at.start, at.stop)]
        kept = keep[name].sum(axis=1).tolist() if name in keep else "none"
        if kept != widths:
            raise ValueError(f"keep: expected {name} units a layer {widths}, as in the model, got {kept}; cut it first")


def _keep_record(keep: Keep) -> dict[str, Any]:
    return {
        name: {"units": keep[name].shape[1], "kept": [np.flatnonzero(layer).tolist() for layer in keep[name]]}
        for name in STRUCTURES
    }
