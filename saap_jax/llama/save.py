"""Write a model directory: Hugging Face names and layout, per-layer widths where layers differ, never half a file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saap_jax.llama.hf_config import config_from_spec
from saap_jax.llama.hf_layout import Stored, stored_parameters
from saap_jax.llama.model import Llama
from saap_jax.llama.runs import run_bounds
from saap_jax.types import STRUCTURES, Keep

_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save_model(
    model: Llama, directory: str | Path, *, tokenizer: Any = None, keep: Keep | None = None, dtype: Any = None
) -> Path:
    """Write `model.safetensors`, `config.json`, tokenizer files and `keep.json` to a new directory; return its path.

    `dtype` converts the parameters (None keeps theirs). `keep`, `[layers, units]` a structure, says which units of
    the original model are left; it must agree with the widths of `model`. Everything goes to a hidden sibling
    directory that is renamed at the end, so nothing incomplete appears under the final name. One tensor at a time is
    held beside the model: the safetensors header is written here, because the library's writer wants all tensors at
    once, and ours would have to be transposed copies.

    Raises `FileExistsError` if `directory` exists, `ValueError` for a `keep` of another model, `OSError` if the disk
    is full; in each case nothing is left behind.
    """
    target = Path(directory).expanduser()
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target}: exists already and is never overwritten; choose another directory")
    if keep is not None:
        _check_keep(keep, model)
    stored_dtype = jnp.dtype(model.embedding.dtype if dtype is None else dtype)
    if stored_dtype.name not in _CODES:
        raise ValueError(f"dtype: expected {', '.join(_CODES)}, got {dtype!r}")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        _write_tensors(stored_parameters(model)[0], temporary / "model.safetensors", stored_dtype)
        _write_json(config_from_spec(model.spec, stored_dtype.name), temporary / "config.json")
        if keep is not None:
            _write_json(_keep_record(keep), temporary / "keep.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(target)
    except OSError as error:
        raise OSError(error.errno, f"{target}: the model was not saved ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_tensors(stored: list[Stored], path: Path, dtype: Any) -> None:
    """Write a safetensors file: 8 bytes of header length, the JSON header, the tensors in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in stored:
        size = int(np.prod(item.shape)) * dtype.itemsize
        for name in item.names:
            offsets = [offset, offset + size]
            header[name] = {"dtype": _CODES[dtype.name], "shape": list(item.shape), "data_offsets": offsets}
            offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for item in stored:
            for tensor in _tensors(item):
                contiguous = np.ascontiguousarray(item.to_stored(tensor), dtype)
                file.write(contiguous.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _tensors(item: Stored) -> Iterator[np.ndarray]:
    """Yield a parameter's layers on the host: views of memory that a CPU already holds, else fetched one by one.

    Never fetched whole from an accelerator, because jax would keep that copy as long as the parameter lives.
    """
    value = item.variable[...]
    if {device.platform for device in value.devices()} == {"cpu"} and len(value.devices()) == 1:
        value = np.asarray(value)
    for index in range(len(item.names)):
        yield np.asarray(value[index] if item.stacked else value)


def _check_keep(keep: Keep, model: Llama) -> None:
    for name in STRUCTURES:
        widths = [run.units[name] for run in run_bounds(model.runs) for _ in range(run.start, run.stop)]
        kept = keep[name].sum(axis=1).tolist()
        if kept != widths:
            raise ValueError(f"keep: expected {name} units a layer {widths}, as in the model, got {kept}; cut it first")


def _keep_record(keep: Keep) -> dict[str, Any]:
    return {
        name: {"units": keep[name].shape[1], "kept": [np.flatnonzero(layer).tolist() for layer in keep[name]]}
        for name in STRUCTURES
    }


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
