"""GGUF, as llama.cpp has it: its names, its order of rotary rows, and its files read as checkpoints.

Tensors are dequantised one by one and presented under Hugging Face names. Architecture `deci` has one number a layer,
the others equal layers. What `deci` leaves out of a layer without heads or channels (matrices of no size, a norm that
nothing reads) is filled in. `saap_jax.export.gguf_file` writes such files.
"""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from saap_jax.errors import reading, shown
from saap_jax.extras import need
from saap_jax.llama.files.families import FAMILIES, Family, all_but_each
from saap_jax.llama.files.layout import Checkpoint, fused_groups, regrouped, stored_parameters, unread
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling, Values, checked, per_layer, some

need("gguf", "GGUF files")
import gguf  # noqa: E402  (behind what says that it is missing)
from gguf import GGUFValueType  # noqa: E402

# --- names and layouts -----------------------------------------------------------------------------

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the divisors of each rotary frequency, float32 `[head_dim / 2]`."""

SCALING_KEYS = {
    "factor": "saap.rope.factor",
    "low_freq_factor": "saap.rope.low_freq_factor",
    "high_freq_factor": "saap.rope.high_freq_factor",
    "original_max_positions": "saap.rope.original_context_length",
}
"""Setting of a llama3 scaling -> where our files keep it; llama.cpp needs the divisors alone."""

WINDOW_KEYS = {
    "context_length": "saap.context_length",
    "attention.sliding_window": "saap.attention.sliding_window",
    "attention.sliding_window_layers": "saap.attention.sliding_window_layers",
}
"""Attribute -> where our files keep it of a model with a window that llama.cpp does not compute, whose context ends for
llama.cpp where the window begins to count; the last one where some layers alone have it."""

END_KEY = "saap.eos_token_ids"
"""All end tokens of a model, where llama.cpp's keys do not hold them."""

_WORDS = "token_embd.weight"

_TOKENS = "tokenizer.ggml.tokens"

PERMUTED = ("llama", "deci")
"""Architectures whose rotary rows llama.cpp wants as pairs; those of the others stay as halves of each head."""


def gguf_name(name: str, architecture: str = "llama") -> str:
    """The name in a file of an architecture of the tensor with a Hugging Face name.

    >>> gguf_name("model.layers.3.mlp.down_proj.bias")
    'blk.3.ffn_down.bias'
    """
    known = _names(architecture)
    suffixes = (".weight", ".bias")
    if not name.startswith("model.layers."):
        return known.get_name(name, suffixes) or name
    layer, inner = name.removeprefix("model.layers.").split(".", 1)
    inner = re.sub(r"^block_sparse_moe\.experts", "feed_forward.experts", inner)  # as Mistral itself calls them
    found = known.get_name(f"model.layers.0.{inner}", suffixes) or known.get_name(f"layers.0.{inner}", suffixes) or name
    return found.replace("blk.0.", f"blk.{layer}.", 1)


@functools.cache
def _names(architecture: str) -> gguf.TensorNameMap:
    """llama.cpp's own table of names, of a model of one layer."""
    return gguf.get_tensor_name_map({name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], 1)


def experts_side(name: str, family: str) -> int | None:
    """Find the axis of a tensor with a Hugging Face name along which the experts of a layer lie.

    None where it is not one of all experts.

    >>> experts_side("model.layers.0.mlp.experts.down_proj.weight", "qwen3_moe")
    1
    """
    mixture = FAMILIES[family].mixture
    if mixture is None:
        return None
    return mixture.sides.get(name.split(".", 3)[-1])


def expert_matrices(values: np.ndarray, experts: int, side: int) -> np.ndarray:
    """Split a matrix of experts side by side into `[experts, outputs, inputs]`, as in GGUF.

    >>> expert_matrices(np.array([[1, 2, 3, 4]]), 2, 1).tolist()
    [[[1, 2]], [[3, 4]]]
    """
    rows, columns = values.shape
    if side:
        return values.reshape(rows, experts, -1).swapaxes(0, 1)
    return values.reshape(experts, -1, columns)


def permute(values: np.ndarray, heads: int, *, undo: bool = False) -> np.ndarray:
    """Reorder query or key rows `[heads * head_dim, embed]`: halves of each head -> rotary pairs side by side."""
    rows, columns = values.shape
    if undo:
        sides = (rows // heads // 2, 2)
    else:
        sides = (2, rows // heads // 2)
    return values.reshape(heads, *sides, columns).swapaxes(1, 2).reshape(rows, columns)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Float[np.ndarray, "half"]:
    """Compute a llama3 scaling's divisor of each rotary frequency, float64 in [1, factor]."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return 1 / (smooth + (1 - smooth) / scaling.factor)


# --- files -----------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A value of the metadata and its type; of an array, its type and that of its items."""

    value: Any
    types: tuple[GGUFValueType, ...]


class GgufFile(NamedTuple):
    """An opened GGUF file: metadata as values, tensors mapped into memory."""

    path: Path
    entries: dict[str, Entry]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def fields(self) -> dict[str, Any]:
        """The values of the metadata."""
        return {key: entry.value for key, entry in self.entries.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor, the outermost first."""
        return tuple(self.tensors[name].shape.tolist()[::-1])

    def read(self, name: str) -> np.ndarray:
        """Read a tensor in floats.

        Raises:
            ValueError: of a type that cannot be converted.
        """
        tensor = self.tensors[name]
        with reading(self.path, f"a type of {name} that can be converted"), np.errstate(all="ignore"):
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))


class _Reader(gguf.GGUFReader):
    """The package's reader on a plain array: slices of a `memmap`, one a token, take five times as long."""

    @property
    def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)


def open_gguf_file(path: Path) -> GgufFile:
    """Open a GGUF file; a second time without reading its metadata again, if it has not changed.

    Raises:
        ValueError: it is none, or cut short; the message begins with the path.
    """
    stat = path.stat()
    return _open(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _open(path: Path, *_: int) -> GgufFile:
    with reading(path, "a whole GGUF file"):
        with np.errstate(over="ignore"):  # an offset that wraps around is refused below
            reader = _Reader(path)
        if reader.byte_order != "I":
            raise ValueError(f"{path}: expected a little-endian GGUF file, got a big-endian one")
        _check_places(path, reader)
        found = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        entries = {key: Entry(field.contents(), tuple(field.types[:2])) for key, field in found.items()}
        file = GgufFile(path, entries, {tensor.name: tensor for tensor in reader.tensors})
        _check_vocabulary(file)
        return file


def _check_places(path: Path, reader: gguf.GGUFReader) -> None:
    """Raise ValueError unless tensors lie one behind the other, each at a multiple of the alignment, to the file's end.

    llama.cpp refuses others too. Offsets that wrap around, tensors that overlap and a changed alignment would all give
    numbers that were never written.
    """
    start = int(reader.data_offset)
    alignment = int(reader.alignment)
    end = start
    place = start
    for tensor in reader.tensors:
        offset = int(tensor.field.parts[-1][0])
        if offset != place - start:
            raise ValueError(
                f"{path}: expected tensor {shown(tensor.name)} at offset {place - start:,}, behind the one before it "
                f"by the alignment of {alignment}, got {offset:,}; write or download the file again"
            )
        end = place + int(tensor.n_bytes)
        place = -(-end // alignment) * alignment
    if reader.tensors and not end <= len(reader.data) <= place:
        raise ValueError(
            f"{path}: expected the tensors to end with the file, after {end:,} to {place:,} bytes by the alignment of "
            f"{alignment}, got {len(reader.data):,}; write or download the file again"
        )


def _check_vocabulary(file: GgufFile) -> None:
    """Raise ValueError where the size that a file says of its vocabulary is not that of its embedding and tokenizer."""
    key = f"{file.fields.get('general.architecture')}.vocab_size"
    if (said := file.fields.get(key)) is None:
        return
    tokens = file.fields.get(_TOKENS)
    counts = {
        f"rows of {_WORDS}": file.shape(_WORDS)[0] if _WORDS in file.tensors else said,
        f"tokens in {_TOKENS}": len(tokens) if isinstance(tokens, list) else said,
    }
    for what, count in counts.items():
        if count != said:
            raise ValueError(f"{file.path}: expected {key} to be the {count:,} {what}, got {shown(said)}")


# --- checkpoints -----------------------------------------------------------------------------------

_KINDS = {
    "layers": "block_count",
    "positions": "context_length",
    "width": "embedding_length",
    "vocabulary": "vocab_size",
    "channels*": "feed_forward_length expert_feed_forward_length",
    "heads*": "attention.head_count attention.head_count_kv",
    "heads": "expert_used_count",
    "head size": "attention.key_length attention.value_length rope.dimension_count",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "theta": "rope.freq_base rope.freq_base_swa",
    "factor": "rope.scale_linear rope.scaling.factor",
    "a text": "rope.scaling.type",
    "count": "expert_count attention.sliding_window",
}
_FIELDS = {key: kind for kind, keys in _KINDS.items() for key in keys.split()}
"""Attributes, without the name of the architecture before them -> what they may be, see `spec.checked`."""

_OWN = {"expert_feed_forward_length", "attention.sliding_window", "rope.freq_base_swa"}
"""Those that are read only of families that name them as `Gguf.keys`."""

_UNREAD = {"rope.scaling.original_context_length", "rope.scaling.finetuned"}

_BEGIN = "tokenizer.ggml.bos_token_id"

END_KEYS = tuple(f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
"""The end tokens that llama.cpp reads."""


def gguf_families(experts: bool = False) -> dict[str, str]:
    """Name the family of each architecture of GGUF, with or without experts: of several the first.

    >>> gguf_families()
    {'llama': 'llama', 'deci': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'phi3': 'phi3', 'gemma3': 'gemma3_text'}
    >>> gguf_families(experts=True)
    {'qwen3moe': 'qwen3_moe', 'llama': 'mixtral'}
    """
    names = {}
    if not experts:
        names = {"llama": "llama", "deci": "llama"}
    for name, family in FAMILIES.items():
        if family.experts == experts:
            names.setdefault(family.gguf.architecture, name)
    return names


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file as a checkpoint; refuses by name what the model cannot express.

    Raises:
        ValueError: an unknown architecture, attribute or tensor; sizes that are not plausible.
    """
    with reading(path, "the metadata of a model"):
        file = open_gguf_file(path)
        found, architecture, name = _attributes(file)
        spec = _spec(found, file, architecture, name)
        groups = fused_groups(spec) if FAMILIES[name].fused else []
        expected = {
            each: item.shape(item.sizes) for item in stored_parameters(abstract_llama(spec))[0] for each in item.names
        }
        for group in groups:
            expected |= {each: group.shape(size) for each, size in group.stored.items()}
            expected = {each: shape for each, shape in expected.items() if each not in group.ours}
        names = {gguf_name(each, architecture): each for each in expected}
        if unknown := [each for each in file.tensors if each not in names and each != ROPE_FACTORS]:
            raise ValueError(f"{path}: unknown tensor {some(unknown)}; not a plain LLaMA, or {architecture}")
        return regrouped(_checkpoint(file, spec, names, architecture in PERMUTED), groups)


def _attributes(file: GgufFile) -> tuple[Values, str, str]:
    """Return the attributes of a model, its architecture, and its family: one with experts if the file counts any."""
    architecture = file.fields.get("general.architecture")
    where = str(file.path)
    known = list(dict.fromkeys([*gguf_families(), *gguf_families(experts=True)]))
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"{where}: expected architecture {', '.join(known)}, got {shown(architecture)}; not a LLaMA model or a "
            "relative"
        )
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    experts = values.get("expert_count")
    families = gguf_families(experts=bool(experts))
    if architecture not in families:
        expected = "none" if experts else "a positive integer"
        raise ValueError(f"{where}: expected {prefix}expert_count to be {expected}, got {shown(experts)}")
    name = families[architecture]
    if name == "llama" and WINDOW_KEYS["attention.sliding_window"] in file.fields:
        name = "mistral"  # which is a LLaMA with a window
    if unknown := sorted(values.keys() - (_FIELDS.keys() - _OWN | FAMILIES[name].gguf.keys | _UNREAD)):
        raise ValueError(f"{where}: unknown attributes {some([prefix + key for key in unknown])}")
    found = checked(values, _FIELDS, where, prefix)
    found.update(_windows(file))
    return found, architecture, name


def _windows(file: GgufFile) -> dict[str, Any]:
    """Read the attributes that our files keep of a model whose window llama.cpp does not compute."""
    kinds = dict.fromkeys(WINDOW_KEYS.values(), "positions") | {
        WINDOW_KEYS["attention.sliding_window_layers"]: "count*"
    }
    ours = checked({key: file.fields[key] for key in kinds if key in file.fields}, kinds, str(file.path))
    return {name: ours[key] for name, key in WINDOW_KEYS.items() if key in ours}


def _number(value: float) -> float:
    """Shorten a float32 to the shortest decimal of it, such as 1e-05."""
    return float(str(np.float32(value)))


def _checkpoint(file: GgufFile, spec: LlamaSpec, names: dict[str, str], permuted: bool) -> Checkpoint:
    """Present the tensors under Hugging Face names, and those that an empty sub-block lacks in the file."""
    family = spec.constants.family
    own = {known: name for name, known in names.items() if name in file.tensors}
    shapes = unread(spec)
    for known, name in own.items():
        shapes[known] = shape = file.shape(name)
        if (side := experts_side(known, family)) is not None:  # side by side in one matrix
            experts, rows, columns = shape
            shapes[known] = (rows, experts * columns) if side else (experts * rows, columns)

    def read(name: str) -> np.ndarray:
        if name not in own:
            return np.ones(shapes[name], np.float32)
        values = file.read(own[name])
        if (side := experts_side(name, family)) is not None:
            return (values.swapaxes(0, 1) if side else values).reshape(shapes[name])
        if (offset := spec.constants.traits.norm_offset) and name.endswith("norm.weight"):
            return values - np.float32(offset)
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            return permute(values, len(values) // spec.head_dim, undo=True)
        return values

    return Checkpoint(str(file.path), spec, shapes, read)


def _spec(found: Values, file: GgufFile, architecture: str, name: str) -> LlamaSpec:
    where = found.where
    family = FAMILIES[name]
    if _WORDS not in file.tensors:
        raise ValueError(f"{where}: missing tensor {_WORDS}")
    layers = _widths(found, architecture, family)
    embed = found["embedding_length"]
    if "attention.key_length" not in found and layers[0].kv_heads:
        found["attention.key_length"] = embed // (layers[0].kv_heads * layers[0].q_per_kv)
    head_dim = found["attention.key_length"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{where}: {found.prefix}{key} = {found[key]} is not supported, expected head_dim {head_dim}"
            )
    how = _sights(found, family, len(layers))
    if ROPE_FACTORS in file.tensors:
        scaling = _scaling_of_factors(file.read(ROPE_FACTORS), how["rope_theta"], head_dim, where, file.fields)
        if how["rope_scaling"] is not None and scaling is not None:
            raise ValueError(f"{where}: both {ROPE_FACTORS} and rope.scaling.type are given, expected one")
        how["rope_scaling"] = scaling or how["rope_scaling"]
    if family.experts:  # llama.cpp divides the weights of a token's experts by their sum
        most = found["expert_used_count"]
        experts = found["expert_count"]
        if most > experts:
            raise ValueError(
                f"{where}: expected {found.prefix}expert_used_count of at most {experts} experts, got {most}"
            )
        how |= {"experts_per_token": most, "route_scale": "sum_to_one"}
    tokens = checked(file.fields, dict.fromkeys((_BEGIN, *END_KEYS), "token") | {END_KEY: "token*"}, where)
    ends = tokens.get(END_KEY, [tokens.get(key) for key in END_KEYS])
    rows = checked({"rows": file.shape(_WORDS)[0]}, {"rows": "vocabulary"}, where, f"{_WORDS}: ")
    return LlamaSpec(
        vocab=rows["rows"],
        embed=embed,
        head_dim=head_dim,
        layers=layers,
        tied="output.weight" not in file.tensors,
        output_biases=any(each.endswith(("attn_output.bias", "ffn_down.bias")) for each in file.tensors),
        constants=Constants(
            norm_eps=_number(found["attention.layer_norm_rms_epsilon"]),
            max_positions=found["context_length"],
            bos_token=tokens.get(_BEGIN),
            eos_tokens=tuple(dict.fromkeys(end for end in ends if end is not None)),
            family=name,
            **how,
        ),
    )


def _sights(found: Values, family: Family, layers: int) -> dict[str, Any]:
    """Read the positions of layers: rotary base and scaling, window, and the layers apart from the rest."""
    kind = found.get("rope.scaling.type", "linear")  # as llama.cpp has it, which divides by a factor that stands alone
    if kind not in ("none", "linear"):
        key = f"{found.prefix}rope.scaling.type"
        raise ValueError(f"{found.where}: {key} = {shown(kind)} is not supported, expected 'none' or 'linear'")
    if kind == "linear":
        factor = _number(found.get("rope.scaling.factor", found.get("rope.scale_linear", 1.0)))
    else:
        factor = 1.0
    scaling = None
    if factor != 1:
        scaling = RopeScaling(kind="linear", factor=factor)
    theta = _number(found.get("rope.freq_base", 10_000.0))  # as llama.cpp has it, of any architecture
    main: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    positions = Constants(max_positions=found["context_length"], rope_scaling=scaling).positions
    window = found.get("attention.sliding_window") or None
    if window is None or window >= positions:
        window = None
    if not family.gguf.windows:
        apart = found.get("attention.sliding_window_layers")
        if apart is None or window is None:
            return main | {"sliding_window": window}
        if not isinstance(apart, list) or not set(apart) <= set(range(layers)):
            key = WINDOW_KEYS["attention.sliding_window_layers"]
            raise ValueError(f"{found.where}: expected {key} to be numbers of {layers} layers, got {shown(apart)}")
        return main | {"apart": Apart(layers=tuple(apart), sliding_window=window, **main)}
    if layers == 62:  # by which llama.cpp knows it
        raise ValueError(
            f"{found.where}: a gemma3 of {layers} layers (27B) divides its scores by another number than the size of a "
            "head, which the file does not say; load the Hugging Face directory of this model instead"
        )
    local = all_but_each(family.full_every, layers)
    own: dict[str, Any] = {"rope_theta": _number(found.get("rope.freq_base_swa", family.local_theta))}
    own |= {"sliding_window": window, "rope_scaling": None}
    if len(local) == layers:
        return own
    return main | {"apart": Apart(layers=local, **own)}


def _widths(found: Values, architecture: str, family: Family) -> tuple[LayerWidths, ...]:
    where = found.where
    widths = []
    names = "attention.head_count", "attention.head_count_kv", family.gguf.expert_channels
    found.setdefault(names[1], found[names[0]])
    each = [per_layer(found[name], found["block_count"], f"{found.prefix}{name}", where) for name in names]
    for layer, (queries, keys, mlp) in enumerate(zip(*each, strict=True)):
        if (queries == 0) != (keys == 0) or (keys and queries % keys):
            raise ValueError(
                f"{where}: layer {layer}: {queries} attention heads are no multiple of {keys} key/value heads"
            )
        if keys and not mlp:  # llama.cpp skips such a layer as a whole, which no model here means
            raise ValueError(f"{where}: layer {layer} has attention heads but no feed-forward channels; not supported")
        if family.experts:
            inner = {"mlp": found["expert_count"], "channels": max(1, mlp)}
        else:
            inner = {"mlp": mlp}
        widths.append(LayerWidths(kv_heads=keys, q_per_kv=queries // keys if keys else 1, **inner))
    if architecture != "deci" and (len(set(widths)) > 1 or not widths[0].kv_heads):
        kinds = shown(sorted({(each.kv_heads, each.q_per_kv, each.mlp) for each in widths}))
        raise ValueError(
            f"{where}: expected layers of equal widths for architecture {architecture!r}, none without heads, got "
            f"layers of (key/value heads, query heads on each, channels) {kinds}"
        )
    return tuple(widths)


def _scaling_of_factors(
    factors: np.ndarray, theta: float, head_dim: int, where: str, fields: dict[str, Any]
) -> RopeScaling | None:
    """Recognise the frequency divisors of a llama3 scaling: Llama 3.1's and 3.2's, or with settings in our keys."""
    if np.all(factors == 1):
        return None
    kinds = {key: "positions" if name == "original_max_positions" else "factor" for name, key in SCALING_KEYS.items()}
    ours = checked({key: fields[key] for key in kinds if key in fields}, kinds, where)
    given = {name: ours[key] for name, key in SCALING_KEYS.items() if key in ours}
    scaling = RopeScaling(**{"kind": "llama3", "factor": max(float(factors.max()), 1.0)} | given)
    expected = llama3_divisors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{where}: {ROPE_FACTORS} is no llama3 scaling with low_freq_factor {scaling.low_freq_factor:g}, "
            f"high_freq_factor {scaling.high_freq_factor:g} and {scaling.original_max_positions} original positions; "
            "load the Hugging Face directory of this model instead"
        )
    return scaling
