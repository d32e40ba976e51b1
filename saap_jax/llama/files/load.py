"""Bring a model into memory: Hugging Face directories and hub names, our own directories, GGUF files.

Tensors are read one at a time into preallocated stacked arrays, so that loading holds the parameters and one tensor.
Nothing is guessed: a tensor that is unknown, missing, doubled, misshapen or not finite is refused by name.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import safe_open

from saap_jax.errors import read_object, reading, shown
from saap_jax.llama.files.config import quantization_from_config, spec_from_config
from saap_jax.llama.files.layout import (
    EMBEDDING,
    PACKED,
    UNEMBEDDING,
    Checkpoint,
    Stored,
    groups_of,
    regrouped,
    stored_parameters,
    unread,
)
from saap_jax.llama.files.sources import resolve
from saap_jax.llama.model import Llama, abstract_llama
from saap_jax.llama.quantized import abstract_quantized
from saap_jax.llama.spec import check_length, checked, some
from saap_jax.runtime.mesh import Layout, check_experts, shardings
from saap_jax.runtime.progress import within
from saap_jax.types import STRUCTURES, Keep
from saap_jax.wings import wing

_ALIGNMENT = 64  # XLA on a CPU takes over a numpy buffer without a copy only if it starts at a multiple of this
_FLOATS = {"F64", "F32", "F16", "BF16"}
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # buffers in old checkpoints
_INNER_BIAS = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkv]|mlp\.(gate|up))_proj\.bias")


def load_model(
    name: str | Path,
    dtype: Any = "float32",
    *,
    layout: Layout | None = None,
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> Llama:
    """Load a LLaMA or a relative (`families.FAMILIES`), in `dtype` (float32, bfloat16, float16; float64 under x64).

    Matrices that were saved quantised stay so. With a `layout`, parameters are spread over its mesh, and each process
    reads from safetensors files only what its devices hold; host memory stays below that and one tensor.

    `name` is "smollm2-135m" or "gemma3-270m", of packages; the path of a `.gguf` file; a directory in Hugging Face
    format or written by `save_model`; the address of such a file or directory, `gs://bucket/name`; or a hub name
    "org/name". `lengths` are rows of tokens that the model will see, by the option that sets them: none may be longer
    than the positions that it has. Raises `FileNotFoundError` or `ValueError`, one line, naming the tensor, file or
    attribute.

    >>> load_model(path).spec == model.spec
    True
    """
    target = _parameter_dtype(dtype)
    path = resolve(name)
    checkpoint = _opened(path)
    for option, length in lengths.items():
        check_length(checkpoint.spec.constants, length, option)
    abstract = abstract_llama(checkpoint.spec, target)
    if checkpoint.quantization is not None:
        abstract = abstract_quantized(abstract, checkpoint.quantization, checkpoint.where)
    stored, treedef = stored_parameters(abstract)
    _check_tensors(checkpoint, stored)
    if layout is not None:
        check_experts(layout.mesh.shape, checkpoint.spec.constants.traits.experts, checkpoint.where)
    if layout is None:
        places = [None] * len(stored)
    else:
        places = jax.tree.leaves(shardings(abstract, layout))
    leaves = []
    for item, place in within("parameters", list(zip(stored, places, strict=True))):
        value = _read_parameter(checkpoint, item, place)
        leaves.append(item.variable.replace(value))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def load_keep(directory: str | Path) -> Keep:
    """Read the `keep.json` of a saved model: which of the original model's units it still has."""
    path = Path(directory) / "keep.json"
    keep: Keep = {}
    with reading(path, f"units, and the kept ones of each layer, of {', '.join(STRUCTURES)}"):
        record = read_object(path)
        if record.keys() != set(STRUCTURES):
            raise ValueError(f"{path}: expected kept units of {', '.join(STRUCTURES)}, got {shown(list(record))}")
        for structure, entry in record.items():
            rows = entry["kept"]
            where = f"{path}: {structure}"
            units = checked({"units": entry["units"]}, {"units": "channels"}, where)["units"]
            keep[structure] = np.zeros((len(rows), units), bool)
            for layer, kept in enumerate(rows):
                if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < units):
                    raise ValueError(
                        f"{where}: expected ascending integers from 0 below {units} in layer {layer}, got {shown(kept)}"
                    )
                keep[structure][layer, kept] = True
    return keep


def _parameter_dtype(dtype: Any) -> Any:
    try:
        target = jnp.dtype(dtype)
    except TypeError:
        target = None
    floats = ("float32", "bfloat16", "float16", "float64")
    if target is None or target.name not in floats or jax.dtypes.canonicalize_dtype(target) != target:
        raise ValueError(f"dtype: expected {', '.join(floats)} (the last under jax_enable_x64), got {dtype!r}")
    return target


def _opened(directory: Path) -> Checkpoint:
    """Open a GGUF file, a directory of safetensors, or a checkpoint of Tunix or MaxText."""
    if directory.is_file():
        from saap_jax.llama.files.gguf import open_gguf

        return open_gguf(directory)
    if next(directory.glob("*.safetensors"), None) is None and (found := wing("open_orbax")(directory)) is not None:
        return found
    config = directory / "config.json"
    content = read_object(config)
    if (generation := directory / "generation_config.json").is_file():  # as transformers: a chat may end otherwise
        said = checked(read_object(generation), {"eos_token_id": "token*"}, str(generation))
        content |= {key: value for key, value in said.items() if key == "eos_token_id"}
    spec = spec_from_config(content, str(config))
    shapes = {}
    homes = {}
    for file in _tensor_files(directory):
        with reading(file, "a whole safetensors file"):
            file.open("rb").close()  # of a file that may not be read, the library says that there is none
            handle = safe_open(file, framework="numpy")
            names = set(handle.keys())
        if twice := sorted(names & homes.keys()):
            raise ValueError(f"{some(twice)}: found in two files of {directory}, expected one; remove it from a shard")
        homes |= dict.fromkeys(names, handle)
        for name in (name for name in names if not _IGNORED.fullmatch(name)):
            view = handle.get_slice(name)
            if view.get_dtype() not in ({"U8"} if name.endswith(PACKED) else _FLOATS):
                if name.endswith(PACKED):
                    kind = "bytes (U8)"
                else:
                    kind = "floating point"
                raise ValueError(f"{file}: {some([name])} is stored as {view.get_dtype()}, expected {kind}")
            shapes[name] = tuple(view.get_shape())
    groups = groups_of(spec, content["model_type"])
    known = {name.removesuffix(PACKED) + "weight" if name.endswith(PACKED) else name for name in shapes}
    known |= {name for group in groups for name in group.ours}
    absent = {name: np.ones(shape, np.float32) for name, shape in unread(spec).items() if name not in known}
    checkpoint = Checkpoint(
        str(directory),
        spec,
        shapes | {name: ones.shape for name, ones in absent.items()},
        lambda name: absent[name] if name in absent else homes[name].get_tensor(name),
        lambda name, part: absent[name][part] if name in absent else homes[name].get_slice(name)[part],
        quantization_from_config(content, str(config)),
    )
    if spec.output_biases and content["model_type"] == spec.constants.family:
        _drop_zero_biases(checkpoint)
    return regrouped(checkpoint, groups)


def _drop_zero_biases(checkpoint: Checkpoint) -> None:
    """Take biases of other than the output projections out of a checkpoint; `ValueError` for one that is not zero.

    transformers knows biases of all projections or of none, so an exported model has more than its own.
    """
    for name in [name for name in checkpoint.shapes if _INNER_BIAS.fullmatch(name)]:
        if np.any(checkpoint.read(name)):
            raise ValueError(
                f"{checkpoint.where}: {name} is not zero, expected biases of o_proj and down_proj only; "
                "a model with other biases is not supported"
            )
        del checkpoint.shapes[name]


def _tensor_files(directory: Path) -> list[Path]:
    """List the safetensors files of a directory: the one, or those that its index names."""
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file() == index.is_file():
        if single.is_file():
            found = "both; remove one"
        else:
            found = "neither"
        kind = ValueError if single.is_file() else FileNotFoundError
        raise kind(f"{directory}: expected model.safetensors or {index.name}, found {found}")
    if single.is_file():
        return [single]
    with reading(index, "a weight_map of tensor names to file names"):
        shards = sorted(set(read_object(index)["weight_map"].values()))
        if wrong := [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]:
            raise ValueError(f"{index}: expected names of .safetensors files beside it, got {shown(wrong[0])}")
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise FileNotFoundError(f"{directory / missing[0]}: missing shard, which {index.name} names; fetch it again")
    return [directory / shard for shard in shards]


def _check_tensors(checkpoint: Checkpoint, stored: list[Stored]) -> None:
    expected = {name: item.shape(item.sizes) for item in stored for name in item.names}
    where = checkpoint.where
    found = checkpoint.shapes
    family = checkpoint.spec.constants.family
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{where}: missing tensors {some(missing)}")
    if extra := sorted(found.keys() - expected.keys() - ({UNEMBEDDING} if checkpoint.spec.tied else set())):
        of_family = ""
        if family != "llama":
            of_family = f" of family {family}"
        raise ValueError(f"{where}: unknown tensors {some(extra)}; not a plain LLaMA model{of_family}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}")
    both = checkpoint.spec.tied and UNEMBEDDING in found
    if both and not np.array_equal(checkpoint.read(UNEMBEDDING), checkpoint.read(EMBEDDING)):
        raise ValueError(
            f"{where}: tie_word_embeddings is true, but {UNEMBEDDING} differs from {EMBEDDING}; "
            "set it to false if the model is meant to have both"
        )


def _read_parameter(checkpoint: Checkpoint, item: Stored, place: NamedSharding | None) -> jax.Array:
    """Make a parameter; of one that is spread over devices, this process reads what its own ones hold."""
    shape = item.variable.shape
    if place is None:
        return jax.device_put(_read_part(checkpoint, item, (slice(None),) * len(shape)), may_alias=True)
    held: dict[tuple, np.ndarray] = {}  # several devices may hold the same part

    def read(part: Any) -> np.ndarray:
        key = tuple((each.start, each.stop) for each in part)
        if key not in held:
            held[key] = _read_part(checkpoint, item, part)
        return held[key]

    return jax.make_array_from_callback(shape, place, read)


def _read_part(checkpoint: Checkpoint, item: Stored, part: tuple[slice, ...]) -> np.ndarray:
    """Return a part of a parameter, tensor by tensor."""
    dtype = jnp.dtype(item.variable.dtype)
    shape = item.variable.shape
    sizes = [len(range(*each.indices(size))) for each, size in zip(part, shape, strict=True)]
    buffer = _aligned_empty(tuple(sizes), dtype)
    if not buffer.size:  # of a layer without heads or channels, from which the library cannot slice a part
        return buffer
    layers, inner = (part[0], part[1:]) if item.stacked else (slice(None), part)
    whole = sizes[item.stacked :] == list(shape[item.stacked :])
    block = None if whole else item.stored_part(inner)
    for index, name in enumerate(item.names[layers]):
        into = buffer[index] if item.stacked else buffer
        if block is None or checkpoint.read_part is None:
            values = item.to_ours(checkpoint.read(name))[inner]
        else:
            values = checkpoint.read_part(name, block)
            values = (values if item.path == "embedding" else values.T).reshape(into.shape)
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name; no flags as large as the values
            into[...] = values
            finite = np.isfinite(into.min(initial=0)) and np.isfinite(into.max(initial=0))
        if not finite:
            raise ValueError(f"{checkpoint.where}: {name} holds NaN or infinite values (as {dtype}); it is damaged")
    return buffer


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
