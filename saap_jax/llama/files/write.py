"""Write checkpoints tensor by tensor, and outputs that appear under their final name only when they are complete."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.llama.files.hf_layout import Stored, stored_parameters, stored_shape
from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import QuantizedArray
from saap_jax.llama.spec import LayerWidths
from saap_jax.runtime.files import held, plain, write_atomically
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import within

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Name of a dtype of parameters -> how safetensors calls it."""

_BYTES = {"uint8": "U8"}


class Tensor(NamedTuple):
    """A tensor that is about to be written; `read` makes it, in its stored layout, and nothing keeps it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: np.dtype | None = None
    """How it is stored, where that is not up to the writer: of the arrays of a quantised matrix."""
    pieces: Callable[[], Iterator[np.ndarray]] | None = None
    """Makes it in pieces that follow each other along its first axis, where all of it at once would be large."""


def model_tensors(model: Llama, layers: Sequence[LayerWidths] | None = None) -> list[Tensor]:
    """Return the tensors of a model under their Hugging Face names, in the layout of a Hugging Face checkpoint.

    With `layers`, one entry a layer, every layer is widened to the widths given there by units of zeros, which change
    no logit: an added channel or head enters an output projection whose rows for it are zero.

    The arrays of quantised matrices are as they are.

    Raises `ValueError` if a layer is wider than what is asked for, or a quantised matrix (that is not empty) would have
    to be widened.
    """
    own = model.spec.layers
    wanted = own if layers is None else tuple(layers)
    tensors = []
    for item in stored_parameters(model)[0]:
        start = 0 if not item.stacked else int(item.names[0].split(".")[2])
        for index, name in enumerate(item.names):
            size = {}
            if item.stacked:
                widths = wanted[start + index]
                if isinstance(item.variable, QuantizedArray) and widths != own[start + index] and item.variable.size:
                    _check_kept(item.path, own[start + index], widths)
                size = {"kv_heads": widths.kv_heads, "q_per_kv": widths.q_per_kv, "mlp": widths.mlp}
                size |= {} if widths.channels is None else {"channels": widths.channels}
            tensors.append(_tensor(item, index, name, size))
    return tensors


def _check_kept(path: str, own: LayerWidths, wanted: LayerWidths) -> None:
    """Raise ValueError if the widths of the sub-block that a quantised matrix belongs to are to change."""
    names = ("mlp",) if "/mlp/" in path else ("kv_heads", "q_per_kv")
    if any(getattr(own, name) != getattr(wanted, name) for name in names):
        raise ValueError(f"{path}: expected widths of {own} for a quantised matrix, got {wanted}; dequantise the model")


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
    for tensor in tensors:
        stored = tensor.dtype or dtype
        size = int(np.prod(tensor.shape)) * stored.itemsize
        offsets = [offset, offset + size]
        header[tensor.name] = {
            "dtype": (CODES | _BYTES)[stored.name],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") if is_primary() else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
        for tensor in within("tensors", tensors):
            for values in (tensor.read(),) if tensor.pieces is None else tensor.pieces():
                if file is not None:
                    file.write(_fitted(values, tensor, tensor.dtype or dtype).reshape(-1).view(np.uint8).data)
        if file is not None:
            file.flush()
            os.fsync(file.fileno())


def converted(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """Read a tensor, contiguous, in another dtype; `ValueError` where a finite value would become infinite."""
    return _fitted(tensor.read(), tensor, dtype)


def _fitted(values: np.ndarray, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """Return what was read of a tensor, contiguous, in another dtype; see `converted`."""
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(values, dtype)
    narrower = np.dtype(values.dtype).itemsize > dtype.itemsize
    if narrower and result.size and np.isinf([result.min(), result.max()]).any() and np.isfinite(values).all():
        raise ValueError(
            f"{tensor.name}: holds values up to {np.abs(values).max():.3g}, beyond the range of {dtype.name}; "
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
        text = content if isinstance(content, str) else json.dumps(plain(content), indent=2) + "\n"
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
    try:
        with held(target, str(target)):
            _check_new(target, "directory" if suffix is None else "file")
            if not is_primary():
                yield hidden
                barrier(f"{what} is saved")
                return
            _remove(hidden)
            try:
                hidden.mkdir()
                place = hidden / f"content{suffix or ''}"
                if suffix is None:
                    place.mkdir()
                yield place
                place.rename(target)
                barrier(f"{what} is saved")
            finally:
                _remove(hidden)
    except OSError as error:
        if error.errno is None:  # not of the system: a message of ours
            raise
        said = OSError(error.errno, f"{target}: {what} was not saved ({error.strerror or error})")
        said.filename = str(target)
        raise said from error


def _check_new(target: Path, kind: str) -> None:
    if broadcast(lambda: target.exists() or target.is_symlink()):
        raise FileExistsError(f"{target}: exists already and is never overwritten; choose another {kind}")


def _remove(hidden: Path) -> None:
    """Remove what was written beside an output that did not come about."""
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden, ignore_errors=True)


def _tensor(item: Stored, index: int, name: str, size: dict[str, int]) -> Tensor:
    """Return one layer of a parameter (or all of one without layers), widened along the axes in `size`."""
    axes = item.variable.axes[1:] if item.stacked else item.variable.axes
    have = item.variable.shape[1:] if item.stacked else item.variable.shape
    want = tuple(size.get(axis, length) for axis, length in zip(axes, have, strict=True))
    if any(wide < length for wide, length in zip(want, have, strict=True)):
        raise ValueError(f"{name}: expected {dict(zip(axes, have, strict=True))} or wider, got {size}")
    shape = want if item.path == "embedding" else stored_shape(axes, want)

    def read() -> np.ndarray:
        array = _layer(item, index)
        if want != have:
            array = np.pad(array, [(0, wide - length) for wide, length in zip(want, have, strict=True)])
        return array if item.path == "embedding" else array.reshape(shape[::-1]).T

    fixed = np.dtype(item.variable.dtype) if isinstance(item.variable, QuantizedArray) else None
    return Tensor(name, shape, read, fixed)


def _layer(item: Stored, index: int) -> np.ndarray:
    """Return a parameter's layer on the host: a view of memory that a CPU already holds, else fetched.

    Never fetched whole from an accelerator, because jax would keep that copy as long as the parameter lives.
    """
    return fetched(item.variable[...], index if item.stacked else None)
