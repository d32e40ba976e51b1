"""Write a model directory tensor by tensor, and outputs that appear under their final name only when they are complete.

A directory has Hugging Face names and layout, and per-layer widths where layers differ.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saap_jax.checks import check_local
from saap_jax.llama.files.config import config_from_spec
from saap_jax.llama.files.layout import Tensor, as_stored, groups_of, model_tensors
from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import quantization_of
from saap_jax.llama.segments import existing_units
from saap_jax.runtime.files import held, plain, write_atomically
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import within
from saap_jax.types import STRUCTURES, Keep

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Name of a dtype of parameters -> how safetensors calls it."""


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

    >>> sorted(each.name for each in save_model(model, folder / "saved").iterdir())
    ['config.json', 'model.safetensors']
    """
    if keep is not None:
        check_widths(keep, model)
    stored_dtype = jnp.dtype(model.embedding.dtype if dtype is None else dtype)
    if stored_dtype.name not in CODES:
        raise ValueError(f"dtype: expected {', '.join(CODES)}, got {dtype!r}")
    config = config_from_spec(model.spec, stored_dtype.name, quantization=quantization_of(model))
    target = check_local("directory", directory).expanduser()
    with new_output(target, "the model") as place:
        tensors = as_stored(model_tensors(model), groups_of(model.spec, config["model_type"]))
        write_tensors(tensors, place / "model.safetensors", stored_dtype)
        if is_primary():
            write_json(config, place / "config.json")
            if keep is not None:
                kept = {name: [np.flatnonzero(layer).tolist() for layer in keep[name]] for name in STRUCTURES}
                record = {name: {"units": keep[name].shape[1], "kept": kept[name]} for name in STRUCTURES}
                write_json(record, place / "keep.json")
            write_further(further or {}, place)
            if tokenizer is not None:
                write_tokenizer(tokenizer, place)
    return target


def check_widths(keep: Keep, model: Llama) -> None:
    """Raise ValueError unless a model has as many units in each layer as `keep` says were kept."""
    units = existing_units(model.segments)
    for name in STRUCTURES:
        widths = units[name].sum(axis=1).tolist()
        if name in keep:
            kept = keep[name].sum(axis=1).tolist()
        else:
            kept = "none"
        if kept != widths:
            raise ValueError(f"keep: expected {name} units a layer {widths}, as in the model, got {kept}; cut it first")


def write_tensors(
    tensors: Sequence[Tensor], path: Path, dtype: np.dtype, about: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: 8 bytes of header length, the JSON header, the tensors in the header's order.

    The header is written here, because the library's writer wants all tensors at once, and ours are transposed copies.
    Of several processes of a job, all have to call this: each tensor is gathered by all, and written by the first.

    Args:
        about: the metadata of the file.

    Raises:
        ValueError: a tensor whose values are too large for `dtype`.
    """
    header: dict[str, Any] = {"__metadata__": dict(about or {"format": "pt"})}
    offset = 0
    codes = CODES | {"uint8": "U8"}
    for tensor in tensors:
        stored = tensor.dtype or dtype
        end = offset + int(np.prod(tensor.shape)) * stored.itemsize
        code = codes[stored.name]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") if is_primary() else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
        for tensor in within("tensors", tensors):
            for values in (tensor.read(),) if tensor.pieces is None else tensor.pieces():
                if file is not None:
                    file.write(converted(values, tensor.name, tensor.dtype or dtype).reshape(-1).view(np.uint8).data)
        if file is not None:
            file.flush()
            os.fsync(file.fileno())


def converted(values: np.ndarray, name: str, dtype: np.dtype) -> np.ndarray:
    """Convert the values of a tensor, contiguous; `ValueError` where a finite one would become infinite."""
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(values, dtype)
    narrower = values.dtype != dtype and result.size  # of two types of 16 bits either may be
    if narrower and np.isinf([result.min(), result.max()]).any() and np.isfinite(values).all():
        raise ValueError(
            f"{name}: holds values up to {np.abs(values).max():.3g}, beyond the range of {dtype.name}; "
            "choose float32 or bfloat16"
        )
    return result


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the files of a tokenizer.

    Raises:
        OSError: the disk is full; the library that writes one of them raises a plain Exception there.
    """
    try:
        tokenizer.save_pretrained(str(directory))
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from error


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_further(files: Mapping[str, dict[str, Any] | str], directory: Path) -> None:
    """Write JSON objects and texts by file name, each whole or not at all; of several processes the first one does."""
    for name, content in files.items():
        if isinstance(content, str):
            text = content
        else:
            text = json.dumps(plain(content), indent=2) + "\n"
        write_atomically(directory / name, text.encode())


@contextlib.contextmanager
def new_output(target: Path, what: str, *, suffix: str | None = None) -> Iterator[Path]:
    """Yield where to write, and give it its final name when the block ends without an error.

    What is yielded lies in a hidden sibling of `target`, `.NAME.partial`: an empty directory, or, with a `suffix`, the
    path of a file to make. `what` says in errors what was not saved. Raises `FileExistsError` if `target` exists,
    `ValueError` if another process writes it, `OSError` if the disk is full; in each case, as after any error in the
    block, nothing is left behind. What a killed process left there is removed by the next one.

    Of several processes of a job, the first makes and names it, and the others leave the block when it is there; what
    they are given does not exist.
    """
    hidden = target.with_name(f".{target.name}.partial")

    def remove() -> None:
        if hidden.is_dir() and not hidden.is_symlink():
            shutil.rmtree(hidden, ignore_errors=True)

    try:
        with held(target, str(target)):
            if broadcast(lambda: target.exists() or target.is_symlink()):
                kind = "directory" if suffix is None else "file"
                raise FileExistsError(f"{target}: exists already and is never overwritten; choose another {kind}")
            if not is_primary():
                yield hidden
                barrier(f"{what} is saved")
                return
            remove()
            try:
                hidden.mkdir()
                place = hidden / f"content{suffix or ''}"
                if suffix is None:
                    place.mkdir()
                yield place
                place.rename(target)
                barrier(f"{what} is saved")
            finally:
                remove()
    except OSError as error:
        if error.errno is None:  # not of the system: a message of ours
            raise
        said = OSError(error.errno, f"{target}: {what} was not saved ({error.strerror or error})")
        said.filename = str(target)
        raise said from error
